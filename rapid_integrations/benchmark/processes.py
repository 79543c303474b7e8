"""The worker processes of a benchmark, one for each runtime.

OpenMP keeps a pool of threads for each thread that has computed, and with two pools in one process small
forward passes take several times as long. Separate processes keep one baseline from slowing another, and
separate their memory. Only one of them works at a time.
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

# An idle process exits by itself when its connection closes; a busy one is terminated after this time.
_EXIT_TIMEOUT_S = 5.0


class Runner(Protocol):
    """Executes the runs of one runtime."""

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
        # Errors of other classes may not be picklable.
        if isinstance(error, RapidError):
            return cls(error)
        return cls(GenerationError(f"the benchmark failed: {type(error).__name__}: {error}"))


def make_runner(runtime: Runtime, models: ModelChoice) -> Runner:
    """Load a runtime's models in this process."""
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
    """The device and the numbers of threads and processors that torch uses in this process."""
    import torch

    facts: dict[str, Any] = {"threads": torch.get_num_threads(), "cpus": os.cpu_count(), "device": "cpu"}
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        facts["device"] = str(device)
        if device is not None and device.type == "cuda":
            facts["device_name"] = torch.cuda.get_device_name()
    return facts


class Workers:
    """The worker processes of a benchmark. They load their models at the same time.

    Args:
        runtimes: The runtimes to start.
        models: The models to load.

    Raises:
        RapidError: A process could not load its models.
    """

    def __init__(self, runtimes: Iterable[Runtime], models: ModelChoice) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers: dict[Runtime, tuple[multiprocessing.process.BaseProcess, Connection]] = {}
        for runtime in dict.fromkeys(runtimes):
            connection, worker_end = context.Pipe()
            process = context.Process(
                target=_serve, args=(worker_end, runtime, models), name=f"rapid-bench-{runtime}", daemon=True
            )
            process.start()
            worker_end.close()
            self._workers[runtime] = process, connection
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
        """Execute a run in the process of its baseline's runtime.

        Raises:
            RapidError: A question cannot be answered, or the process ended.
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
            process.join(_EXIT_TIMEOUT_S)
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
    """The main function of a worker process: load, then execute runs until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
    sys.stdout = sys.stderr  # only the parent writes results to stdout
    with quiet_libraries():
        serve(connection, lambda: make_runner(runtime, models))


def serve(connection: Connection, make: Callable[[], Runner]) -> None:
    """Execute the runs that arrive on a connection until it closes.

    Args:
        connection: Receives :class:`Run` and sends :class:`Outcome` or a failure. The first message sent
            reports that the models are loaded, or why they are not.
        make: Loads the models and returns the runner.
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
