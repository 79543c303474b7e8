"""Key/value caches: preallocated buffers written by position, O(1) rollback, a store of prefixes.

Contract: ``SequenceKV.length`` is the number of tokens whose keys and values are valid. A forward pass writes
behind it and the model advances it; rolling back is assigning a smaller length. Nothing else is remembered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from rapid_integrations.engine.model import CausalModel
    from rapid_integrations.engine.prefix_folder import PrefixFolder


@dataclass(slots=True)
class LayerKV:
    """One layer's keys and values, each ``[kv_heads, capacity, head_dim]``."""

    keys: Tensor
    values: Tensor


def _grown(buffer: Tensor, capacity: int, used: int) -> Tensor:
    grown = buffer.new_empty(buffer.shape[0], capacity, buffer.shape[2])
    grown[:, :used] = buffer[:, :used]
    return grown


class SequenceKV:
    """The KV cache of one token sequence in one model.

    Buffers take the shape, dtype and device of the first keys and values written, layer by layer, so that
    grouped heads, unequal head sizes and layers on several devices need no configuration.

    Args:
        capacity: Tokens to allocate for; grows by half, at least, when it is exceeded.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._layers: dict[int, LayerKV] = {}

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values behind ``length``, which stays as it is.

        Args:
            layer: The layer's index.
            keys: ``[kv_heads, tokens, head_dim]``.
            values: ``[kv_heads, tokens, head_dim]``.

        Returns:
            Views of all the layer's keys and values so far, ``[kv_heads, length + tokens, head_dim]``.
        """
        end = self.length + keys.shape[1]
        if end > self.capacity:
            self.reserve(max(end, self.capacity + self.capacity // 2))
        held = self._layers.get(layer)
        if held is None:
            held = self._layers[layer] = LayerKV(
                keys.new_empty(keys.shape[0], self.capacity, keys.shape[2]),
                values.new_empty(values.shape[0], self.capacity, values.shape[2]),
            )
        held.keys[:, self.length : end] = keys
        held.values[:, self.length : end] = values
        return held.keys[:, :end], held.values[:, :end]

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens, keeping the first ``length``."""
        if capacity <= self.capacity:
            return
        for held in self._layers.values():
            held.keys = _grown(held.keys, capacity, self.length)
            held.values = _grown(held.values, capacity, self.length)
        self.capacity = capacity

    def rollback(self, length: int) -> None:
        """Forget every token from position ``length`` on; a larger ``length`` changes nothing."""
        self.length = min(self.length, max(length, 0))

    def copy_prefix(self, length: int, capacity: int) -> SequenceKV:
        """A cache of its own with this one's first ``length`` tokens."""
        copy = SequenceKV(max(capacity, length))
        for layer, held in self._layers.items():
            copy._layers[layer] = LayerKV(
                _grown(held.keys, copy.capacity, length), _grown(held.values, copy.capacity, length)
            )
        copy.length = length
        return copy

    def layers(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each layer's index and views of its keys and values, ``[kv_heads, length, head_dim]``."""
        for layer, held in self._layers.items():
            yield layer, held.keys[:, : self.length], held.values[:, : self.length]

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return sum(held.keys.nbytes + held.values.nbytes for held in self._layers.values())


def common_prefix_length(left: np.ndarray, right: np.ndarray) -> int:
    """The number of leading elements two one-dimensional arrays share."""
    size = min(left.size, right.size)
    differing = np.nonzero(left[:size] != right[:size])[0]
    return int(differing[0]) if differing.size else size


@dataclass(slots=True)
class _Entry:
    tokens: np.ndarray
    kv: SequenceKV


class PrefixStore:
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

    def __init__(self, budget_bytes: int, folder: PrefixFolder | None = None) -> None:
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
        """A cache that holds the longest known prefix of ``tokens``, now the caller's own.

        Args:
            model: The model the cache must belong to.
            tokens: The prompt.
            capacity: Tokens the caller will need room for.

        Returns:
            A cache rolled back to the common prefix, or ``None`` when too little is shared.
        """
        wanted = np.asarray(tokens, dtype=np.int64)
        best, shared = None, self.MIN_TOKENS - 1
        for key, entry in self._entries.items():
            if key[0] == model and (length := common_prefix_length(entry.tokens, wanted)) > shared:
                best, shared = key, length
        if self._folder is not None:
            known = 0 if best is None else shared
            loaded = self._folder.load(model, wanted, known_tokens=known, capacity=capacity)
            if loaded is not None:
                return loaded
        if best is None:
            return None
        entry = self._entries[best]
        mostly_shared = shared >= self.HAND_OVER * entry.tokens.size
        # What is just being written to the folder must not change.
        if not mostly_shared or (self._folder is not None and not self._folder.withdraw(entry.kv)):
            self._entries.move_to_end(best)
            return entry.kv.copy_prefix(shared, capacity)
        del self._entries[best]
        entry.kv.rollback(shared)
        entry.kv.reserve(capacity)
        return entry.kv

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
        """Bytes held."""
        return sum(entry.kv.num_bytes for entry in self._entries.values())
