"""."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.cache.shared_prefill import Reader
from rapid_integrations.engine.decoding.constraint import TokenConstraint
from rapid_integrations.engine.decoding.sequence import SequenceState
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import (
    GenerationError,
    RapidError,
)

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A part of the prompts was read; token counts cover target and drafter."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens of the answer, in order; an end-of-sequence token is left out."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The request ended as it should. The last event."""

    reason: FinishReason
    stats: RapidStats


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended with an error. The last event."""

    error: RapidError


Event = Prefilled | NewTokens | Finished | Failed


Listener = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to generate.

    Attributes:
        target_tokens: The target's prompt, at least one token.
        drafter_tokens: The drafter's prompt, at least one token; ``None`` decodes plainly, and so does
            ``num_draft_tokens=0``.
        sampling: How tokens are drawn.
        speculation: How drafting and acceptance work.
        stop_matcher: Called in the worker once per token of the answer, in order; true ends the answer behind
            that token.
        timeout_s: Wall time from submission.
        constraint: Limits the answer's tokens; an object of this request's own.
    """

    target_tokens: Sequence[int]
    drafter_tokens: Sequence[int] | None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    stop_matcher: Callable[[int], bool] | None = None
    timeout_s: float | None = None
    constraint: TokenConstraint | None = None


class RequestHandle:
    """A submitted request, as its owner holds it."""

    def __init__(self, request: Request, listener: Listener) -> None:
        self.request = request
        self.submitted = time.perf_counter()
        self.stats = RapidStats(prompt_tokens=len(request.target_tokens))
        self.decoding: SequenceState | None = None
        self.readers: list[Reader] = []
        self.prefill_total = 0
        self.decode_started = 0.0
        # How far the drafter has read what the question is about, where that is remembered of equal prompts,
        # and the key that it is remembered by: empty where it does not matter.
        self.question_agreement: float | None = None
        self.prompts_key = b""
        self._listener = listener
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop generating; memory is freed within one round. No further event comes. Idempotent."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called, or nobody can be told anything any more."""
        return self._cancelled.is_set()

    @property
    def expired(self) -> bool:
        """Whether the request ran past its time limit."""
        return time.perf_counter() > self.deadline

    @property
    def deadline(self) -> float:
        """When its time is over, by :func:`time.perf_counter`."""
        limit = self.request.timeout_s
        return math.inf if limit is None else self.submitted + limit

    @property
    def num_unread(self) -> int:
        """How many tokens of its prompts are still to be read."""
        return sum(reader.num_unread for reader in self.readers)

    def emit(self, event: Event) -> None:
        """Hand an event to the owner; an owner that raises is gone (a closed event loop), and so cancels."""
        if self.cancelled:
            return
        try:
            with _panics_are_errors():
                self._listener(event)
        except Exception:
            self.cancel()


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """Raise what is no ``Exception``, but no exit either, as a :class:`GenerationError`.

    pyo3 raises the panics of Rust code (tokenizers, llguidance) so: past every handler, though what it hit is
    one request.
    """
    try:
        yield
    except (Exception, GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as panic:
        raise GenerationError(
            f"the engine failed on this request: {type(panic).__name__}: {panic}"
        ) from panic
