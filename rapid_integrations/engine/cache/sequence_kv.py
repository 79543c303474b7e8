"""Key/value caches: preallocated buffers written by position, O(1) rollback, a store of prefixes.

Contract: ``SequenceKV.length`` is the number of tokens whose keys and values are valid. A forward pass writes
behind it and the model advances it; rolling back is assigning a smaller length. Nothing else is remembered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


@dataclass(slots=True)
class LayerKV:
    """One layer's keys and values, each ``[kv_heads, capacity, head_dim]``."""

    keys: Tensor
    values: Tensor


class SequenceKV:
    """The KV cache of one token sequence in one model.

    Buffers take the shape, dtype and device of the first keys and values written, layer by layer, so that
    grouped heads, unequal head sizes and layers on several devices need no configuration.

    A cache that was forked from another one holds its first tokens there, and only what follows itself. The
    other one, its *base*, may be used on: what forks read is never rolled back.

    Args:
        capacity: Tokens to allocate for, rounded up by a sixteenth at most: the next question about the same
            text may be some tokens longer, and mostly needs no copy of it all then. It grows by half, at
            least, when it is exceeded.

    Attributes:
        base: Where the first tokens are; ``None`` when all are here.
        base_length: How many they are.
    """

    # A fork shares a multiple of this: forks of one text share equally much, whatever their next words.
    FORK_TOKENS = 64
    # Fewer tokens are copied: attending to them apart would cost more than is saved.
    MIN_FORK_TOKENS = 512

    def __init__(self, capacity: int) -> None:
        self.capacity = _rounded_up(capacity)
        self.length = 0
        self.base: SequenceKV | None = None
        self.base_length = 0
        self._forks: WeakSet[SequenceKV] = WeakSet()
        self._layers: dict[int, LayerKV] = {}
        # Whether the buffers are somebody else's.
        self._lodges = False

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values behind ``length``, which stays as it is.

        Args:
            layer: The layer's index.
            keys: ``[kv_heads, tokens, head_dim]``.
            values: ``[kv_heads, tokens, head_dim]``.

        Returns:
            Views of all the layer's keys and values so far that are not in the base,
            ``[kv_heads, length - base_length + tokens, head_dim]``.
        """
        end = self.length + keys.shape[1]
        if end > self.capacity:
            self.reserve(max(end, self.capacity + self.capacity // 2))
        held = self._layers.get(layer)
        if held is None:
            held = self._layers[layer] = self._allocated(keys, values)
        own = slice(self.length - self.base_length, end - self.base_length)
        held.keys[:, own] = keys
        held.values[:, own] = values
        return held.keys[:, : own.stop], held.values[:, : own.stop]

    def hold(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Take over buffers that begin with a layer's tokens, ``[kv_heads, capacity, head_dim]`` each."""
        assert not self._lodges
        self._layers[layer] = LayerKV(keys, values)

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values at positions ``start … stop - 1``; the base's and its own are joined.

        Args:
            layer: The layer's index.
            start: At least 0.
            stop: At most what was written.

        Returns:
            ``[kv_heads, stop - start, head_dim]`` each: views where all of them lie in one buffer.
        """
        held = self._layers[layer]
        own = slice(max(start - self.base_length, 0), max(stop - self.base_length, 0))
        if self.base is None or start >= self.base_length:
            return held.keys[:, own], held.values[:, own]
        keys, values = self.base.read(layer, start, min(stop, self.base_length))
        if stop <= self.base_length:
            return keys, values
        return torch.cat([keys, held.keys[:, own]], 1), torch.cat([values, held.values[:, own]], 1)

    def layers(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each layer's index, keys and values, ``[kv_heads, length, head_dim]``."""
        for layer in self._layers:
            yield layer, *self.read(layer, 0, self.length)

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens, keeping the first ``length``."""
        if capacity <= self.capacity:
            return
        self.capacity = self.base_length + _rounded_up(capacity - self.base_length)
        self._reallocate()

    def move_to(self, layers: dict[int, LayerKV]) -> None:
        """Go on in somebody else's buffers, with all tokens, a base's too: until :meth:`move_out` or growth.

        Args:
            layers: Buffers for every layer, ``[kv_heads, capacity, head_dim]`` each, for at least ``length``
                tokens.
        """
        for layer, keys, values in self.layers():
            layers[layer].keys[:, : self.length] = keys
            layers[layer].values[:, : self.length] = values
        if self.base is not None:
            self.base._forks.discard(self)
        self.base, self.base_length = None, 0
        self.capacity = next(iter(layers.values())).keys.shape[1]
        self._layers, self._lodges = layers, True

    def move_out(self) -> None:
        """Go on in buffers of its own."""
        if self._lodges:
            self.capacity = _rounded_up(self.length)
            self._reallocate()

    def lies_in(self, layers: dict[int, LayerKV]) -> bool:
        """Whether it moved to these very buffers, and is still there."""
        return self._layers is layers

    def _reallocate(self) -> None:
        """New buffers for the capacity."""
        own = self.length - self.base_length
        # Another dictionary: the one that is left may be somebody else's. Layer by layer, so that old buffers
        # go before the next ones are made.
        self._layers = layers = dict(self._layers)
        for layer, held in layers.items():
            layers[layer] = self._allocated(held.keys[:, :own], held.values[:, :own])
        self._lodges = False

    def rollback(self, length: int) -> None:
        """Forget every token from position ``length`` on; a larger ``length`` changes nothing.

        Raises:
            ValueError: Forks read some of these tokens, or they are in the base.
        """
        length = min(self.length, max(length, 0))
        if length < max(self.base_length, self.forked_length):
            raise ValueError(
                f"rolling back to {length} of {self.length} tokens would take away tokens that are shared: "
                f"{self.base_length} of the base, {self.forked_length} read by forks. Use copy_prefix."
            )
        self.length = length

    @property
    def forked_length(self) -> int:
        """How many of the first tokens forks read here."""
        return max((fork.base_length for fork in self._forks), default=0)

    def fork(self, length: int, capacity: int) -> SequenceKV:
        """A cache that begins with this one's first ``length`` tokens and shares nearly all of them.

        Args:
            length: At most this cache's.
            capacity: Tokens to allocate for, the shared ones included.
        """
        base = self if self.base is None else self.base
        shared = length if self.base is None else min(length, self.base_length)
        shared -= shared % self.FORK_TOKENS
        if shared < self.MIN_FORK_TOKENS:
            return self.copy_prefix(length, capacity)
        fork = SequenceKV(max(capacity, length) - shared)
        fork.base, fork.base_length = base, shared
        fork.capacity += shared
        base._forks.add(fork)
        for layer in self._layers:
            fork._layers[layer] = fork._allocated(*self.read(layer, shared, length))
        fork.length = length
        return fork

    def copy_prefix(self, length: int, capacity: int) -> SequenceKV:
        """A cache of its own with this one's first ``length`` tokens."""
        copy = SequenceKV(max(capacity, length))
        for layer in self._layers:
            copy._layers[layer] = copy._allocated(*self.read(layer, 0, length))
        copy.length = length
        return copy

    def _allocated(self, keys: Tensor, values: Tensor) -> LayerKV:
        """Buffers for the capacity that begin with some keys and values."""
        return LayerKV(*(_grown(held, self.capacity - self.base_length) for held in (keys, values)))

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the keys and values of the first ``length`` tokens, shared ones included."""
        per_token = (
            buffer.shape[0] * buffer.shape[2] * buffer.element_size()
            for held in self._layers.values()
            for buffer in (held.keys, held.values)
        )
        return self.length * sum(per_token)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated here; the base's are its own."""
        return sum(held.keys.nbytes + held.values.nbytes for held in self._layers.values())


def _rounded_up(capacity: int) -> int:
    step = max(1, (1 << capacity.bit_length()) // 32)
    return -(-capacity // step) * step


def _grown(held: Tensor, capacity: int) -> Tensor:
    grown = held.new_empty(held.shape[0], capacity, held.shape[2])
    grown[:, : held.shape[1]] = held
    return grown


def common_prefix_length(left: np.ndarray, right: np.ndarray) -> int:
    """The number of leading elements two one-dimensional arrays share."""
    size = min(left.size, right.size)
    differing = np.nonzero(left[:size] != right[:size])[0]
    return int(differing[0]) if differing.size else size
