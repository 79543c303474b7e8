"""KV of earlier requests in memory, for later prompts that begin with the same tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from rapid_integrations.engine.cache.disk_cache import DiskPrefixCache
from rapid_integrations.engine.cache.sequence_kv import SequenceKV, common_prefix_length


@dataclass(slots=True)
class _Entry:
    tokens: np.ndarray
    kv: SequenceKV


@dataclass(frozen=True, slots=True)
class PrefixOnDisk:
    """A prefix of a prompt that is stored on disk.

    Attributes:
        length: Its number of tokens, if the files are usable.
        load: Reads it; may be called in any thread. Returns fewer tokens or ``None`` if a file turns out to
            be unusable.
    """

    length: int
    load: Callable[[], SequenceKV | None]


class PrefixCache:
    """KV of finished requests for the next ones, with a byte budget; least recently used entries go first.

    A prompt gets the entry with the longest common token prefix. If the prefix is nearly the whole entry
    (another question about the same document), the entry itself is rolled back and handed over. If it is a
    smaller part (a common preamble), the prefix is copied and the entry stays.

    Models are opaque keys here: entries of one model are used for this model only.

    Args:
        budget_bytes: The maximum to keep; 0 keeps nothing.
        disk: Stores long prefixes on disk, too; ``None`` for memory only.
    """

    # Recomputing fewer tokens than this is faster than copying them.
    MIN_TOKENS = 16
    # The share of an entry that must be common for it to be handed over instead of copied.
    HAND_OVER_SHARE = 0.9

    def __init__(self, budget_bytes: int, disk: DiskPrefixCache | None = None) -> None:
        self.budget_bytes = budget_bytes
        self._disk = disk
        self._entries: OrderedDict[tuple[Hashable, int], _Entry] = OrderedDict()
        self._serial = 0

    def put(self, model: Hashable, tokens: Sequence[int], kv: SequenceKV) -> None:
        """Keep a cache, here and on disk.

        Args:
            model: The model that the cache belongs to.
            tokens: At least ``kv.length`` tokens; the first ``kv.length`` are those in the cache.
            kv: The cache; the caller must not use it afterwards.
        """
        kv.move_to_own_buffers()
        held = np.asarray(tokens[: kv.length], dtype=np.int64)
        if self._disk is not None:
            self._disk.save(model, held, kv)
        if kv.num_bytes > self.budget_bytes or kv.length < self.MIN_TOKENS:
            return
        for key, entry in list(self._entries.items()):
            shorter = min(entry.tokens.size, held.size)
            if key[0] == model and common_prefix_length(entry.tokens, held) == shorter:
                if entry.tokens.size >= held.size:  # this entry already has all of the tokens
                    self._entries.move_to_end(key)
                    return
                del self._entries[key]
        self._serial += 1
        self._entries[model, self._serial] = _Entry(held, kv)
        while self.num_bytes > self.budget_bytes:
            self._entries.popitem(last=False)

    def take(
        self, model: Hashable, tokens: Sequence[int] | np.ndarray, *, capacity: int
    ) -> SequenceKV | None:
        """A cache with the longest prefix of a prompt in memory. It belongs to the caller.

        Args:
            model: The model that the cache must belong to.
            tokens: The prompt.
            capacity: The number of tokens that the caller needs room for.

        Returns:
            A cache of exactly the common prefix, or ``None`` if fewer than :attr:`MIN_TOKENS` are common.
        """
        best, shared = self._longest_match(model, np.asarray(tokens, dtype=np.int64))
        if best is None:
            return None
        entry = self._entries[best]
        min_handed_over = max(
            self.HAND_OVER_SHARE * entry.tokens.size, entry.kv.base_length, entry.kv.forked_length
        )
        # A cache that is being written to disk must not change either.
        if shared < min_handed_over or (self._disk is not None and not self._disk.withdraw(entry.kv)):
            self._entries.move_to_end(best)
            return entry.kv.copy_prefix(shared, capacity)
        del self._entries[best]
        entry.kv.rollback(shared)
        entry.kv.reserve(capacity)
        return entry.kv

    def find_on_disk(
        self, model: Hashable, tokens: Sequence[int] | np.ndarray, *, known_tokens: int, capacity: int
    ) -> PrefixOnDisk | None:
        """A prefix of a prompt on disk that is longer than the longest one in memory.

        Args:
            model: The model that the cache must belong to.
            tokens: The prompt.
            known_tokens: The length of the longest prefix that the caller can get elsewhere.
            capacity: The number of tokens that the caller needs room for.

        Returns:
            ``None`` if the disk has no prefix that is sufficiently longer.
        """
        if self._disk is None:
            return None
        prompt = np.asarray(tokens, dtype=np.int64)
        known_tokens = max(known_tokens, self._longest_match(model, prompt)[1])
        length = self._disk.length_of(model, prompt, known_tokens=known_tokens)
        if not length:
            return None
        load = partial(self._disk.load, model, prompt, known_tokens=known_tokens, capacity=capacity)
        return PrefixOnDisk(length, load)

    def _longest_match(self, model: Hashable, prompt: np.ndarray) -> tuple[tuple[Hashable, int] | None, int]:
        """The key of the entry with the longest common prefix and its length; ``(None, 0)`` if too short."""
        best, shared = None, 0
        for key, entry in self._entries.items():
            if key[0] == model:
                length = common_prefix_length(entry.tokens, prompt)
                if length > max(shared, self.MIN_TOKENS - 1):
                    best, shared = key, length
        return best, shared

    def clear(self) -> None:
        """Drop all entries in memory."""
        self._entries.clear()

    def close(self) -> None:
        """Wait until all files are written. Idempotent."""
        if self._disk is not None:
            self._disk.close()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Bytes held, those of the bases of forks included."""
        held = {entry.kv for entry in self._entries.values()}
        return sum(kv.num_bytes for kv in held | {kv.base for kv in held if kv.base is not None})
