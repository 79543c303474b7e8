"""Prompts that are read at the same time: what several begin with is read once, and short ones in one pass.

A prompt that begins like another one which is further along waits until that one has read what both share,
takes a fork of its cache, and is read on from there. It hardly loses by waiting: prompts are read a chunk in
turn, and the other one reads in its turns what this one would have read in its own. The one that is
furthest never waits, so somebody always reads. A request that ends leaves what it has read to those who still
need it, and then to the store.

What another thread loads for a prompt counts as read as soon as it is ordered: who needs the same waits for
it, and the one it is loaded for waits for nothing else. Should it not come, they go on by reading.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from rapid_integrations.engine.cache.model_state import ModelState
from rapid_integrations.engine.cache.prefix_cache import PrefixCache
from rapid_integrations.engine.cache.sequence_kv import SequenceKV, common_prefix_length
from rapid_integrations.engine.model.causal_model import CausalModel


@dataclass(frozen=True, slots=True)
class Load:
    """The beginning of a prompt, on its way.

    Attributes:
        length: How many tokens it has, if it comes.
        cache: Holds them, or fewer; ``None`` where they cannot be had.
    """

    length: int
    cache: Future[SequenceKV | None]


@dataclass(eq=False, slots=True)
class Reader:
    """One model that reads one request's prompt.

    Attributes:
        model: The model.
        state: The tokens and the cache of the request in this model.
        prompt: What it reads before the first round, ``[tokens]`` int64: all of the prompt but its last
            token.
        ending: For how many of the prompt's last tokens, the very last included, it notes how likely they
            were. It reads the tokens before each of them by itself, whoever else has read them.
        ending_probs: What the model gave those of them that it has come to.
        capacity: For how many tokens its caches need room, the answer's included.
        load: What is loaded for it; ``None`` for nothing.
    """

    model: CausalModel
    state: ModelState
    prompt: np.ndarray
    ending: int = 0
    ending_probs: list[float] = field(default_factory=list)
    capacity: int = 0
    load: Load | None = None

    @property
    def prefix(self) -> np.ndarray:
        """What of the prompt may be taken over, ``[tokens]``."""
        return self.prompt[: self.prompt.size - self.ending]

    @property
    def position(self) -> int:
        """How many tokens its cache holds."""
        return self.state.cache.length

    @property
    def coming(self) -> int:
        """How many tokens its cache holds, or will when what is loaded has come."""
        return self.position if self.load is None else max(self.position, self.load.length)

    @property
    def loaded(self) -> bool:
        """Whether what was loaded for it is there to be taken, or will not come."""
        return self.load is not None and self.load.cache.done()

    @property
    def num_unread(self) -> int:
        """How many tokens of the prompt are still to be read."""
        return max(0, self.prompt.size - self.position)

    def shared_with(self, other: Reader) -> int:
        """How many tokens it may take over of another one's prompt; 0 for prompts of two models."""
        return common_prefix_length(self.prefix, other.prompt) if self.model is other.model else 0

    def take_loaded(self) -> None:
        """Take over what was loaded.

        Raises:
            Exception: What loading raised. There is nothing to take any more.
        """
        assert self.load is not None
        # Once: what cannot be had is read.
        load, self.load = self.load, None
        cache = load.cache.result()
        if cache is not None and cache.length > self.position:
            self.state.cache = cache

    def cancel_load(self) -> bool:
        """Have nothing loaded for it any more; false where that has begun, so that it will come."""
        if self.load is not None and self.load.cache.cancel():
            self.load = None
        return self.load is None


class SharedPrefill:
    """Who reads, who waits, and who takes over what.

    Args:
        store: Where the caches of requests that have ended go.
    """

    # Fewer tokens are neither waited for nor taken over: they are read faster.
    MIN_TOKENS = PrefixCache.MIN_TOKENS

    def __init__(self, store: PrefixCache) -> None:
        self._store = store
        self._running: list[Sequence[Reader]] = []
        self._left: list[Reader] = []

    def join(self, readers: Sequence[Reader]) -> None:
        """Take in a request; its readers come in the order in which they read."""
        self._running.append(readers)

    def leave(self, readers: Sequence[Reader], *, keep: bool) -> None:
        """Let a request go, from its prompt or from its answer.

        Args:
            readers: As it joined.
            keep: Whether its caches may be used on.
        """
        self._running.remove(readers)
        if keep:
            self._left.extend(readers)
        else:
            for reader in readers:
                reader.cancel_load()
        self._hand_on()

    def coming(self, reader: Reader) -> int:
        """How much of a reader's prompt others have read, or will have when what is loaded has come."""
        return self._source(reader, coming=True)[1]

    @property
    def loads(self) -> bool:
        """Whether anything is being loaded, or is there to be taken."""
        return any(reader.load is not None for reader in self._others())

    @property
    def loaded(self) -> bool:
        """Whether anything that was loaded is there to be taken."""
        return any(reader.loaded for reader in self._others())

    def take_left(self) -> None:
        """Take over what was loaded for requests that have ended: others may need it."""
        loaded = [reader for reader in self._left if reader.loaded]
        for reader in loaded:
            # Whose it was is gone: nobody fails.
            with suppress(Exception):
                reader.take_loaded()
        if loaded:
            self._hand_on()

    def must_wait(self, readers: Sequence[Reader]) -> bool:
        """Whether a request waits for a load, or another one is just reading what it would read next."""
        if any(reader.load is not None for reader in readers):
            return True
        mine = _current(readers)
        if mine is None:
            return False
        _, ready = self._source(mine)
        # Who is further along and is still to come to the end of what both share.
        enough = max(mine.position + self.MIN_TOKENS, ready + 1)
        return any(
            other.coming > mine.position and mine.shared_with(other) >= enough for other in self._advancing()
        )

    def is_read_by(self, others: Sequence[Reader], reader: Reader) -> bool:
        """Whether one of the others is about to read what a reader would read next."""
        enough = reader.position + self.MIN_TOKENS
        return any(reader.shared_with(other) >= enough for other in others)

    def catch_up(self, reader: Reader) -> int:
        """Fork off what others have read of a reader's prompt.

        Returns:
            How many tokens its cache holds now that it did not hold before.
        """
        source, ready = self._source(reader)
        gained = ready - reader.position
        if source is None or gained < self.MIN_TOKENS:
            return 0
        reader.state.cache = source.state.cache.fork(ready, reader.capacity)
        self._hand_on()
        return gained

    def clear(self) -> None:
        """Let go of what requests that have ended left to others, and of the store."""
        for reader in self._left:
            reader.cancel_load()
        self._left.clear()
        self._store.clear()

    def _source(self, reader: Reader, *, coming: bool = False) -> tuple[Reader | None, int]:
        """Who has read most of a reader's prompt beside itself, or has it coming, and how much of it."""
        best, most = None, 0
        for other in self._others():
            if other is not reader:
                ready = min(reader.shared_with(other), other.coming if coming else other.position)
                if ready > most:
                    best, most = other, ready
        return best, most

    def _advancing(self) -> Iterator[Reader]:
        """Whose caches grow: those who read, and those for whom something is loaded."""
        for readers in self._running:
            current = _current(readers)
            yield from (reader for reader in readers if reader is current or reader.load is not None)
        yield from (reader for reader in self._left if reader.load is not None)

    def _others(self) -> Iterator[Reader]:
        """Everybody who has read something; those who are gone last, so that nobody needs them in vain."""
        for readers in self._running:
            yield from readers
        yield from self._left

    def _hand_on(self) -> None:
        """Put into the store what nobody needs any more of what was left, and load no more of it."""
        if not self._left:
            return
        needed: set[Reader | None] = set()
        for reader in itertools.chain.from_iterable(self._running):
            if reader.num_unread:
                source, ready = self._source(reader, coming=True)
                if ready >= reader.position + self.MIN_TOKENS:
                    needed.add(source)
        left, self._left = self._left, []
        for reader in left:
            if reader in needed or not reader.cancel_load():
                self._left.append(reader)
            else:
                self._store.put(reader.model, reader.state.tokens, reader.state.cache)


def _current(readers: Sequence[Reader]) -> Reader | None:
    """The reader of a request whose turn it is; ``None`` when the prompts are read."""
    return next((reader for reader in readers if reader.num_unread), None)
