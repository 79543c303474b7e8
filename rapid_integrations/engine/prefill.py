"""Prefill: prompts get into caches from cached prefixes, other requests, or forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from rapid_integrations.engine.agreement import (
    MAX_ENDING_TOKENS,
    QuestionAgreements,
    digest,
    shared_ending,
)
from rapid_integrations.engine.cache.model_state import ModelState
from rapid_integrations.engine.cache.prefix_cache import PrefixCache
from rapid_integrations.engine.cache.selection import copy_selection, find_selection
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.cache.shared_prefill import Load, Reader, SharedPrefill
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.requests import Request, RequestHandle

# Upper limit on the logits of one pass, which question agreements need.
_MAX_ENDING_TOKENS_PER_PASS = 4 * MAX_ENDING_TOKENS


class Prefill:
    """Reads prompts. All methods belong to the worker thread.

    Args:
        target: The target model.
        drafter: The drafter; ``None`` for plain decoding. If it :meth:`CausalModel.shares_cache_with` the
            target, passages are copied from the target's cache instead of read again.
        prefix_cache: KV of requests that have ended.
        chunk_tokens: Upper limit on the tokens of one pass.
        on_loaded: Called in the loading thread when a prefix has been loaded from disk.

    Attributes:
        shared: Decides which prompts wait for others, and hands on what was read.
    """

    def __init__(
        self,
        target: CausalModel,
        drafter: CausalModel | None,
        prefix_cache: PrefixCache,
        *,
        chunk_tokens: int,
        on_loaded: Callable[[], None],
    ) -> None:
        self.shared = SharedPrefill(prefix_cache)
        self._target = target
        self._drafter = drafter
        self._prefix_cache = prefix_cache
        self._chunk_tokens = chunk_tokens
        self._on_loaded = on_loaded
        self._agreements = QuestionAgreements()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="rapid-loader")

    def start(self, handle: RequestHandle) -> None:
        """Give a request its readers, and note whether its question agreement has to be measured."""
        request = handle.request
        readers = [_reader(self._target, request.target_tokens, request)]
        drafts = request.speculation.num_draft_tokens != 0
        if self._drafter is not None and request.drafter_tokens is not None and drafts:
            readers.append(self._drafter_reader(self._drafter, request))
            handle.stats.drafter_prompt_tokens = len(readers[1].state.tokens)
            if request.speculation.uses_question_agreement:
                handle.prompts_key = digest(readers)
                handle.question_agreement = self._agreements.get(handle.prompts_key)
                if handle.question_agreement is None:
                    ending = shared_ending(*(reader.state.tokens for reader in readers))
                    if (selection := readers[1].selection) is not None:
                        # Tokens that are copied have no probabilities.
                        ending = min(ending, selection.num_last - 1)
                    for reader in readers:
                        reader.ending = ending
        handle.readers = readers
        self.shared.add(readers)

    def _drafter_reader(self, drafter: CausalModel, request: Request) -> Reader:
        assert request.drafter_tokens is not None
        target_tokens = request.target_tokens
        selection = None
        if drafter.shares_cache_with(self._target) and request.drafter_tokens != target_tokens:
            selection = find_selection(target_tokens, request.drafter_tokens)
        if selection is None:
            return _reader(drafter, request.drafter_tokens, request)
        reader = _reader(drafter, selection.tokens(target_tokens), request)
        reader.selection = selection
        return reader

    def order_loads(self, handle: RequestHandle) -> None:
        """Load from disk what no cache in memory and no running request has of the prompts."""
        for reader in handle.readers:
            if reader.selection is not None:
                continue
            found = self._prefix_cache.find_on_disk(
                reader.model,
                reader.prefix,
                known_tokens=self.shared.expected_tokens(reader),
                capacity=reader.capacity,
            )
            if found is not None:
                reader.load = Load(found.length, self._loader.submit(found.load))
                reader.load.cache.add_done_callback(lambda _: self._on_loaded())

    def take_prefix(self, handle: RequestHandle, reader: Reader) -> None:
        """Start a reader from its loaded prefix, or from the longest one in memory."""
        if reader.load is not None:
            reader.take_loaded()
        if not reader.position and reader.selection is None:
            cache = self._prefix_cache.take(reader.model, reader.prefix, capacity=reader.capacity)
            reader.state.cache = cache or reader.state.cache
        if reader is handle.readers[0]:
            handle.stats.reused_prefix_tokens = reader.position
        else:
            handle.stats.reused_drafter_prefix_tokens = reader.position

    def choose(
        self,
        waiting: Sequence[RequestHandle],
        catch_up: Callable[[RequestHandle], Reader | None],
    ) -> list[tuple[RequestHandle, Reader]]:
        """The readers of the next pass: the first request's, and others of its model that fit into a chunk.

        Requests that wait for another prompt or for a file are passed over.

        Args:
            waiting: Requests in the order of their turns.
            catch_up: Calls :meth:`catch_up`; returns ``None`` also if that fails.
        """
        chosen: list[tuple[RequestHandle, Reader]] = []
        room = self._chunk_tokens
        for handle in waiting:
            if room <= 0:
                break
            if self.shared.must_wait(handle.readers):
                continue
            reader = catch_up(handle)
            if reader is not None and self._fits([other for _, other in chosen], reader, room):
                chosen.append((handle, reader))
                room -= reader.num_unread
        return chosen

    def _fits(self, chosen: Sequence[Reader], reader: Reader, room: int) -> bool:
        """Whether a reader may join a pass that has ``room`` tokens left."""
        num_ending = reader.ending + sum(other.ending for other in chosen)
        return not chosen or (
            reader.model is chosen[0].model
            and reader.num_unread <= room
            and num_ending <= _MAX_ENDING_TOKENS_PER_PASS
            and not self.shared.is_computed_by(chosen, reader)
        )

    def catch_up(self, handle: RequestHandle) -> Reader | None:
        """Take over tokens that other requests have read; returns the reader that reads next, if any."""
        for reader in handle.readers:
            if reader.selection is not None and not reader.position:
                taken_over = self._copy_selection(handle.readers[0], reader)
            else:
                taken_over = self.shared.catch_up(reader)
            if reader is handle.readers[0]:
                handle.stats.reused_prefix_tokens += taken_over
            else:
                handle.stats.reused_drafter_prefix_tokens += taken_over
            if reader.num_unread:
                # The drafter's reader becomes the current one only now, and may have to wait.
                waits = reader is not handle.readers[0] and self.shared.must_wait(handle.readers)
                return None if waits else reader
        return None

    def _copy_selection(self, target: Reader, drafter: Reader) -> int:
        """Copy the passages that a self-drafter reads, once the target has read its whole prompt."""
        if target.num_unread or drafter.selection is None:
            return 0
        drafter.state.cache = copy_selection(
            target.state.cache,
            drafter.selection,
            drafter.model.inverse_frequencies,
            capacity=drafter.capacity,
        )
        return drafter.position

    def read_chunk(self, readers: Sequence[Reader]) -> None:
        """Read the next tokens of prompts in one pass: see :func:`prefill_together`."""
        prefill_together(readers, self._chunk_tokens)

    def question_agreement(self, handle: RequestHandle) -> float | None:
        """The question agreement of a request whose prompts were read; ``None`` where it has no effect."""
        if not handle.prompts_key:
            return None
        target, drafter = handle.readers
        return self._agreements.measure(handle.prompts_key, target, drafter, handle.question_agreement)

    def free_memory(self) -> None:
        """Free all cached prefixes and halve the chunk."""
        self.shared.clear()
        self._chunk_tokens = max(1, self._chunk_tokens // 2)

    def close(self) -> None:
        """Drop all prompts, end the loading thread, and wait until prefixes are written to disk."""
        self._loader.shutdown(cancel_futures=True)
        self.shared = SharedPrefill(self._prefix_cache)
        self._prefix_cache.clear()
        self._prefix_cache.close()


def prefill_together(readers: Sequence[Reader], max_tokens: int) -> None:
    """Read the next tokens of several prompts in one pass.

    Args:
        readers: At least one, all of one model; the first has tokens left to read.
        max_tokens: Upper limit on the tokens of the pass. The first readers come first.

    Raises:
        Exception: Any error of the model; the caches are as they were.
    """
    parts: list[tuple[Reader, int]] = []
    steps = []
    for reader in readers:
        start, end = reader.position, min(reader.position + max_tokens, reader.prompt.size)
        if end > start:
            max_tokens -= end - start
            # Only the tokens of the prompt's ending need logits.
            num_logits = min(end - start, max(0, end - reader.prefix.size))
            steps.append(Step(reader.state.cache, reader.prompt[start:end].tolist(), num_logits))
            parts.append((reader, start))
    try:
        logits = readers[0].model.forward(steps)
        ending_probs = []
        for (reader, start), step, rows in zip(
            parts, steps, torch.split(logits, [step.num_logits for step in steps]), strict=True
        ):
            probs: list[float] = []
            if step.num_logits:  # avoids a transfer from the device
                end = start + len(step.tokens)
                next_tokens = reader.state.tokens[end - step.num_logits + 1 : end + 1]
                indices = torch.tensor(next_tokens, device=rows.device)[:, None]
                probs = rows.softmax(-1).gather(1, indices)[:, 0].tolist()
            ending_probs.append(probs)
    except BaseException:
        # The pass may be repeated when memory was short: no probability may be noted twice or lost.
        for reader, start in parts:
            reader.state.cache.rollback(start)
        raise
    for (reader, _), probs in zip(parts, ending_probs, strict=True):
        reader.ending_probs += probs


def _reader(model: CausalModel, prompt: Sequence[int], request: Request) -> Reader:
    capacity = len(prompt) + request.sampling.max_new_tokens
    state = ModelState(list(prompt), SequenceKV(capacity))
    # The first round reads the last prompt token.
    return Reader(model, state, np.asarray(prompt[:-1], dtype=np.int64), capacity=capacity)
