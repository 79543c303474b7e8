"""The packed attention function: ragged batches without padding.

A packed forward pass runs the model on one row with the new tokens of all sequences, one sequence after the
other. This module's attention function, registered with transformers under :data:`PACKED`, writes each
sequence's keys and values into that sequence's cache and attends its queries to the keys there, causally.
Prefill, drafting and verification are the same call with different numbers of tokens.

Outside a packed forward pass the function is transformers' own SDPA attention, so that other users of the
model are not affected by the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rapid_integrations.engine import processor
from rapid_integrations.engine.attention import cpu as cpu_kernels
from rapid_integrations.engine.attention import cuda as cuda_kernels
from rapid_integrations.engine.attention.split_kv import attend_in_parts, attend_shared
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.errors import UnsupportedModelError

PACKED = "rapid_packed"

# Arguments of some attention layers that are not implemented: Gemma 2's score cap, attention sinks, biases.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")

# Up to this many queries for each head of keys, two matrix products in float32 may beat the fused kernel.
_MAX_ROWS_BY_PRODUCTS = 12

# baddbmm needs an operand to add, even with beta=0.
_ZERO = torch.zeros((), dtype=torch.float32, device="cpu")

_batch: ContextVar[PackedBatch | None] = ContextVar("rapid_packed_batch", default=None)


class PackedBatch:
    """The sequences of one packed forward pass and their caches.

    Args:
        caches: The cache of each sequence. Their lengths are the numbers of tokens before the new ones.
        counts: The number of new tokens of each sequence, in the order of the row.
        num_logits: For how many of its last new tokens each sequence needs logits; ``None`` for all.
        kv_dtype: The dtype of keys, values and attention; ``None`` is the dtype that the model computes in.
    """

    def __init__(
        self,
        caches: Sequence[SequenceKV],
        counts: Sequence[int],
        num_logits: Sequence[int] | None = None,
        *,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.caches = caches
        self.kv_dtype = kv_dtype
        self.counts = list(counts)
        self.num_logits = self.counts if num_logits is None else list(num_logits)
        self.all_wanted = self.num_logits == self.counts
        self._groups = _sharing_groups(caches)
        self._sharing = {index for _, members in self._groups for index in members}
        self._masks: dict[tuple[int, int, int | None, torch.device, torch.dtype], Tensor] = {}

    @cached_property
    def wanted(self) -> Tensor | int:
        """The tokens that need logits: their indices in the row, or their number if they are its last."""
        if self.num_logits[-1] and (len(self.counts) == 1 or self.all_wanted):
            return sum(self.num_logits)
        ends = accumulate(self.counts)
        indices = (range(end - last, end) for end, last in zip(ends, self.num_logits, strict=True))
        return torch.tensor(list(chain.from_iterable(indices)), dtype=torch.long)

    def select_wanted(self, tokens: Tensor) -> Tensor:
        """The rows of a tensor ``[tokens, …]`` that belong to tokens that need logits."""
        wanted = self.wanted
        return tokens[-wanted:] if isinstance(wanted, int) else tokens[wanted.to(tokens.device)]

    def mask(
        self,
        past: int,
        new: int,
        window: int | None,
        device: torch.device,
        dtype: torch.dtype = torch.bool,
    ) -> Tensor:
        """A causal mask ``[new, past + new]``, built once for all layers of a pass.

        Args:
            past: The number of keys before the new tokens.
            new: The number of new tokens.
            window: How many keys a query sees, its own included; ``None`` for all before it.
            device: The device of the mask.
            dtype: ``torch.bool`` is true for visible keys; a floating dtype is 0 for visible keys and
                ``-inf`` for others.
        """
        key = (past, new, window, device, dtype)
        mask = self._masks.get(key)
        if mask is None:
            visible, hidden = (0.0, -torch.inf) if dtype.is_floating_point else (True, False)
            mask = torch.full((new, past + new), visible, dtype=dtype, device=device)
            later = torch.ones(new, new, dtype=torch.bool, device=device).triu_(1)
            mask[:, past:].masked_fill_(later, hidden)
            if window is not None:
                mask.masked_fill_(torch.ones_like(mask, dtype=torch.bool).tril_(past - window), hidden)
            self._masks[key] = mask
        return mask

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """Write each sequence's keys and values into its cache and attend its queries to all of its keys.

        Args:
            layer: The layer's index.
            query: ``[heads, queries, head_dim]``, one sequence after the other: of all new tokens, or of
                those that need logits.
            key: ``[kv_heads, tokens, head_dim]``, of all new tokens.
            value: ``[kv_heads, tokens, head_dim]``, of all new tokens.
            scaling: Factor on the scores; ``None`` is ``head_dim ** -0.5``.
            sliding_window: A query sees itself and the ``sliding_window - 1`` tokens before it; ``None`` all
                before it.

        Returns:
            Outputs in the shape and dtype of ``query``.
        """
        model_dtype = query.dtype
        if self.kv_dtype is not None:
            query, key, value = (tensor.to(self.kv_dtype) for tensor in (query, key, value))
        sizes = self.counts if query.shape[1] == key.shape[1] else self.num_logits
        # Each sequence's queries, which its outputs replace one by one.
        parts = _split(query, sizes)
        new_keys, new_values = _split(key, self.counts), _split(value, self.counts)
        for index, (cache, new) in enumerate(zip(self.caches, self.counts, strict=True)):
            keys, values = cache.write(layer, new_keys[index], new_values[index])
            if not sizes[index] or (index in self._sharing and sliding_window is None):
                continue
            if cache.base is not None:  # a window is short enough to be copied out of base and fork
                end = cache.length + new
                visible = (sliding_window or end) + sizes[index] - 1
                keys, values = cache.read(layer, max(0, end - visible), end)
            parts[index] = self._attend(parts[index], keys, values, scaling, sliding_window)
        if sliding_window is None:
            for base, sharing in self._groups:
                if members := [index for index in sharing if sizes[index]]:
                    outputs = attend_shared(
                        base,
                        layer,
                        [(self.caches[i], self.caches[i].length + self.counts[i], parts[i]) for i in members],
                        scaling,
                        self.mask,
                    )
                    for index, output in zip(members, outputs, strict=True):
                        parts[index] = output
        output = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return output.to(model_dtype)

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """Attend the last tokens of one sequence: queries ``[heads, new, head_dim]``, keys ``[kv_heads, …]``.

        With a window, the keys may begin later than the sequence.
        """
        new, total = query.shape[1], keys.shape[1]
        if window is not None and total >= window + new:
            # No query sees a key before the first query's window.
            total = window + new - 1
            keys, values = keys[:, -total:], values[:, -total:]
        windowed = window is not None and total > window
        if cuda_kernels.supports(query, keys, values):
            window = window if windowed and new > 1 else None
            return cuda_kernels.attention(query, keys, values, scaling, causal=new > 1, window=window)[0]
        if query.device.type == "cpu" and not windowed:
            if self._products_pay(query, keys):
                mask = self.mask(0, new, None, query.device) if new > 1 else None
                return _attention_by_products(query, keys, values, scaling, mask)
            # This includes single queries: SDPA would read shared keys once for each head.
            if 0 < new < total:
                return attend_in_parts(query, keys, values, scaling, self.mask)
        # A single query sees all remaining keys, and a sequence without a past needs no mask but is_causal.
        mask = None
        if windowed or 1 < new < total:
            mask = self.mask(total - new, new, window if windowed else None, query.device)
        return F.scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None and new > 1,
            scale=scaling,
            enable_gqa=query.shape[0] != keys.shape[0],
        )[0]

    @staticmethod
    def _products_pay(query: Tensor, keys: Tensor) -> bool:
        """Whether :func:`_attention_by_products` is the fastest way to attend to all of the keys."""
        groups, new = query.shape[0] // keys.shape[0], query.shape[1]
        rows, profile = groups * new, processor.CURRENT
        if query.dtype != torch.float32 or rows > _MAX_ROWS_BY_PRODUCTS:
            return False
        if new == 1:
            return groups > 1 or profile.single_query_by_products
        return not (profile.fused_attention or cpu_kernels.pays(query, rows, keys.shape[1]))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the batch of the models that are called in the block."""
        token = _batch.set(self)
        try:
            yield
        finally:
            _batch.reset(token)


def _attention_by_products(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, mask: Tensor | None
) -> Tensor:
    """Attention of a few new tokens by two matrix products, as :func:`attend_in_parts`.

    ``mask`` is ``[new, new]``: which of the new tokens each of them sees; ``None`` for a single token.
    """
    heads, new, head_dim = query.shape
    # Heads that share keys become additional queries of these keys.
    folded = query.reshape(keys.shape[0], -1, head_dim)
    scale = head_dim**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(_ZERO, folded, keys.transpose(1, 2), beta=0, alpha=scale)
    if mask is not None:
        scores.view(heads, new, -1)[:, :, -new:].masked_fill_(~mask, -torch.inf)
    # In place, because page faults in newly allocated memory of this size cost more than a product.
    weights = torch.softmax(scores, -1, out=scores)
    return torch.bmm(weights, values).view(heads, new, head_dim)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the active :class:`PackedBatch`, with the signature that transformers calls.

    Args:
        module: The attention layer; its ``layer_idx`` is the index of the layer in the caches.
        query: ``[1, heads, tokens, head_dim]``, the tokens of all sequences one after the other.
        key: ``[1, kv_heads, tokens, head_dim]``.
        value: ``[1, kv_heads, tokens, head_dim]``.
        attention_mask: ``None`` in a packed pass.
        scaling: Factor on the scores; ``None`` is ``head_dim ** -0.5``.
        sliding_window: A query sees itself and the ``sliding_window - 1`` tokens before it; ``None`` all
            before it.
        **kwargs: Other arguments of transformers' interface.

    Returns:
        ``[1, tokens, heads, head_dim]`` and no attention weights.

    Raises:
        UnsupportedModelError: The layer uses a feature that packed attention does not support.
    """
    batch = _batch.get()
    if batch is None:
        if sliding_window is not None:
            kwargs["sliding_window"] = sliding_window
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if unsupported := [name for name in _UNSUPPORTED if kwargs.get(name) is not None]:
        raise UnsupportedModelError(
            f"the model's attention uses {', '.join(unsupported)}, which packed attention does not support."
        )
    layer: int = module.layer_idx  # type: ignore[assignment]  # torch types module attributes as Tensor | Module
    output = batch.attend(layer, query[0], key[0], value[0], scaling=scaling, sliding_window=sliding_window)
    return output.transpose(0, 1)[None].contiguous(), None


def _split(tokens: Tensor, sizes: list[int]) -> list[Tensor]:
    """Split a tensor ``[heads, tokens, head_dim]`` into the parts of the sequences."""
    return [tokens] if len(sizes) == 1 else list(torch.split(tokens, sizes, dim=1))


def _sharing_groups(caches: Sequence[SequenceKV]) -> list[tuple[SequenceKV, list[int]]]:
    """Each base with the indices of the sequences that read it: its forks, and the base itself if present."""
    members: dict[SequenceKV, list[int]] = {}
    for index, cache in enumerate(caches):
        if cache.base is not None:
            members.setdefault(cache.base, []).append(index)
    for index, cache in enumerate(caches):
        if cache in members:
            members[cache].append(index)
    return list(members.items())


def _packed_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **kwargs) if _batch.get() is None else None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _packed_mask)
