"""Requests to engines over table models whose answers count upwards."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.requests import Event, Request

VOCAB = 12
EOS = 0
PATIENCE_S = 60.0


def counting_table(step: int = 1) -> torch.Tensor:
    """After ``x`` comes ``x + step`` (modulo the vocabulary), by far."""
    table = torch.zeros(VOCAB, VOCAB, VOCAB)
    for token in range(VOCAB):
        table[:, token, (token + step) % VOCAB] = 20.0
    return table


def request(
    prompt: Sequence[int] = (3, 1),
    drafter_prompt: Sequence[int] | None = (1,),
    *,
    max_new_tokens: int = 8,
    ignore_eos: bool = True,
    num_draft_tokens: int | None = 3,
    acceptance: Any = "lossless",
    stop_matcher: Callable[[int], bool] | None = None,
    timeout_s: float | None = None,
    **sampling: Any,
) -> Request:
    return Request(
        prompt,
        drafter_prompt,
        SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=ignore_eos, **sampling),
        SpeculationParams(acceptance=acceptance, num_draft_tokens=num_draft_tokens),
        stop_matcher=stop_matcher,
        timeout_s=timeout_s,
    )


class Gate:
    """Holds a model's passes back until it is opened, and signals when the first one waits."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, steps: Sequence[Step]) -> None:
        self.reached.set()
        assert self.open.wait(PATIENCE_S)


def submit(engine: Engine, wanted: Request) -> queue.SimpleQueue[Event]:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(wanted, events.put)
    return events


def wait_for(condition: Callable[[], bool]) -> None:
    """Poll until a condition holds for which the worker has no event."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.002)):
        if condition():
            return
        pause.wait(0.002)
    raise AssertionError("did not happen")


def long_prompt(size: int = 40) -> list[int]:
    return [index % VOCAB for index in range(size)]
