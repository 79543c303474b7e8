"""."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rapid_integrations.engine.cache.disk_cache import DiskPrefixCache
    from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.cache.sequence_kv import SequenceKV, common_prefix_length


@dataclass(slots=True)
class _Entry:
    tokens: np.ndarray
    kv: SequenceKV


@dataclass(frozen=True, slots=True)
class PrefixOnDisk:
    """What a folder has of a prompt.

    Attributes:
        length: How many tokens, if its files are usable.
        load: Fetches them, in any thread. It may come back with fewer, or with ``None``: a file turned out
            not to be usable.
    """

    length: int
    load: Callable[[], SequenceKV | None]


class PrefixCache:
    """KV of finished requests, kept under a byte budget (least recently used first out) for the next ones.

    A prompt finds the entry with the longest common token prefix. An entry that the prompt continues nearly
    to its end (another question on the same document) is handed over as it is and rolled back; one that it
    shares less of (a common preamble) is copied, so that the longer text stays in the store.

    Args:
        budget_bytes: The most to keep; 0 keeps nothing.
        folder: Keeps long prefixes beyond the process, too.
    """

    # Fewer shared tokens than this are read anew faster than they are copied.
    MIN_TOKENS = 16
    # Share of an entry that must be common before it is handed over instead of copied.
    HAND_OVER = 0.9

    def __init__(self, budget_bytes: int, folder: DiskPrefixCache | None = None) -> None:
        self.budget_bytes = budget_bytes
        self._folder = folder
        self._entries: OrderedDict[tuple[CausalModel, int], _Entry] = OrderedDict()
        self._serial = 0

    def put(self, model: CausalModel, tokens: Sequence[int], kv: SequenceKV) -> None:
        """Keep ``kv``, whose first ``kv.length`` tokens are those of ``tokens``.

        Args:
            model: The model the cache belongs to.
            tokens: At least ``kv.length`` tokens.
            kv: The cache; the caller gives it up.
        """
        kv.move_out()
        held = np.asarray(tokens[: kv.length], dtype=np.int64)
        if self._folder is not None:
            self._folder.save(model, held, kv)
        if kv.num_bytes > self.budget_bytes or kv.length < self.MIN_TOKENS:
            return
        for key, entry in list(self._entries.items()):
            if key[0] == model and common_prefix_length(entry.tokens, held) == min(
                entry.tokens.size, held.size
            ):
                if entry.tokens.size >= held.size:  # the store already holds all of it
                    self._entries.move_to_end(key)
                    return
                del self._entries[key]
        self._serial += 1
        self._entries[model, self._serial] = _Entry(held, kv)
        while self.num_bytes > self.budget_bytes:
            self._entries.popitem(last=False)

    def take(
        self, model: CausalModel, tokens: Sequence[int] | np.ndarray, *, capacity: int
    ) -> SequenceKV | None:
        """A cache that holds the longest prefix of ``tokens`` in memory, now the caller's own.

        Args:
            model: The model the cache must belong to.
            tokens: The prompt.
            capacity: Tokens the caller will need room for.

        Returns:
            A cache rolled back to the common prefix, or ``None`` when too little is shared.
        """
        best, shared = self._best(model, np.asarray(tokens, dtype=np.int64))
        if best is None:
            return None
        entry = self._entries[best]
        needed = max(self.HAND_OVER * entry.tokens.size, entry.kv.base_length, entry.kv.forked_length)
        # What is just being written to the folder must not change either.
        if shared < needed or (self._folder is not None and not self._folder.withdraw(entry.kv)):
            self._entries.move_to_end(best)
            return entry.kv.copy_prefix(shared, capacity)
        del self._entries[best]
        entry.kv.rollback(shared)
        entry.kv.reserve(capacity)
        return entry.kv

    def find_on_disk(
        self, model: CausalModel, tokens: Sequence[int] | np.ndarray, *, known_tokens: int, capacity: int
    ) -> PrefixOnDisk | None:
        """A longer prefix of ``tokens`` than there is in memory.

        Args:
            model: The model the cache must belong to.
            tokens: The prompt.
            known_tokens: How much of it there is beside the store and its folder.
            capacity: Tokens the caller will need room for.

        Returns:
            ``None`` where the folder has too little more.
        """
        if self._folder is None:
            return None
        wanted = np.asarray(tokens, dtype=np.int64)
        known = max(known_tokens, self._best(model, wanted)[1])
        length = self._folder.length_of(model, wanted, known_tokens=known)
        if not length:
            return None
        load = partial(self._folder.load, model, wanted, known_tokens=known, capacity=capacity)
        return PrefixOnDisk(length, load)

    def _best(self, model: CausalModel, wanted: np.ndarray) -> tuple[tuple[CausalModel, int] | None, int]:
        """Which entry shares most with a prompt, and how much; nothing where it is not worth taking."""
        best, shared = None, 0
        for key, entry in self._entries.items():
            if key[0] == model:
                length = common_prefix_length(entry.tokens, wanted)
                if length > max(shared, self.MIN_TOKENS - 1):
                    best, shared = key, length
        return best, shared

    def clear(self) -> None:
        """Let go of everything."""
        self._entries.clear()

    def close(self) -> None:
        """Wait until the folder has what it is to keep. Idempotent."""
        if self._folder is not None:
            self._folder.close()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Bytes held, those of the bases of forks included."""
        held = {entry.kv for entry in self._entries.values()}
        return sum(kv.num_bytes for kv in held | {kv.base for kv in held if kv.base is not None})
