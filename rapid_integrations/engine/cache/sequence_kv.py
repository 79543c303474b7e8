"""The key/value cache of one sequence: preallocated buffers written by position, with O(1) rollback.

``SequenceKV.length`` is the number of tokens whose keys and values are valid. A forward pass writes after
them, and the model then advances ``length``. A rollback assigns a smaller ``length``; it moves no data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True)
class LayerKV:
    """One layer's keys and values, each ``[kv_heads, capacity, head_dim]``."""

    keys: Tensor
    values: Tensor


class SequenceKV:
    """The KV cache of one token sequence in one model.

    Each layer's buffers take their shape, dtype and device from the first keys and values written to it.
    Grouped heads, heads of different sizes and layers on several devices therefore need no configuration.

    A *fork* of a cache refers to the other cache, its *base*, for the first tokens and stores only the tokens
    after them. The base may still be used and extended, but tokens that forks refer to cannot be rolled back.

    Args:
        capacity: Tokens to allocate for, rounded up by at most a sixteenth: a slightly longer question about
            the same text then needs no new buffers. A write beyond it enlarges it by at least half.

    Attributes:
        capacity: Tokens that fit without new buffers, those of the base included.
        length: Tokens whose keys and values are valid, those of the base included.
        base: The cache that holds the first ``base_length`` tokens; ``None`` if this cache holds all.
        base_length: The number of tokens in the base.
        owns_buffers: False while the buffers belong to another object (:meth:`move_to_buffers`).
    """

    # Forks share a multiple of this, so that forks of one text share the same length whatever follows it.
    FORK_TOKENS = 64
    # Shorter prefixes are copied: attending to them separately costs more than sharing saves.
    MIN_FORK_TOKENS = 512

    def __init__(self, capacity: int) -> None:
        self.capacity = _rounded_up(capacity)
        self.length = 0
        self.base: SequenceKV | None = None
        self.base_length = 0
        self.owns_buffers = True
        self._forks: WeakSet[SequenceKV] = WeakSet()
        self._layers: dict[int, LayerKV] = {}

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values after the first ``length`` tokens. ``length`` stays the same.

        Args:
            layer: The layer's index.
            keys: ``[kv_heads, tokens, head_dim]``.
            values: ``[kv_heads, tokens, head_dim]``.

        Returns:
            Views of the layer's keys and values that are stored in this cache, without those in the base:
            ``[kv_heads, length - base_length + tokens, head_dim]``.
        """
        end = self.length + keys.shape[1]
        if end > self.capacity:
            self.reserve(max(end, self.capacity + self.capacity // 2))
        held = self._layers.get(layer)
        if held is None:
            held = self._layers[layer] = self._allocated(keys, values)
        new = slice(self.length - self.base_length, end - self.base_length)
        held.keys[:, new] = keys
        held.values[:, new] = values
        return held.keys[:, : new.stop], held.values[:, : new.stop]

    def set_buffers(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Use given buffers for a layer, ``[kv_heads, capacity, head_dim]`` each, first token first."""
        self._layers[layer] = LayerKV(keys, values)

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values at positions ``start … stop - 1``, in the base and in this cache.

        Args:
            layer: The layer's index.
            start: At least 0.
            stop: At most the number of tokens written.

        Returns:
            ``[kv_heads, stop - start, head_dim]`` each: views if all positions are in one buffer, else
            copies.
        """
        held = self._layers[layer]
        local = slice(max(start - self.base_length, 0), max(stop - self.base_length, 0))
        if self.base is None or start >= self.base_length:
            return held.keys[:, local], held.values[:, local]
        keys, values = self.base.read(layer, start, min(stop, self.base_length))
        if stop <= self.base_length:
            return keys, values
        return torch.cat([keys, held.keys[:, local]], 1), torch.cat([values, held.values[:, local]], 1)

    @property
    def layer_indices(self) -> list[int]:
        """The indices of the layers that have been written."""
        return list(self._layers)

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

    def move_to_buffers(self, layers: dict[int, LayerKV]) -> None:
        """Copy all tokens, including the shared prefix, into externally owned buffers and use these.

        The cache leaves them again when it needs more room or :meth:`move_to_own_buffers` is called.

        Args:
            layers: Buffers for every layer, ``[kv_heads, capacity, head_dim]`` each, with room for at least
                ``length`` tokens.
        """
        for layer, buffers in layers.items():
            keys, values = self.read(layer, 0, self.length)
            buffers.keys[:, : self.length] = keys
            buffers.values[:, : self.length] = values
        if self.base is not None:
            self.base._forks.discard(self)
        self.base, self.base_length = None, 0
        self.capacity = next(iter(layers.values())).keys.shape[1]
        self._layers, self.owns_buffers = layers, False

    def move_to_own_buffers(self) -> None:
        """Copy the tokens out of externally owned buffers; no effect if the cache owns its buffers."""
        if not self.owns_buffers:
            self.capacity = _rounded_up(self.length)
            self._reallocate()

    def _reallocate(self) -> None:
        """Replace all buffers by new ones of the current capacity."""
        length = self.length - self.base_length
        # A new dictionary, because the old one may belong to another object. One layer at a time, so that
        # each old buffer is freed before the next new one is allocated.
        self._layers = layers = dict(self._layers)
        for layer, held in layers.items():
            layers[layer] = self._allocated(held.keys[:, :length], held.values[:, :length])
        self.owns_buffers = True

    def rollback(self, length: int) -> None:
        """Drop every token from position ``length`` on; a ``length`` beyond the current one has no effect.

        Raises:
            ValueError: Some of these tokens are in the base, or forks refer to them.
        """
        length = min(self.length, max(length, 0))
        if length < max(self.base_length, self.forked_length):
            raise ValueError(
                f"rolling back to {length} of {self.length} tokens would remove shared tokens: the first "
                f"{self.base_length} are in the base, the first {self.forked_length} are read by forks. Use "
                "copy_prefix."
            )
        self.length = length

    @property
    def forked_length(self) -> int:
        """The number of first tokens that forks read from this cache."""
        return max((fork.base_length for fork in self._forks), default=0)

    def fork(self, length: int, capacity: int) -> SequenceKV:
        """A cache with this one's first ``length`` tokens, most of which it shares instead of copying.

        Args:
            length: At most this cache's length.
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
        """An independent cache with a copy of this one's first ``length`` tokens."""
        copy = SequenceKV(max(capacity, length))
        for layer in self._layers:
            copy._layers[layer] = copy._allocated(*self.read(layer, 0, length))
        copy.length = length
        return copy

    def _allocated(self, keys: Tensor, values: Tensor) -> LayerKV:
        """Buffers of the current capacity that begin with the given keys and values."""
        capacity = self.capacity - self.base_length
        return LayerKV(_extended(keys, capacity), _extended(values, capacity))

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
        """Bytes of this cache's buffers, without those of its base."""
        return sum(held.keys.nbytes + held.values.nbytes for held in self._layers.values())


def _rounded_up(capacity: int) -> int:
    step = max(1, (1 << capacity.bit_length()) // 32)
    return -(-capacity // step) * step


def _extended(held: Tensor, capacity: int) -> Tensor:
    extended = held.new_empty(held.shape[0], capacity, held.shape[2])
    extended[:, : held.shape[1]] = held
    return extended


def common_prefix_length(left: np.ndarray, right: np.ndarray) -> int:
    """The number of leading elements that two one-dimensional arrays have in common."""
    size = min(left.size, right.size)
    differing = np.nonzero(left[:size] != right[:size])[0]
    return int(differing[0]) if differing.size else size
