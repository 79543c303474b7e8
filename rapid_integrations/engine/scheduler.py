"""The worker: one turn is admit → prefill a chunk → decode one round, for all running requests together.

Requests join and leave between turns. A request may wait for four reasons:

1. In the queue: ``max_active_requests`` are running (:meth:`Scheduler._admit`).
2. For a file: the beginning of its prompt is being loaded from disk by another thread
   (:meth:`~rapid_integrations.engine.prefill.Prefill.order_loads`).
3. For another prompt: another request is reading the same prefix right now
   (:meth:`~rapid_integrations.engine.cache.shared_prefill.SharedPrefill.must_wait`).
4. For its turn: prompts are read one chunk at a time, the longest-waiting first
   (:meth:`~rapid_integrations.engine.prefill.Prefill.choose`).

An exception fails its own request only. If memory runs out, cached prefixes are freed and the pass is
repeated once.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from rapid_integrations.config import EngineLimits
from rapid_integrations.engine.agreement import MIN_COVERED
from rapid_integrations.engine.cache.disk_cache import DiskPrefixCache
from rapid_integrations.engine.cache.prefix_cache import PrefixCache
from rapid_integrations.engine.cache.shared_prefill import Reader
from rapid_integrations.engine.decoding.draft_length import AcceptanceByConfidence, DraftLength
from rapid_integrations.engine.decoding.round import SpeculativeDecoder
from rapid_integrations.engine.decoding.sampling import Sampler
from rapid_integrations.engine.decoding.sequence import SequenceState
from rapid_integrations.engine.failures import as_generation_error, is_out_of_memory, panics_as_errors
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.model.cuda_graphs import GraphedPasses
from rapid_integrations.engine.prefill import Prefill
from rapid_integrations.engine.requests import (
    Failed,
    Finished,
    FinishReason,
    NewTokens,
    Prefilled,
    RequestHandle,
    RequestQueue,
)
from rapid_integrations.errors import (
    DeadlineExceededError,
    EngineClosedError,
    EngineMemoryError,
    RapidError,
)

_T = TypeVar("_T")
_Part = TypeVar("_Part")


class Scheduler:
    """Runs requests until its queue is closed. All methods belong to the worker thread.

    Args:
        target: The target model.
        drafter: The drafter; ``None`` for plain decoding.
        limits: Limits on memory and batch.
        queue: Where requests arrive.

    Attributes:
        prefix_cache: KV of requests that have ended.
        decoder: Runs the rounds.
    """

    def __init__(
        self, target: CausalModel, drafter: CausalModel | None, limits: EngineLimits, queue: RequestQueue
    ) -> None:
        self._target = target
        self._drafter = drafter
        self._limits = limits
        self._queue = queue
        self.prefix_cache = PrefixCache(limits.prefix_cache_bytes, self._open_disk_cache())
        graphs = None
        if drafter is not None and limits.cuda_graph_tokens:
            graphs = GraphedPasses(drafter, limits.cuda_graph_tokens)
        self.decoder = SpeculativeDecoder(target, drafter, graphs)
        self._prefill = Prefill(
            target,
            drafter,
            self.prefix_cache,
            chunk_tokens=limits.prefill_chunk_tokens,
            on_loaded=queue.notify,
        )
        # Acceptance is learnt apart by two conditions. A constraint's mask raises acceptance; and a drafter
        # whose context does not cover the question (None: not measured) lowers it.
        self._acceptance: defaultdict[tuple[bool, bool | None], AcceptanceByConfidence] = defaultdict(
            AcceptanceByConfidence
        )
        self._prefilling: deque[RequestHandle] = deque()
        self._decoding: list[RequestHandle] = []

    @property
    def num_running(self) -> int:
        """The number of requests that were admitted and have not ended."""
        return len(self._prefilling) + len(self._decoding)

    @torch.inference_mode()
    def run(self) -> None:
        """Serve requests until the queue is closed; then fail the remaining ones."""
        error = EngineClosedError("the engine was closed while the request ran.")
        try:
            while self._admit():
                if self._prefilling:
                    self._read_prompts()
                if self._decoding:
                    self._decode()
        except BaseException as failure:
            # A fault of the engine itself, or an exit of the interpreter: no owner may wait forever.
            error = EngineClosedError(f"the engine stopped: {type(failure).__name__}: {failure}.")
            error.__cause__ = failure
            if not isinstance(failure, Exception):
                raise
        finally:
            self._queue.close()
            self._fail_all(error)

    def _fail_all(self, error: RapidError) -> None:
        for handle in [*self._queue.take(len(self._queue)), *self._prefilling, *self._decoding]:
            handle.sequence = None
            handle.readers = []
            handle.emit(Failed(error))
        self._prefilling.clear()
        self._decoding.clear()
        self._prefill.close()

    def _open_disk_cache(self) -> DiskPrefixCache | None:
        limits = self._limits
        if limits.prefix_cache_dir is None:
            return None
        return DiskPrefixCache(
            limits.prefix_cache_dir,
            {model for model in (self._target, self._drafter) if model is not None},
            budget_bytes=limits.prefix_cache_dir_bytes,
            waiting_bytes=limits.prefix_cache_bytes,
        )

    # Admission -------------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Release ended requests and start waiting ones; sleep while there is nothing to do.

        Returns:
            False once the queue is closed.
        """
        with self._queue.changed:
            if not self._has_work():
                self._queue.changed.wait(self._seconds_to_first_deadline())
            if self._queue.closed:
                return False
            admitted = self._queue.take(self._limits.max_active_requests - self.num_running)
            ended = self._queue.take_ended()
        # First of all, so that a request finds the prefix that a cancelled one has left.
        for handle in [*self._prefilling, *self._decoding, *ended]:
            self._drop_if_ended(handle)
        self._prefill.shared.take_retained_loads()
        for handle in list(self._prefilling):
            if loaded := [reader for reader in handle.readers if reader.load_done]:
                self._begin(handle, loaded)
        for handle in admitted:
            if not self._drop_if_ended(handle):
                self._prefilling.append(handle)
                try:
                    self._with_memory(lambda handle=handle: self._prefill.start(handle))  # type: ignore[misc]
                    self._prefill.order_loads(handle)
                except Exception as error:
                    self._fail(handle, error)
                else:
                    self._begin(handle, [reader for reader in handle.readers if reader.load is None])
        return True

    def _has_work(self) -> bool:
        """Whether the next turn can do anything."""
        return bool(
            self._queue.closed
            or self._decoding
            or (len(self._queue) and self.num_running < self._limits.max_active_requests)
            or (self._prefilling and not self._prefill.shared.any_loading)
            or self._prefill.shared.any_load_done
            or not all(self._prefill.shared.must_wait(handle.readers) for handle in self._prefilling)
        )

    def _seconds_to_first_deadline(self) -> float:
        first = min([self._queue.first_deadline, *(handle.deadline for handle in self._prefilling)])
        return min(max(first - time.perf_counter(), 0.0), threading.TIMEOUT_MAX)

    def _begin(self, handle: RequestHandle, readers: Sequence[Reader]) -> None:
        """Start some of a request's readers from a cached prefix, where there is one."""
        try:
            for reader in readers:
                self._with_memory(lambda reader=reader: self._prefill.take_prefix(handle, reader))  # type: ignore[misc]
        except Exception as error:
            self._fail(handle, error)
        else:
            handle.prefill_tokens = handle.num_unread

    # Prefill ---------------------------------------------------------------------------------------------

    def _read_prompts(self) -> None:
        """Read one chunk of prompts in one pass."""
        started = time.perf_counter()
        parts = self._prefill.choose(list(self._prefilling), self._catch_up)
        for handles, _ in self._run_isolated(parts, self._prefill.read_chunk):
            elapsed, started = time.perf_counter() - started, time.perf_counter()
            for handle in handles:
                handle.stats.prefill_s += elapsed
                self._after_prefill(handle)

    def _catch_up(self, handle: RequestHandle) -> Reader | None:
        """Take over tokens that other requests have read.

        Returns:
            The reader that reads next; ``None`` if the request failed or has nothing to read in this turn.
        """
        try:
            reader = self._with_memory(lambda: self._prefill.catch_up(handle))
        except Exception as error:
            self._fail(handle, error)
            return None
        if reader is None:
            self._after_prefill(handle)
        return reader

    def _after_prefill(self, handle: RequestHandle) -> None:
        """Report progress; then let the request read on in its turn, or decode if its prompts are read."""
        waited = time.perf_counter() - handle.submitted - handle.stats.prefill_s
        handle.stats.queue_s = handle.stats.queue_s or waited
        self._prefilling.remove(handle)
        num_unread = handle.num_unread
        try:
            if not num_unread:
                handle.sequence = self._with_memory(lambda: self._make_sequence(handle))
        except Exception as error:
            self._fail(handle, error)
            return
        handle.emit(Prefilled(handle.prefill_tokens - num_unread, handle.prefill_tokens))
        if num_unread:
            self._prefilling.append(handle)
        else:
            handle.decode_started = time.perf_counter()
            self._decoding.append(handle)

    def _make_sequence(self, handle: RequestHandle) -> SequenceState:
        """The state of a request before its first round."""
        request = handle.request
        target, drafter = handle.readers[0], handle.readers[1] if len(handle.readers) > 1 else None
        agreement = handle.stats.question_agreement = self._prefill.question_agreement(handle)
        covered = None if agreement is None else agreement >= MIN_COVERED
        return SequenceState(
            target=target.state,
            drafter=None if drafter is None else drafter.state,
            sampler=Sampler(request.sampling, self._target.device),
            sampling=request.sampling,
            speculation=request.speculation,
            draft_length=DraftLength(
                request.speculation.num_draft_tokens,
                request.speculation.max_draft_tokens,
                self.decoder.costs,
                self._acceptance[request.constraint is not None, covered],
            ),
            eos_token_ids=frozenset() if request.sampling.ignore_eos else self._target.eos_token_ids,
            stats=handle.stats,
            question_agreement=1.0 if agreement is None else agreement,
            constraint=request.constraint,
        )

    # Decoding --------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """Run one round for all decoding requests."""
        batch = [(handle, handle.sequence) for handle in self._decoding if handle.sequence is not None]
        for handles, emitted in self._run_isolated(batch, self.decoder.round):
            for handle, tokens in zip(handles, emitted, strict=True):
                self._deliver(handle, tokens)

    def _deliver(self, handle: RequestHandle, tokens: list[int]) -> None:
        """Emit new tokens, and end the request at an end-of-sequence token, a stop string or its limit."""
        sequence, stats = handle.sequence, handle.stats
        assert sequence is not None
        if not stats.time_to_first_token_s:
            stats.time_to_first_token_s = time.perf_counter() - handle.submitted
        reason: FinishReason | None = None
        visible: list[int] = []
        for index, token in enumerate(tokens, start=1):
            if token in sequence.eos_token_ids:
                reason = "stop"
            else:
                visible.append(token)
                stop_matcher = handle.request.stop_matcher
                try:
                    with panics_as_errors():
                        matched = stop_matcher is not None and stop_matcher(token)
                except Exception as error:
                    self._fail(handle, error)
                    return
                if matched:
                    reason = "stop"
            if reason:
                stats.completion_tokens -= len(tokens) - index
                stats.token_sources = stats.token_sources[: stats.completion_tokens]
                break
        if reason is None and sequence.num_emitted >= sequence.sampling.max_new_tokens:
            reason = "length"
        if visible:
            handle.emit(NewTokens(tuple(visible)))
        if reason:
            ended = time.perf_counter()
            stats.decode_s = ended - handle.decode_started
            stats.total_s = ended - handle.submitted
            self._release(handle)
            handle.emit(Finished(reason, stats))

    # Ends and failures -----------------------------------------------------------------------------------

    def _drop_if_ended(self, handle: RequestHandle) -> bool:
        """Release a request that was cancelled or has expired; returns whether it was."""
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

    def _release(self, handle: RequestHandle, *, keep_cache: bool = True) -> None:
        """Remove a request; its KV goes to requests that need it, and then to the prefix cache."""
        handle.sequence = None
        # The owner may hold the handle for long, and a constraint holds masks.
        handle.request = replace(handle.request, constraint=None)
        readers, handle.readers = handle.readers, []
        if readers:
            self._prefill.shared.remove(readers, keep=keep_cache)
        if handle in self._decoding:
            self._decoding.remove(handle)
        elif handle in self._prefilling:
            self._prefilling.remove(handle)

    def _fail(self, handle: RequestHandle, error: Exception) -> None:
        # After any other error the cache may be the cause, or the memory that is missing.
        self._release(handle, keep_cache=isinstance(error, DeadlineExceededError))
        handle.emit(Failed(error if isinstance(error, RapidError) else as_generation_error(error)))

    def _run_isolated(
        self, parts: Sequence[tuple[RequestHandle, _Part]], run: Callable[[list[_Part]], _T]
    ) -> Iterator[tuple[list[RequestHandle], _T]]:
        """Run a pass for several requests. If it fails, repeat it one by one, to fail only the cause.

        Args:
            parts: The requests and their parts of the pass.
            run: The pass.

        Yields:
            The requests of a pass, and its result.
        """
        alone = [[part] for part in parts]
        for group in [list(parts), *alone] if len(parts) > 1 else alone:
            handles, arguments = [handle for handle, _ in group], [part for _, part in group]
            try:
                result = self._with_memory(lambda arguments=arguments: run(arguments))  # type: ignore[misc]
            except Exception as error:
                if len(group) == 1:
                    self._fail(handles[0], error)
                continue
            yield handles, result
            if len(group) > 1:
                return

    def _with_memory(self, run: Callable[[], _T]) -> _T:
        """Run a pass. If memory runs out, free cached prefixes, halve the chunk, and repeat it once."""
        for attempt in itertools.count():
            try:
                with panics_as_errors():
                    return run()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if attempt:
                    raise EngineMemoryError(
                        f"out of memory, also after the cached prefixes were freed: {error}. Shorten the "
                        "context, lower max_active_requests, or use a smaller dtype."
                    ) from error
            self._prefill.free_memory()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        raise AssertionError("unreachable")
