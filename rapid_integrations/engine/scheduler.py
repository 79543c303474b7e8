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
from dataclasses import replace
from hashlib import blake2b
from typing import TypeVar

import numpy as np
import torch

from rapid_integrations.config import EngineLimits
from rapid_integrations.engine.cache.disk_cache import DiskPrefixCache
from rapid_integrations.engine.cache.model_state import ModelState
from rapid_integrations.engine.cache.prefix_cache import PrefixCache
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.cache.shared_prefill import Load, Reader, SharedPrefill
from rapid_integrations.engine.decoding.draft_length import AcceptanceByConfidence, DraftLength
from rapid_integrations.engine.decoding.round import SpeculativeDecoder
from rapid_integrations.engine.decoding.sampling import Sampler
from rapid_integrations.engine.decoding.sequence import SequenceState
from rapid_integrations.engine.decoding.transfer import question_agreement
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.model.cuda_graphs import GraphedPasses
from rapid_integrations.engine.prefill import read_together
from rapid_integrations.engine.requests import (
    Failed,
    Finished,
    FinishReason,
    Listener,
    NewTokens,
    Prefilled,
    Request,
    RequestHandle,
    _panics_are_errors,
)
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
# From this question agreement on, the drafter's context counts as covering the question. The agreement is
# kept for so many pairs of prompts, and one pass returns logits for at most so many tokens of prompt endings.
_MIN_QUESTION_AGREEMENT = 0.5
_MAX_QUESTION_AGREEMENTS = 4096
_MOST_NOTED = 4 * _MOST_ENDING


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
        self.store = PrefixCache(self.limits.prefix_cache_bytes, self._prefix_folder())
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
        self._question_agreements: OrderedDict[bytes, float] = OrderedDict()
        self._chunk_tokens = self.limits.prefill_chunk_tokens
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="rapid-loader")
        self._queue: deque[RequestHandle] = deque()
        self._prefilling: deque[RequestHandle] = deque()
        self._active: list[RequestHandle] = []
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, request: Request, listener: Listener) -> RequestHandle:
        """Queue a request.

        Args:
            request: What to generate.
            listener: Called with every event, in order, in the worker thread: it must return at once.

        Returns:
            A handle to cancel with.

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
        handle = RequestHandle(request, listener)
        with self._wake:
            if self._closed:
                raise EngineClosedError("the engine is closed: make a new pipeline.")
            if len(self._queue) >= self.limits.max_queued_requests:
                raise QueueFullError(
                    f"{len(self._queue):,} requests wait, the most this engine queues. Wait for some to end, "
                    "or raise max_queued_requests."
                )
            self._queue.append(handle)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="rapid-engine", daemon=True)
                self._thread.start()
            self._wake.notify()
        return handle

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

    def _prefix_folder(self) -> DiskPrefixCache | None:
        if self.limits.prefix_cache_dir is None:
            return None
        return DiskPrefixCache(
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
        for handle in [*self._queue, *self._prefilling, *self._active]:
            handle.decoding = None
            handle.readers = []
            handle.emit(Failed(error))
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
            admitted: list[RequestHandle] = []
            while self._queue and self.num_running + len(admitted) < self.limits.max_active_requests:
                admitted.append(self._queue.popleft())
            waiting = [handle for handle in self._queue if handle.cancelled or handle.expired]
            for handle in waiting:
                self._queue.remove(handle)
        # Before anybody starts: who was cancelled for the sake of the next one leaves it a prefix.
        for handle in [*self._prefilling, *self._active, *waiting]:
            self._drop_if_ended(handle)
        self._shared.take_left()
        for handle in list(self._prefilling):
            if loaded := [reader for reader in handle.readers if reader.loaded]:
                self._begin(handle, loaded)
        for handle in admitted:
            if not self._drop_if_ended(handle):
                self._prefilling.append(handle)
                try:
                    self._with_memory(lambda handle=handle: self._start(handle))  # type: ignore[misc]
                    self._order_loads(handle)
                except Exception as error:
                    self._fail(handle, error)
                else:
                    self._begin(handle, [reader for reader in handle.readers if reader.load is None])
        return True

    def _has_work(self) -> bool:
        """Whether there is anything to do but wait."""
        return bool(
            self._closed
            or self._active
            or (self._queue and self.num_running < self.limits.max_active_requests)
            or (self._prefilling and not self._shared.loads)
            or self._shared.loaded
            or not all(self._shared.must_wait(handle.readers) for handle in self._prefilling)
        )

    def _time_left(self) -> float:
        """Seconds until the first of those who wait runs out of time."""
        first = min((handle.deadline for handle in [*self._queue, *self._prefilling]), default=math.inf)
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

    def _start(self, handle: RequestHandle) -> None:
        """Let a request read its prompts beside the others."""
        request = handle.request
        readers = [
            self._reader(model, prompt, request.sampling.max_new_tokens)
            for model, prompt in self._prompts(request)
        ]
        if len(readers) > 1:
            handle.stats.drafter_prompt_tokens = len(readers[1].track.tokens)
            if request.speculation.uses_question_agreement:
                handle.prompts_key = _key_of(readers)
                handle.question_agreement = self._question_agreements.get(handle.prompts_key)
                if handle.question_agreement is None:
                    ending = _shared_ending(*(reader.track.tokens for reader in readers))
                    for reader in readers:
                        reader.ending = ending
        handle.readers = readers
        self._shared.join(readers)

    def _decoding(self, handle: RequestHandle) -> SequenceState:
        """A request whose prompts are read, before its first round."""
        request = handle.request
        target, drafter = handle.readers[0], handle.readers[1] if len(handle.readers) > 1 else None
        agreed, grounded = 1.0, None
        if drafter is not None and handle.prompts_key:
            known = handle.question_agreement
            agreed = question_agreement(target.ending_probs, drafter.ending_probs) if known is None else known
            grounded = agreed >= _MIN_QUESTION_AGREEMENT
            handle.stats.question_agreement = agreed
            self._remember(handle.prompts_key, agreed)
        return SequenceState(
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
            stats=handle.stats,
            question_agreement=agreed,
            constraint=request.constraint,
        )

    def _remember(self, key: bytes, agreed: float) -> None:
        """Keep the question agreement of two prompts, so that the next request skips computing it."""
        self._question_agreements[key] = agreed
        self._question_agreements.move_to_end(key)
        if len(self._question_agreements) > _MAX_QUESTION_AGREEMENTS:
            self._question_agreements.popitem(last=False)

    def _order_loads(self, handle: RequestHandle) -> None:
        """Have the loader fetch what the folder has of a request's prompts and nobody else has or awaits."""
        for reader in handle.readers:
            found = self.store.in_folder(
                reader.model,
                reader.prefix,
                known_tokens=self._shared.coming(reader),
                capacity=reader.capacity,
            )
            if found is not None:
                reader.load = Load(found.length, self._loader.submit(found.load))
                reader.load.cache.add_done_callback(self._wake_worker)

    def _begin(self, handle: RequestHandle, readers: Sequence[Reader]) -> None:
        """Let some of a request's readers begin with a known prefix, where there is one."""
        try:
            for reader in readers:
                self._with_memory(lambda reader=reader: self._take_known(reader))  # type: ignore[misc]
        except Exception as error:
            self._fail(handle, error)
            return
        for reader in readers:
            if reader is handle.readers[0]:
                handle.stats.reused_prefix_tokens = reader.position
            else:
                handle.stats.reused_drafter_prefix_tokens = reader.position
        handle.prefill_total = handle.num_unread

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
        track = ModelState(list(prompt), SequenceKV(capacity))
        # The last prompt token is read by the first round.
        return Reader(model, track, np.asarray(prompt[:-1], dtype=np.int64), capacity=capacity)

    def _drop_if_ended(self, handle: RequestHandle) -> bool:
        """Let go of a request that was cancelled or ran out of time; whether it was."""
        if handle.cancelled:
            self._release(handle)
        elif handle.expired:
            limit = handle.request.timeout_s
            self._fail(
                handle,
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
        for handles, _ in self._passes(together, lambda readers: read_together(readers, self._chunk_tokens)):
            elapsed, started = time.perf_counter() - started, time.perf_counter()
            for handle in handles:
                handle.stats.prefill_s += elapsed
                self._has_read(handle)

    def _next_to_read(self) -> list[tuple[RequestHandle, Reader]]:
        """Who reads next: the one that has waited longest, and those beside it whose rest fits into a chunk.

        Who must wait for others or for a file is passed over.
        """
        chosen: list[tuple[RequestHandle, Reader]] = []
        room = self._chunk_tokens
        for handle in list(self._prefilling):
            if room <= 0:
                break
            if self._shared.must_wait(handle.readers):
                continue
            try:
                reader = self._with_memory(lambda handle=handle: self._catch_up(handle))  # type: ignore[misc]
            except Exception as error:
                self._fail(handle, error)
                continue
            if reader is None:
                # It came forward without reading.
                self._has_read(handle)
                continue
            beside = [other for _, other in chosen]
            if not beside or (
                reader.model is beside[0].model
                and reader.num_unread <= room
                and reader.ending + sum(other.ending for other in beside) <= _MOST_NOTED
                and not self._shared.is_read_by(beside, reader)
            ):
                chosen.append((handle, reader))
                room -= reader.num_unread
        return chosen

    def _catch_up(self, handle: RequestHandle) -> Reader | None:
        """Take over what others have read; the one of its models that is to read on, the target first."""
        for reader in handle.readers:
            taken_over = self._shared.catch_up(reader)
            if reader is handle.readers[0]:
                handle.stats.reused_prefix_tokens += taken_over
            else:
                handle.stats.reused_drafter_prefix_tokens += taken_over
            if reader.num_unread:
                # It may be its turn only now.
                waits = reader is not handle.readers[0] and self._shared.must_wait(handle.readers)
                return None if waits else reader
        return None

    def _has_read(self, handle: RequestHandle) -> None:
        """Let a request read on in its turn, or decode when its prompts are read."""
        waited = time.perf_counter() - handle.submitted - handle.stats.prefill_s
        handle.stats.queue_s = handle.stats.queue_s or waited
        self._prefilling.remove(handle)
        left = handle.num_unread
        try:
            if not left:
                handle.decoding = self._with_memory(lambda: self._decoding(handle))
        except Exception as error:
            self._fail(handle, error)
            return
        handle.emit(Prefilled(handle.prefill_total - left, handle.prefill_total))
        if left:
            self._prefilling.append(handle)
        else:
            handle.decode_started = time.perf_counter()
            self._active.append(handle)

    def _decode(self) -> None:
        """One round for everybody."""
        batch = [(handle, handle.decoding) for handle in self._active if handle.decoding is not None]
        for handles, emitted in self._passes(batch, self._decoder.round):
            for handle, tokens in zip(handles, emitted, strict=True):
                self._deliver(handle, tokens)

    def _passes(
        self, parts: Sequence[tuple[RequestHandle, _Part]], run: Callable[[list[_Part]], _T]
    ) -> Iterator[tuple[list[RequestHandle], _T]]:
        """Run a pass for everybody; one that fails is repeated one by one to find whose fault it is.

        Args:
            parts: Who takes part, and what of theirs.
            run: The pass.

        Yields:
            Those whom a pass was for, and what came of it. Who fails alone is told so.
        """
        alone = [[part] for part in parts]
        for group in [list(parts), *alone] if len(parts) > 1 else alone:
            handles, theirs = [handle for handle, _ in group], [part for _, part in group]
            try:
                outcome = self._with_memory(lambda theirs=theirs: run(theirs))  # type: ignore[misc]
            except Exception as error:
                if len(group) == 1:
                    self._fail(handles[0], error)
                continue
            yield handles, outcome
            if len(group) > 1:
                return

    def _deliver(self, handle: RequestHandle, tokens: list[int]) -> None:
        """Tell the owner of new tokens, and of the end where they bring it."""
        decoding, stats = handle.decoding, handle.stats
        assert decoding is not None
        if not stats.time_to_first_token_s:
            stats.time_to_first_token_s = time.perf_counter() - handle.submitted
        reason: FinishReason | None = None
        shown: list[int] = []
        for index, token in enumerate(tokens, start=1):
            if token in decoding.eos_token_ids:
                reason = "stop"
            else:
                shown.append(token)
                matcher = handle.request.stop_matcher
                try:
                    with _panics_are_errors():
                        matched = matcher is not None and matcher(token)
                except Exception as error:
                    self._fail(handle, error)
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
            handle.emit(NewTokens(tuple(shown)))
        if reason:
            ended = time.perf_counter()
            stats.decode_s = ended - handle.decode_started
            stats.total_s = ended - handle.submitted
            self._release(handle)
            handle.emit(Finished(reason, stats))

    def _release(self, handle: RequestHandle, *, keep: bool = True) -> None:
        """Take a request out and, if told to, keep its KV for the next one."""
        handle.decoding = None
        # Its owner may hold the handle until a whole batch has ended, and a constraint has masks.
        handle.request = replace(handle.request, constraint=None)
        readers, handle.readers = handle.readers, []
        if readers:
            self._shared.leave(readers, keep=keep)
        if handle in self._active:
            self._active.remove(handle)
        elif handle in self._prefilling:
            self._prefilling.remove(handle)

    def _fail(self, handle: RequestHandle, error: Exception) -> None:
        # What a pass that failed has read may be what made it fail, or what memory lacks.
        self._release(handle, keep=isinstance(error, DeadlineExceededError))
        if not isinstance(error, RapidError):
            wrapped = GenerationError(f"the engine failed on this request: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            error = wrapped
        handle.emit(Failed(error))

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


def _out_of_memory(error: Exception) -> bool:
    # The CPU allocator has no exception type of its own.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
