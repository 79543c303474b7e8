"""Each runtime in a process of its own.

OpenMP keeps a pool of threads for every thread that ever computed, and with a second pool in a process small
forward passes take several times as long: one baseline would slow another. A process each makes them
independent, and its memory their own. Only one of them is asked at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from rapid_integrations.benchmark.baselines import BASELINES, Runtime
from rapid_integrations.benchmark.models import ModelChoice
from rapid_integrations.benchmark.work import Outcome, Run
from rapid_integrations.errors import GenerationError, RapidError
from rapid_integrations.model_choice import quiet_libraries

# A process that is not in the middle of a run leaves by itself, and then tidily.
_LEAVE_S = 5.0


class Runner(Protocol):
    """Answers runs."""

    def run(self, run: Run) -> Outcome:
        """Ask all questions of a run."""
        ...


@dataclass(frozen=True, slots=True)
class _Ready:
    hardware: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Failure:
    error: RapidError

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        # Another class of error may not survive the way to the other process.
        if isinstance(error, RapidError):
            return cls(error)
        return cls(GenerationError(f"the benchmark failed: {type(error).__name__}: {error}"))


def make_runner(runtime: Runtime, models: ModelChoice) -> Runner:
    """Load what a runtime needs, in this process."""
    from rapid_integrations.benchmark.rapid_runtime import RapidRuntime
    from rapid_integrations.benchmark.transformers_runtime import TransformersRuntime
    from rapid_integrations.config import GenerationOptions

    if runtime == "transformers":
        target, drafter = models.load_bare()
        sampling = GenerationOptions().override(**models.options).sampling
        return TransformersRuntime(
            target, drafter, models.load_tokenizer(), max_new_tokens=sampling.max_new_tokens
        )
    return RapidRuntime(lambda: models.load_pipeline(self_drafting=runtime == "self"))


def hardware() -> dict[str, Any]:
    """What torch computes on in this process."""
    import torch

    found: dict[str, Any] = {"threads": torch.get_num_threads(), "cpus": os.cpu_count(), "device": "cpu"}
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        found["device"] = str(device)
        if device is not None and device.type == "cuda":
            found["device_name"] = torch.cuda.get_device_name()
    return found


class Workers:
    """The processes that a benchmark asks, loaded side by side.

    Args:
        runtimes: Which to start.
        models: What they load.

    Raises:
        RapidError: One could not load.
    """

    def __init__(self, runtimes: Iterable[Runtime], models: ModelChoice) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers: dict[Runtime, tuple[multiprocessing.process.BaseProcess, Connection]] = {}
        for runtime in dict.fromkeys(runtimes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, runtime, models), name=f"rapid-bench-{runtime}", daemon=True
            )
            process.start()
            theirs.close()
            self._workers[runtime] = process, ours
        try:
            self.hardware = {runtime: self._receive(runtime).hardware for runtime in self._workers}
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, run: Run) -> Outcome:
        """Ask the process whose baseline it is.

        Raises:
            RapidError: What a question made impossible, or the process ended.
        """
        runtime = BASELINES[run.baseline].runtime
        self._workers[runtime][1].send(run)
        outcome: Outcome = self._receive(runtime)
        return outcome

    def close(self) -> None:
        """End the processes. Idempotent."""
        for _, connection in self._workers.values():
            connection.close()
        for process, _ in self._workers.values():
            process.join(_LEAVE_S)
            process.terminate()
            process.join()
        self._workers.clear()

    def _receive(self, runtime: Runtime) -> Any:
        process, connection = self._workers[runtime]
        try:
            received = connection.recv()
        except EOFError:
            process.join()
            raise GenerationError(
                f"the benchmark's process for {runtime!r} ended with exit code {process.exitcode}: it may "
                "have run out of memory. Try shorter --contexts or fewer --baselines."
            ) from None
        if isinstance(received, _Failure):
            raise received.error
        return received


def _serve(connection: Connection, runtime: Runtime, models: ModelChoice) -> None:
    """A process's life: load, then answer runs until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells everybody; the parent ends us
    sys.stdout = sys.stderr  # results are the parent's to write
    with quiet_libraries():
        serve(connection, lambda: make_runner(runtime, models))


def serve(connection: Connection, make: Callable[[], Runner]) -> None:
    """Answer the runs that come over a connection until it is closed.

    Args:
        connection: Gets :class:`Run`, gives :class:`Outcome` or a failure; first of all whether it is ready.
        make: Makes what answers.
    """
    try:
        runner = make()
    except Exception as error:
        connection.send(_Failure.of(error))
        return
    connection.send(_Ready(hardware()))
    while True:
        try:
            run = connection.recv()
        except EOFError:
            return
        try:
            connection.send(runner.run(run))
        except Exception as error:
            connection.send(_Failure.of(error))
