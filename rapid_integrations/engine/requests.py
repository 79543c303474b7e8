"""Requests, their events, and the queue through which other threads hand them to the engine's worker."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.cache.shared_prefill import Reader
from rapid_integrations.engine.decoding.constraint import TokenConstraint
from rapid_integrations.engine.decoding.sequence import SequenceState
from rapid_integrations.engine.failures import panics_as_errors
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import EngineClosedError, QueueFullError, RapidError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The models have read a part of the prompts. Token counts include target and drafter."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens of the answer, in order, without the end-of-sequence token."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The request ended normally. The last event."""

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
    """A prompt to answer.

    Attributes:
        target_tokens: The target's prompt, at least one token.
        drafter_tokens: The drafter's prompt, at least one token. ``None`` means plain decoding, and so does
            ``num_draft_tokens=0``.
        sampling: Sampling parameters.
        speculation: Parameters of drafting and acceptance.
        stop_matcher: Called in the worker thread once per token of the answer, in order. If it returns true
            the answer ends after that token.
        timeout_s: Time limit in seconds from submission; ``None`` for no limit.
        constraint: Limits the answer's tokens. Each request needs an object of its own.
    """

    target_tokens: Sequence[int]
    drafter_tokens: Sequence[int] | None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    stop_matcher: Callable[[int], bool] | None = None
    timeout_s: float | None = None
    constraint: TokenConstraint | None = None


class RequestHandle:
    """A submitted request: its owner cancels it here, and the scheduler keeps its state here.

    Attributes:
        request: The request.
        submitted: Time of submission, by :func:`time.perf_counter`.
        stats: Counts and times so far.
        sequence: The state of decoding; ``None`` before and after it.
        readers: The models that read the prompts, the target first; empty in the queue and after the end.
        prefill_tokens: Prompt tokens of both models that were not in a cache when the request started.
        decode_started: Start of decoding, by :func:`time.perf_counter`.
        prompts_key: Digest of both prompts, if the question agreement matters for this request.
        question_agreement: The question agreement that is remembered for equal prompts; ``None`` if unknown.
    """

    def __init__(self, request: Request, listener: Listener) -> None:
        self.request = request
        self.submitted = time.perf_counter()
        self.stats = RapidStats(prompt_tokens=len(request.target_tokens))
        self.sequence: SequenceState | None = None
        self.readers: list[Reader] = []
        self.prefill_tokens = 0
        self.decode_started = 0.0
        self.prompts_key = b""
        self.question_agreement: float | None = None
        self._listener = listener
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop generating. Memory is freed within one round, and no further event is emitted. Idempotent."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called, or the listener failed."""
        return self._cancelled.is_set()

    @property
    def expired(self) -> bool:
        """Whether the request has passed its time limit."""
        return time.perf_counter() > self.deadline

    @property
    def deadline(self) -> float:
        """The end of its time limit, by :func:`time.perf_counter`; infinite without a limit."""
        limit = self.request.timeout_s
        return math.inf if limit is None else self.submitted + limit

    @property
    def num_unread(self) -> int:
        """The number of prompt tokens that the models have not read yet."""
        return sum(reader.num_unread for reader in self.readers)

    def emit(self, event: Event) -> None:
        """Call the listener. If it raises (its event loop may be closed), the request is cancelled."""
        if self.cancelled:
            return
        try:
            with panics_as_errors():
                self._listener(event)
        except Exception:
            self.cancel()


class RequestQueue:
    """Requests that wait to be admitted. Every method may be called from any thread.

    Args:
        max_requests: Upper limit on waiting requests.
    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._waiting: deque[RequestHandle] = deque()
        self._closed = False
        self.changed = threading.Condition()

    @property
    def closed(self) -> bool:
        """Whether no further request is taken."""
        return self._closed

    def put(self, handle: RequestHandle) -> None:
        """Add a request.

        Raises:
            EngineClosedError: The queue is closed.
            QueueFullError: Too many requests wait.
        """
        with self.changed:
            if self._closed:
                raise EngineClosedError("the engine is closed: make a new pipeline.")
            if len(self._waiting) >= self._max_requests:
                raise QueueFullError(
                    f"{len(self._waiting):,} requests wait, the most this engine queues. Wait for some to "
                    "end, or raise max_queued_requests."
                )
            self._waiting.append(handle)
            self.changed.notify()

    def close(self) -> None:
        """Take no further request, and wake the worker. Idempotent."""
        with self.changed:
            self._closed = True
            self.changed.notify()

    def notify(self) -> None:
        """Wake the worker: something outside the queue has changed."""
        with self.changed:
            self.changed.notify()

    def take(self, max_requests: int) -> list[RequestHandle]:
        """Remove the first requests, at most ``max_requests``."""
        with self.changed:
            return [self._waiting.popleft() for _ in range(min(max_requests, len(self._waiting)))]

    def take_ended(self) -> list[RequestHandle]:
        """Remove the requests that were cancelled or have expired while they waited."""
        with self.changed:
            ended = [handle for handle in self._waiting if handle.cancelled or handle.expired]
            for handle in ended:
                self._waiting.remove(handle)
            return ended

    @property
    def first_deadline(self) -> float:
        """The earliest deadline of a waiting request, by :func:`time.perf_counter`; infinite without one."""
        with self.changed:
            return min((handle.deadline for handle in self._waiting), default=math.inf)

    def __len__(self) -> int:
        return len(self._waiting)
