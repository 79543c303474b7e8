"""The engine: a queue, one worker thread that owns the models, and a stream of events per request.

One turn of the worker: admit → read a chunk of waiting prompts → one round for everybody who decodes.
Requests join and leave between rounds. Those whose prompts begin like a file in the folder of prefixes wait
beside them while another thread loads it, once. An exception fails its own request only; memory that runs
out frees the store of prefixes and is tried once more.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Literal, TypeVar

import numpy as np
import torch

from rapid_integrations.config import EngineLimits, SamplingParams, SpeculationParams
from rapid_integrations.engine.adaptive_transfer import grounding
from rapid_integrations.engine.constraint import TokenConstraint
from rapid_integrations.engine.draft_length import AcceptanceByConfidence, DraftLength
from rapid_integrations.engine.graphs import GraphedPasses
from rapid_integrations.engine.kv import PrefixStore, SequenceKV
from rapid_integrations.engine.model import CausalModel
from rapid_integrations.engine.prefix_folder import PrefixFolder
from rapid_integrations.engine.sampling import Sampler
from rapid_integrations.engine.shared_prefill import Load, Reader, SharedPrefill, read_together
from rapid_integrations.engine.speculation import Decoding, SpeculativeDecoder, Track
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import (
    ContextLengthError,
    DeadlineExceededError,
    EngineClosedError,
    EngineMemoryError,
    GenerationError,
    PromptError,
    QueueFullError,
    RapidError,
    VocabularyMismatchError,
)

_T = TypeVar("_T")
_Part = TypeVar("_Part")

# A question's length, and what a template has behind it: of the tokens in which a request's prompts end, so
# many tell whether the drafter has read what they are about.
_MOST_ENDING = 64
# From which grounding on a drafter counts as having read it; for how many pairs of prompts it is remembered;
# and of how many tokens in all, at most, a pass gives the logits that tell it.
_GROUNDED = 0.5
_MOST_GROUNDINGS = 4096
_MOST_NOTED = 4 * _MOST_ENDING

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


class Ticket:
    """A submitted request, as its owner holds it."""

    def __init__(self, request: Request, listener: Listener) -> None:
        self.request = request
        self.submitted = time.perf_counter()
        self.stats = RapidStats(prompt_tokens=len(request.target_tokens))
        self.decoding: Decoding | None = None
        self.readers: list[Reader] = []
        self.prefill_total = 0
        self.decode_started = 0.0
        # How far the drafter has read what the question is about, where that is remembered of equal prompts,
        # and the key that it is remembered by: empty where it does not matter.
        self.grounding: float | None = None
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

    def tell(self, event: Event) -> None:
        """Hand an event to the owner; an owner that raises is gone (a closed event loop), and so cancels."""
        if self.cancelled:
            return
        try:
            with _panics_are_errors():
                self._listener(event)
        except Exception:
            self.cancel()


class Engine:
    """Serves requests on one target and one drafter.

    Args:
        target: The target model.
        drafter: The drafter; the same object as ``target`` for self-speculation; ``None`` decodes plainly.
        limits: What the engine may take of the machine.

    Raises:
        VocabularyMismatchError: The models' vocabularies are of plainly different size.
        ConfigurationError: ``limits.prefix_cache_dir`` cannot be used.
    """

    # Embedding matrices of one vocabulary are padded to different multiples; more than this is another one.
    _PADDING = 1024

    def __init__(
        self, target: CausalModel, drafter: CausalModel | None, *, limits: EngineLimits | None = None
    ) -> None:
        if drafter is not None and abs(target.vocab_size - drafter.vocab_size) > self._PADDING:
            raise VocabularyMismatchError(
                f"target '{target.name}' has {target.vocab_size:,} tokens, drafter '{drafter.name}' "
                f"{drafter.vocab_size:,}: they must share one vocabulary. Choose a drafter of its family."
            )
        self.target = target
        self.drafter = drafter
        self.limits = limits or EngineLimits()
        self.store = PrefixStore(self.limits.prefix_cache_bytes, self._prefix_folder())
        self._shared = SharedPrefill(self.store)
        graphs = None
        if drafter is not None and self.limits.cuda_graph_tokens:
            graphs = GraphedPasses(drafter, self.limits.cuda_graph_tokens)
        self._decoder = SpeculativeDecoder(target, drafter, graphs)
        # Apart for requests with a constraint, whose mask makes drafts stand that else would not; and by
        # whether the drafter has read what they are about, ``None`` where nobody looks.
        self._acceptance: defaultdict[tuple[bool, bool | None], AcceptanceByConfidence] = defaultdict(
            AcceptanceByConfidence
        )
        self._groundings: OrderedDict[bytes, float] = OrderedDict()
        self._chunk_tokens = self.limits.prefill_chunk_tokens
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="rapid-loader")
        self._queue: deque[Ticket] = deque()
        self._prefilling: deque[Ticket] = deque()
        self._active: list[Ticket] = []
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Queue a request.

        Args:
            request: What to generate.
            listener: Called with every event, in order, in the worker thread: it must return at once.

        Returns:
            A ticket to cancel with.

        Raises:
            PromptError: A prompt is empty.
            ContextLengthError: A prompt and the tokens asked for do not fit its model.
            QueueFullError: Too many requests wait.
            EngineClosedError: The engine is closed.
        """
        self._check_fits("prompt", request.target_tokens, self.target, request.sampling.max_new_tokens)
        if request.drafter_tokens is not None:
            drafter = self.drafter or self.target
            self._check_fits(
                "drafter's prompt", request.drafter_tokens, drafter, request.sampling.max_new_tokens
            )
        ticket = Ticket(request, listener)
        with self._wake:
            if self._closed:
                raise EngineClosedError("the engine is closed: make a new pipeline.")
            if len(self._queue) >= self.limits.max_queued_requests:
                raise QueueFullError(
                    f"{len(self._queue):,} requests wait, the most this engine queues. Wait for some to end, "
                    "or raise max_queued_requests."
                )
            self._queue.append(ticket)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="rapid-engine", daemon=True)
                self._thread.start()
            self._wake.notify()
        return ticket

    def close(self) -> None:
        """Fail what is still running, end the worker, and wait for the files in hand. Idempotent."""
        with self._wake:
            self._closed = True
            self._wake.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    @property
    def vocab_size(self) -> int:
        """How many tokens both models know, padding included."""
        return self._decoder.vocab_size

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests: it was closed, or its worker broke."""
        return self._closed

    @property
    def num_running(self) -> int:
        """Requests that hold memory of their own: being loaded, read or decoded."""
        return len(self._prefilling) + len(self._active)

    def _prefix_folder(self) -> PrefixFolder | None:
        if self.limits.prefix_cache_dir is None:
            return None
        return PrefixFolder(
            self.limits.prefix_cache_dir,
            {model for model in (self.target, self.drafter) if model is not None},
            budget_bytes=self.limits.prefix_cache_dir_bytes,
            waiting_bytes=self.limits.prefix_cache_bytes,
        )

    @staticmethod
    def _check_fits(what: str, tokens: Sequence[int], model: CausalModel, max_new_tokens: int) -> None:
        if not tokens:
            raise PromptError(f"the {what} is empty: it needs at least one token.")
        allowed = model.context_window - max_new_tokens
        if len(tokens) > allowed:
            raise ContextLengthError(
                f"the {what} has {len(tokens):,} tokens; '{model.name}' takes {max(allowed, 0):,} "
                f"({model.context_window:,} less max_new_tokens={max_new_tokens:,}). Shorten the context or "
                "lower max_new_tokens."
            )

    # The worker ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _work(self) -> None:
        error = EngineClosedError("the engine was closed while the request ran.")
        try:
            while self._admit():
                if self._prefilling:
                    self._prefill()
                if self._active:
                    self._decode()
        except BaseException as failure:
            # A fault of the engine itself, or an exit: nobody may be left waiting.
            error = EngineClosedError(f"the engine stopped: {type(failure).__name__}: {failure}.")
            error.__cause__ = failure
            with self._wake:
                self._closed = True
            if not isinstance(failure, Exception):
                raise
        finally:
            self._abandon(error)

    def _abandon(self, error: RapidError) -> None:
        """Fail everybody."""
        for ticket in [*self._queue, *self._prefilling, *self._active]:
            ticket.decoding = None
            ticket.readers = []
            ticket.tell(Failed(error))
        for group in (self._queue, self._prefilling, self._active):
            group.clear()
        self._loader.shutdown(cancel_futures=True)
        self._shared = SharedPrefill(self.store)
        self.store.clear()
        self.store.close()

    def _admit(self) -> bool:
        """Let ended requests go and waiting ones in; sleep while there is nothing to do. False: closed."""
        with self._wake:
            if not self._has_work():
                self._wake.wait(self._time_left())
            if self._closed:
                return False
            admitted: list[Ticket] = []
            while self._queue and self.num_running + len(admitted) < self.limits.max_active_requests:
                admitted.append(self._queue.popleft())
            waiting = [ticket for ticket in self._queue if ticket.cancelled or ticket.expired]
            for ticket in waiting:
                self._queue.remove(ticket)
        # Before anybody starts: who was cancelled for the sake of the next one leaves it a prefix.
        for ticket in [*self._prefilling, *self._active, *waiting]:
            self._drop_if_ended(ticket)
        self._shared.take_left()
        for ticket in list(self._prefilling):
            if loaded := [reader for reader in ticket.readers if reader.loaded]:
                self._begin(ticket, loaded)
        for ticket in admitted:
            if not self._drop_if_ended(ticket):
                self._prefilling.append(ticket)
                try:
                    self._with_memory(lambda ticket=ticket: self._start(ticket))  # type: ignore[misc]
                    self._order_loads(ticket)
                except Exception as error:
                    self._fail(ticket, error)
                else:
                    self._begin(ticket, [reader for reader in ticket.readers if reader.load is None])
        return True

    def _has_work(self) -> bool:
        """Whether there is anything to do but wait."""
        return bool(
            self._closed
            or self._active
            or (self._queue and self.num_running < self.limits.max_active_requests)
            or (self._prefilling and not self._shared.loads)
            or self._shared.loaded
            or not all(self._shared.must_wait(ticket.readers) for ticket in self._prefilling)
        )

    def _time_left(self) -> float:
        """Seconds until the first of those who wait runs out of time."""
        first = min((ticket.deadline for ticket in [*self._queue, *self._prefilling]), default=math.inf)
        return min(max(first - time.perf_counter(), 0.0), threading.TIMEOUT_MAX)

    def _prompts(self, request: Request) -> list[tuple[CausalModel, Sequence[int]]]:
        """Which model reads what, the target first."""
        prompts = [(self.target, request.target_tokens)]
        drafts = request.speculation.num_draft_tokens != 0
        if self.drafter is not None and request.drafter_tokens is not None and drafts:
            prompts.append((self.drafter, request.drafter_tokens))
        return prompts

    def _wake_worker(self, _: object) -> None:
        with self._wake:
            self._wake.notify()

    def _start(self, ticket: Ticket) -> None:
        """Let a request read its prompts beside the others."""
        request = ticket.request
        readers = [
            self._reader(model, prompt, request.sampling.max_new_tokens)
            for model, prompt in self._prompts(request)
        ]
        if len(readers) > 1:
            ticket.stats.drafter_prompt_tokens = len(readers[1].track.tokens)
            if request.speculation.heeds_grounding:
                ticket.prompts_key = _key_of(readers)
                ticket.grounding = self._groundings.get(ticket.prompts_key)
                if ticket.grounding is None:
                    ending = _shared_ending(*(reader.track.tokens for reader in readers))
                    for reader in readers:
                        reader.ending = ending
        ticket.readers = readers
        self._shared.join(readers)

    def _decoding(self, ticket: Ticket) -> Decoding:
        """A request whose prompts are read, before its first round."""
        request = ticket.request
        target, drafter = ticket.readers[0], ticket.readers[1] if len(ticket.readers) > 1 else None
        agreed, grounded = 1.0, None
        if drafter is not None and ticket.prompts_key:
            known = ticket.grounding
            agreed = grounding(target.ending_probs, drafter.ending_probs) if known is None else known
            grounded = agreed >= _GROUNDED
            ticket.stats.grounding = agreed
            self._remember(ticket.prompts_key, agreed)
        return Decoding(
            target=target.track,
            drafter=None if drafter is None else drafter.track,
            sampler=Sampler(request.sampling, self.target.device),
            sampling=request.sampling,
            speculation=request.speculation,
            draft_length=DraftLength(
                request.speculation.num_draft_tokens,
                request.speculation.max_draft_tokens,
                self._decoder.costs,
                self._acceptance[request.constraint is not None, grounded],
            ),
            eos_token_ids=frozenset() if request.sampling.ignore_eos else self.target.eos_token_ids,
            stats=ticket.stats,
            grounding=agreed,
            constraint=request.constraint,
        )

    def _remember(self, key: bytes, agreed: float) -> None:
        """Keep a grounding for the next request with these prompts, so that it need not read them again."""
        self._groundings[key] = agreed
        self._groundings.move_to_end(key)
        if len(self._groundings) > _MOST_GROUNDINGS:
            self._groundings.popitem(last=False)

    def _order_loads(self, ticket: Ticket) -> None:
        """Have the loader fetch what the folder has of a request's prompts and nobody else has or awaits."""
        for reader in ticket.readers:
            found = self.store.in_folder(
                reader.model,
                reader.prefix,
                known_tokens=self._shared.coming(reader),
                capacity=reader.capacity,
            )
            if found is not None:
                reader.load = Load(found.length, self._loader.submit(found.load))
                reader.load.cache.add_done_callback(self._wake_worker)

    def _begin(self, ticket: Ticket, readers: Sequence[Reader]) -> None:
        """Let some of a request's readers begin with a known prefix, where there is one."""
        try:
            for reader in readers:
                self._with_memory(lambda reader=reader: self._take_known(reader))  # type: ignore[misc]
        except Exception as error:
            self._fail(ticket, error)
            return
        for reader in readers:
            if reader is ticket.readers[0]:
                ticket.stats.reused_prefix_tokens = reader.position
            else:
                ticket.stats.reused_drafter_prefix_tokens = reader.position
        ticket.prefill_total = ticket.num_unread

    def _take_known(self, reader: Reader) -> None:
        """Begin with what was loaded, or else with what the store has."""
        if reader.load is not None:
            reader.take_loaded()
        if not reader.position:
            cache = self.store.take(reader.model, reader.prefix, capacity=reader.capacity)
            reader.track.cache = cache or reader.track.cache

    @staticmethod
    def _reader(model: CausalModel, prompt: Sequence[int], max_new_tokens: int) -> Reader:
        capacity = len(prompt) + max_new_tokens
        track = Track(list(prompt), SequenceKV(capacity))
        # The last prompt token is read by the first round.
        return Reader(model, track, np.asarray(prompt[:-1], dtype=np.int64), capacity=capacity)

    def _drop_if_ended(self, ticket: Ticket) -> bool:
        """Let go of a request that was cancelled or ran out of time; whether it was."""
        if ticket.cancelled:
            self._release(ticket)
        elif ticket.expired:
            limit = ticket.request.timeout_s
            self._fail(
                ticket,
                DeadlineExceededError(
                    f"the request ran past timeout_s={limit:g}. Allow more time or ask for fewer tokens."
                ),
            )
        else:
            return False
        return True

    def _prefill(self) -> None:
        """Read a chunk in one pass."""
        started = time.perf_counter()
        together = self._next_to_read()
        for tickets, _ in self._passes(together, lambda readers: read_together(readers, self._chunk_tokens)):
            elapsed, started = time.perf_counter() - started, time.perf_counter()
            for ticket in tickets:
                ticket.stats.prefill_s += elapsed
                self._has_read(ticket)

    def _next_to_read(self) -> list[tuple[Ticket, Reader]]:
        """Who reads next: the one that has waited longest, and those beside it whose rest fits into a chunk.

        Who must wait for others or for a file is passed over.
        """
        chosen: list[tuple[Ticket, Reader]] = []
        room = self._chunk_tokens
        for ticket in list(self._prefilling):
            if room <= 0:
                break
            if self._shared.must_wait(ticket.readers):
                continue
            try:
                reader = self._with_memory(lambda ticket=ticket: self._catch_up(ticket))  # type: ignore[misc]
            except Exception as error:
                self._fail(ticket, error)
                continue
            if reader is None:
                # It came forward without reading.
                self._has_read(ticket)
                continue
            beside = [other for _, other in chosen]
            if not beside or (
                reader.model is beside[0].model
                and reader.num_unread <= room
                and reader.ending + sum(other.ending for other in beside) <= _MOST_NOTED
                and not self._shared.is_read_by(beside, reader)
            ):
                chosen.append((ticket, reader))
                room -= reader.num_unread
        return chosen

    def _catch_up(self, ticket: Ticket) -> Reader | None:
        """Take over what others have read; the one of its models that is to read on, the target first."""
        for reader in ticket.readers:
            taken_over = self._shared.catch_up(reader)
            if reader is ticket.readers[0]:
                ticket.stats.reused_prefix_tokens += taken_over
            else:
                ticket.stats.reused_drafter_prefix_tokens += taken_over
            if reader.num_unread:
                # It may be its turn only now.
                waits = reader is not ticket.readers[0] and self._shared.must_wait(ticket.readers)
                return None if waits else reader
        return None

    def _has_read(self, ticket: Ticket) -> None:
        """Let a request read on in its turn, or decode when its prompts are read."""
        waited = time.perf_counter() - ticket.submitted - ticket.stats.prefill_s
        ticket.stats.queue_s = ticket.stats.queue_s or waited
        self._prefilling.remove(ticket)
        left = ticket.num_unread
        try:
            if not left:
                ticket.decoding = self._with_memory(lambda: self._decoding(ticket))
        except Exception as error:
            self._fail(ticket, error)
            return
        ticket.tell(Prefilled(ticket.prefill_total - left, ticket.prefill_total))
        if left:
            self._prefilling.append(ticket)
        else:
            ticket.decode_started = time.perf_counter()
            self._active.append(ticket)

    def _decode(self) -> None:
        """One round for everybody."""
        batch = [(ticket, ticket.decoding) for ticket in self._active if ticket.decoding is not None]
        for tickets, emitted in self._passes(batch, self._decoder.round):
            for ticket, tokens in zip(tickets, emitted, strict=True):
                self._deliver(ticket, tokens)

    def _passes(
        self, parts: Sequence[tuple[Ticket, _Part]], run: Callable[[list[_Part]], _T]
    ) -> Iterator[tuple[list[Ticket], _T]]:
        """Run a pass for everybody; one that fails is repeated one by one to find whose fault it is.

        Args:
            parts: Who takes part, and what of theirs.
            run: The pass.

        Yields:
            Those whom a pass was for, and what came of it. Who fails alone is told so.
        """
        alone = [[part] for part in parts]
        for group in [list(parts), *alone] if len(parts) > 1 else alone:
            tickets, theirs = [ticket for ticket, _ in group], [part for _, part in group]
            try:
                outcome = self._with_memory(lambda theirs=theirs: run(theirs))  # type: ignore[misc]
            except Exception as error:
                if len(group) == 1:
                    self._fail(tickets[0], error)
                continue
            yield tickets, outcome
            if len(group) > 1:
                return

    def _deliver(self, ticket: Ticket, tokens: list[int]) -> None:
        """Tell the owner of new tokens, and of the end where they bring it."""
        decoding, stats = ticket.decoding, ticket.stats
        assert decoding is not None
        if not stats.time_to_first_token_s:
            stats.time_to_first_token_s = time.perf_counter() - ticket.submitted
        reason: FinishReason | None = None
        shown: list[int] = []
        for index, token in enumerate(tokens, start=1):
            if token in decoding.eos_token_ids:
                reason = "stop"
            else:
                shown.append(token)
                matcher = ticket.request.stop_matcher
                try:
                    with _panics_are_errors():
                        matched = matcher is not None and matcher(token)
                except Exception as error:
                    self._fail(ticket, error)
                    return
                if matched:
                    reason = "stop"
            if reason:
                stats.completion_tokens -= len(tokens) - index
                stats.token_sources = stats.token_sources[: stats.completion_tokens]
                break
        if reason is None and decoding.num_emitted >= decoding.sampling.max_new_tokens:
            reason = "length"
        if shown:
            ticket.tell(NewTokens(tuple(shown)))
        if reason:
            ended = time.perf_counter()
            stats.decode_s = ended - ticket.decode_started
            stats.total_s = ended - ticket.submitted
            self._release(ticket)
            ticket.tell(Finished(reason, stats))

    def _release(self, ticket: Ticket, *, keep: bool = True) -> None:
        """Take a request out and, if told to, keep its KV for the next one."""
        ticket.decoding = None
        # Its owner may hold the ticket until a whole batch has ended, and a constraint has masks.
        ticket.request = replace(ticket.request, constraint=None)
        readers, ticket.readers = ticket.readers, []
        if readers:
            self._shared.leave(readers, keep=keep)
        if ticket in self._active:
            self._active.remove(ticket)
        elif ticket in self._prefilling:
            self._prefilling.remove(ticket)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        # What a pass that failed has read may be what made it fail, or what memory lacks.
        self._release(ticket, keep=isinstance(error, DeadlineExceededError))
        if not isinstance(error, RapidError):
            wrapped = GenerationError(f"the engine failed on this request: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            error = wrapped
        ticket.tell(Failed(error))

    def _with_memory(self, run: Callable[[], _T]) -> _T:
        """Run a pass; when memory runs out free the store, halve the prefill chunk, and try once more."""
        for attempt in itertools.count():
            try:
                with _panics_are_errors():
                    return run()
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                if attempt:
                    raise EngineMemoryError(
                        f"out of memory, also after the cached prefixes were freed: {error}. Shorten the "
                        "context, lower max_active_requests, or use a smaller dtype."
                    ) from error
            self._shared.clear()
            self._chunk_tokens = max(1, self._chunk_tokens // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        raise AssertionError("unreachable")


def _key_of(readers: Sequence[Reader]) -> bytes:
    """A digest of what they read."""
    digest = blake2b()
    for reader in readers:
        digest.update(np.array([reader.prompt.size, reader.track.tokens[-1]], dtype=np.int64).data)
        digest.update(reader.prompt.data)
    return digest.digest()


def _shared_ending(left: list[int], right: list[int]) -> int:
    """How many tokens both prompts end in, at most the most that are looked at, but for the first.

    What stands before that one differs, so that it says nothing. 0 where the prompts are equal: who has read
    the same lacks nothing.
    """
    if left == right:
        return 0
    most = min(_MOST_ENDING + 1, len(left), len(right))
    pairs = zip(left[: -most - 1 : -1], right[: -most - 1 : -1], strict=True)
    return max(0, next((place for place, (one, other) in enumerate(pairs) if one != other), most) - 1)


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


def _out_of_memory(error: Exception) -> bool:
    # The CPU allocator has no exception type of its own.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
