"""Prompts that are prefilled at the same time: a common prefix is computed once and shared.

A prompt that has a prefix in common with another prompt that is further along waits until that one has
computed the prefix, forks its cache, and continues from there. Waiting costs little: prompts are prefilled a
chunk in turn, and the other one computes in its turns the tokens that this one would compute in its own. The
prompt that is furthest along never waits, so there is always one that advances. When a request ends, its
caches are retained while other prompts need them, and then go to the prefix cache.

A prefix that is being loaded from disk counts as available as soon as it is ordered. Other prompts with the
same prefix wait for it. If loading fails, they are prefilled without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rapid_integrations.engine.cache.model_state import ModelState
from rapid_integrations.engine.cache.prefix_cache import PrefixCache
from rapid_integrations.engine.cache.selection import Selection
from rapid_integrations.engine.cache.sequence_kv import SequenceKV, common_prefix_length


@dataclass(frozen=True, slots=True)
class Load:
    """The beginning of a prompt that is being loaded from disk.

    Attributes:
        length: The expected number of tokens.
        cache: The loaded cache, which may hold fewer tokens; ``None`` if no file was usable.
    """

    length: int
    cache: Future[SequenceKV | None]


@dataclass(eq=False, slots=True)
class Reader:
    """The prefill of one request's prompt in one model.

    Attributes:
        model: The model; this module only compares it by identity.
        state: The model's view of the request.
        prompt: The tokens to compute before the first round, ``[tokens]`` int64: all but the last token of
            the prompt, which the first round reads.
        ending: The probabilities of this many last tokens of the prompt, the very last included, are
            recorded. The reader computes the tokens before each of them itself and never takes them from
            another reader, because a cache holds no probabilities.
        ending_probs: The probabilities recorded so far.
        capacity: The number of tokens that the cache needs room for, the answer included.
        load: The prefix that is being loaded; ``None`` if there is none.
        selection: The tokens whose KV is copied from the target's cache (:mod:`.selection`). Such a cache is
            not the one that reading its tokens would give, so it is neither made from another one nor kept.
            ``None`` for a prompt that is read.
    """

    model: Any
    state: ModelState
    prompt: np.ndarray
    ending: int = 0
    ending_probs: list[float] = field(default_factory=list)
    capacity: int = 0
    load: Load | None = None
    selection: Selection | None = None

    @property
    def prefix(self) -> np.ndarray:
        """The part of the prompt whose KV may come from elsewhere, ``[tokens]``."""
        return self.prompt[: self.prompt.size - self.ending]

    @property
    def position(self) -> int:
        """The number of tokens in its cache."""
        return self.state.cache.length

    @property
    def expected_position(self) -> int:
        """The number of tokens in its cache after the prefix that is being loaded has arrived."""
        return self.position if self.load is None else max(self.position, self.load.length)

    @property
    def load_done(self) -> bool:
        """Whether loading has ended, successfully or not, and its outcome has not been taken yet."""
        return self.load is not None and self.load.cache.done()

    @property
    def num_unread(self) -> int:
        """The number of tokens of the prompt that are still to be computed."""
        num_copied = 0 if self.selection is None else self.selection.num_copied
        return max(0, self.prompt.size - max(self.position, num_copied))

    def shared_with(self, other: Reader) -> int:
        """The number of tokens that it may take from another reader's cache; 0 if it may not."""
        if self.model is not other.model or self.selection is not None or other.selection is not None:
            return 0
        return common_prefix_length(self.prefix, other.prompt)

    def take_loaded(self) -> None:
        """Use the prefix that was loaded, if it is longer than the current cache.

        Raises:
            Exception: The error of loading. The reader then continues without a load.
        """
        assert self.load is not None
        # Cleared first, so that a failed load is not tried again.
        load, self.load = self.load, None
        cache = load.cache.result()
        if cache is not None and cache.length > self.position:
            self.state.cache = cache

    def cancel_load(self) -> bool:
        """Cancel the load. False if it has already begun and will complete."""
        if self.load is not None and self.load.cache.cancel():
            self.load = None
        return self.load is None


class SharedPrefill:
    """Decides which request is prefilled, which waits, and which takes over another one's cache.

    A request is a sequence of readers, one for each of its models, in the order in which they are prefilled.

    Args:
        store: Receives the caches of requests that have ended.
    """

    # Shorter prefixes are computed again: waiting for them or copying them takes longer.
    MIN_TOKENS = PrefixCache.MIN_TOKENS

    def __init__(self, store: PrefixCache) -> None:
        self._store = store
        self._running: list[Sequence[Reader]] = []
        # Readers of ended requests that running readers may still need.
        self._retained: list[Reader] = []

    def add(self, readers: Sequence[Reader]) -> None:
        """Add a request."""
        self._running.append(readers)

    def remove(self, readers: Sequence[Reader], *, keep: bool) -> None:
        """Remove a request, whether it is being prefilled or decoded.

        Args:
            readers: The same object that was added.
            keep: Whether its caches may be used by other requests.
        """
        self._running.remove(readers)
        if keep:
            self._retained.extend(reader for reader in readers if reader.selection is None)
        else:
            for reader in readers:
                reader.cancel_load()
        self._release_retained()

    def expected_tokens(self, reader: Reader) -> int:
        """The length of the reader's longest prefix that other readers have computed or are loading."""
        return self._source(reader, expected=True)[1]

    @property
    def any_loading(self) -> bool:
        """Whether any load is running or its outcome has not been taken yet."""
        return any(reader.load is not None for reader in self._all())

    @property
    def any_load_done(self) -> bool:
        """Whether any load has ended whose outcome has not been taken yet."""
        return any(reader.load_done for reader in self._all())

    def take_retained_loads(self) -> None:
        """Take the outcome of loads that were ordered for requests which have ended."""
        done = [reader for reader in self._retained if reader.load_done]
        for reader in done:
            # The request has ended; ignore its load error.
            with suppress(Exception):
                reader.take_loaded()
        if done:
            self._release_retained()

    def must_wait(self, readers: Sequence[Reader]) -> bool:
        """Whether a request waits for a load, or for another one that is computing its next tokens."""
        if any(reader.load is not None for reader in readers):
            return True
        current = _current(readers)
        if current is None:
            return False
        _, available = self._source(current)
        min_shared = max(current.position + self.MIN_TOKENS, available + 1)
        return any(
            other.expected_position > current.position and current.shared_with(other) >= min_shared
            for other in self._advancing()
        )

    def is_computed_by(self, batch: Sequence[Reader], reader: Reader) -> bool:
        """Whether a reader in ``batch`` is about to compute the next tokens of another reader."""
        min_shared = reader.position + self.MIN_TOKENS
        return any(reader.shared_with(other) >= min_shared for other in batch)

    def catch_up(self, reader: Reader) -> int:
        """Fork the longest prefix of the reader's prompt that another reader has computed.

        Returns:
            The number of tokens by which the reader's cache has grown.
        """
        source, available = self._source(reader)
        gained = available - reader.position
        if source is None or gained < self.MIN_TOKENS:
            return 0
        reader.state.cache = source.state.cache.fork(available, reader.capacity)
        self._release_retained()
        return gained

    def clear(self) -> None:
        """Drop the caches of ended requests, here and in the store."""
        for reader in self._retained:
            reader.cancel_load()
        self._retained.clear()
        self._store.clear()

    def _source(self, reader: Reader, *, expected: bool = False) -> tuple[Reader | None, int]:
        """The other reader with the longest prefix of this reader's prompt, and the length of the prefix.

        Args:
            reader: The reader to find a prefix for.
            expected: Whether prefixes that are being loaded count.
        """
        source, available = None, 0
        for other in self._all():
            if other is not reader:
                position = other.expected_position if expected else other.position
                length = min(reader.shared_with(other), position)
                if length > available:
                    source, available = other, length
        return source, available

    def _advancing(self) -> Iterator[Reader]:
        """Readers whose caches will grow: those whose turn it is, and those with a load."""
        for readers in self._running:
            current = _current(readers)
            yield from (reader for reader in readers if reader is current or reader.load is not None)
        yield from (reader for reader in self._retained if reader.load is not None)

    def _all(self) -> Iterator[Reader]:
        """All readers, retained ones last: equally good running ones are preferred as sources."""
        for readers in self._running:
            yield from readers
        yield from self._retained

    def _release_retained(self) -> None:
        """Move retained caches that no reader needs any more to the store, and cancel their loads."""
        if not self._retained:
            return
        needed: set[Reader | None] = set()
        for reader in itertools.chain.from_iterable(self._running):
            if reader.num_unread:
                source, available = self._source(reader, expected=True)
                if available >= reader.position + self.MIN_TOKENS:
                    needed.add(source)
        retained, self._retained = self._retained, []
        for reader in retained:
            if reader in needed or not reader.cancel_load():
                self._retained.append(reader)
            else:
                self._store.put(reader.model, reader.state.tokens, reader.state.cache)


def _current(readers: Sequence[Reader]) -> Reader | None:
    """The first reader of a request that is not complete; ``None`` if all are."""
    return next((reader for reader in readers if reader.num_unread), None)
