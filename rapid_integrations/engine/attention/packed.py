"""The packed attention function: ragged batches without padding or masks.

A packed forward pass runs the model on one row that holds the new tokens of every sequence one after the
other. This module's attention function, registered with transformers under :data:`PACKED`, writes each
sequence's keys and values into that sequence's own cache and attends its queries to its own keys, aligned
lower-right. Prefill, drafting and verification are the same call with different numbers of tokens.

Outside a packed forward pass the function is transformers' own SDPA attention, so that a model which the
engine uses keeps working for everybody else.
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

from rapid_integrations.engine.attention import cpu as cpu_kernels
from rapid_integrations.engine.attention import cuda as cuda_kernels
from rapid_integrations.engine.attention.split_kv import attend_in_parts, attend_shared
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.errors import UnsupportedModelError

PACKED = "rapid_packed"

# What some attention layers pass along and this function does not do: Gemma 2's score cap, sinks, biases.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")

# Queries to a head of keys up to which two matrix products, in float32, beat a fused kernel that is not fast:
# on a Zen 4 by a fifth for one query, a tenth for twelve, over 2k and 16k keys. Everywhere they do so for a
# single token whose heads share keys: half the time on a Xeon.
_FEW_ROWS = 12

# What is added to scores: products need something to add to.
_NOTHING = torch.zeros((), dtype=torch.float32, device="cpu")

_batch: ContextVar[PackedBatch | None] = ContextVar("rapid_packed_batch", default=None)


class PackedBatch:
    """What one packed forward pass attends over.

    Args:
        caches: One cache a sequence; their lengths are the numbers of tokens already there.
        counts: New tokens of each sequence, in the order of the row.
        num_logits: For how many of each one's last new tokens the logits are wanted; ``None``: for all.
        kv_dtype: What keys and values are held in, and attended to in; ``None``: what the model computes in.
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
        """The tokens whose logits are wanted: their places in the row, or how many at its end."""
        if self.num_logits[-1] and (len(self.counts) == 1 or self.all_wanted):
            return sum(self.num_logits)
        ends = accumulate(self.counts)
        places = (range(end - last, end) for end, last in zip(ends, self.num_logits, strict=True))
        return torch.tensor(list(chain.from_iterable(places)), dtype=torch.long)

    def of_wanted(self, tokens: Tensor) -> Tensor:
        """What a tensor ``[tokens, …]`` holds of the tokens whose logits are wanted."""
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
        """Where queries may look, ``[new, keys]``; the keys are the last ``past + new`` ones.

        The same for every layer of a kind, hence built once a pass.

        Args:
            past: Tokens before the new ones.
            new: New tokens.
            window: How far they look back, themselves included; ``None``: to the first.
            device: Where it is needed.
            dtype: ``torch.bool``: true where a query may look; a floating one: 0 there, ``-inf`` elsewhere.
        """
        key = (past, new, window, device, dtype)
        mask = self._masks.get(key)
        if mask is None:
            seen, unseen = (0.0, -torch.inf) if dtype.is_floating_point else (True, False)
            mask = torch.full((new, past + new), seen, dtype=dtype, device=device)
            later = torch.ones(new, new, dtype=torch.bool, device=device).triu_(1)
            mask[:, past:].masked_fill_(later, unseen)
            if window is not None:
                mask.masked_fill_(torch.ones_like(mask, dtype=torch.bool).tril_(past - window), unseen)
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
            layer: The caches' layer.
            query: ``[heads, queries, head_dim]``, the sequences one after the other: of all new tokens, or of
                those whose logits are wanted.
            key: ``[kv_heads, tokens, head_dim]``, of all new tokens.
            value: ``[kv_heads, tokens, head_dim]``.
            scaling: Factor on the scores; ``None`` is ``head_dim ** -0.5``.
            sliding_window: A query sees itself and the ``sliding_window - 1`` tokens before; ``None``: all.

        Returns:
            As ``query``.
        """
        computed_in = query.dtype
        if self.kv_dtype is not None:
            query, key, value = (tensor.to(self.kv_dtype) for tensor in (query, key, value))
        # As many queries as tokens: then all of them are wanted.
        sizes = self.counts if query.shape[1] == key.shape[1] else self.num_logits
        # Queries, each of which becomes its output; a sequence without queries only writes.
        parts, new_keys, new_values = (
            _split(query, sizes),
            _split(key, self.counts),
            _split(value, self.counts),
        )
        for index, (cache, new) in enumerate(zip(self.caches, self.counts, strict=True)):
            keys, values = cache.write(layer, new_keys[index], new_values[index])
            if not sizes[index] or (index in self._sharing and sliding_window is None):
                continue
            if cache.base is not None:  # a window is short enough to be put together
                end = cache.length + new
                seen = (sliding_window or end) + sizes[index] - 1
                keys, values = cache.read(layer, max(0, end - seen), end)
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
        return output.to(computed_in)

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """One sequence: queries ``[heads, new, head_dim]``, keys ``[kv_heads, total, head_dim]``.

        The queries are of the last tokens that the keys are of.
        """
        new, total = query.shape[1], keys.shape[1]
        # The keys may begin later than the sequence does: only how far back a query looks matters.
        if window is not None and total >= window + new:
            # No query looks further back than the oldest one's window.
            total = window + new - 1
            keys, values = keys[:, -total:], values[:, -total:]
        windowed = window is not None and total > window
        if cuda_kernels.takes(query, keys, values):
            last = window if windowed and new > 1 else None
            return cuda_kernels.attention(query, keys, values, scaling, causal=new > 1, window=last)[0]
        if query.device.type == "cpu" and not windowed:
            shared_by = query.shape[0] // keys.shape[0]
            rows = shared_by * new
            if new == 1:
                few = shared_by > 1 or cpu_kernels.HERE.single_query_by_products
            else:
                fused = cpu_kernels.HERE.fused_attention
                few = not (fused or cpu_kernels.pays_for_attention(query, rows, total))
            if few and rows <= _FEW_ROWS and query.dtype == torch.float32:
                own = self.mask(0, new, None, query.device) if new > 1 else None
                return _matmul_attention(query, keys, values, scaling, own)
            # One query, too: the call below reads keys that heads share once for each head.
            if 0 < new < total:
                return attend_in_parts(query, keys, values, scaling, self.mask)
        # A single query sees every key that is left; a sequence without a past is plainly causal.
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

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the models called inside attend over this batch."""
        token = _batch.set(self)
        try:
            yield
        finally:
            _batch.reset(token)


def _matmul_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, mask: Tensor | None
) -> Tensor:
    """A few new tokens: arguments and result as of :func:`attend_in_parts`; one token needs no mask."""
    heads, new, width = query.shape
    # Heads that share keys are further queries of theirs.
    folded = query.reshape(keys.shape[0], -1, width)
    scale = width**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(_NOTHING, folded, keys.transpose(1, 2), beta=0, alpha=scale)
    if mask is not None:
        scores.view(heads, new, -1)[:, :, -new:].masked_fill_(~mask, -torch.inf)
    # In place: a second array of this size may be fresh memory, whose page faults cost more than a product.
    weights = torch.softmax(scores, -1, out=scores)
    return torch.bmm(weights, values).view(heads, new, width)


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
    """Attention over the active :class:`PackedBatch`, in the form transformers calls it.

    Args:
        module: The attention layer; its ``layer_idx`` names the cache's layer.
        query: ``[1, heads, tokens, head_dim]``, the tokens of all sequences one after the other.
        key: ``[1, kv_heads, tokens, head_dim]``.
        value: ``[1, kv_heads, tokens, head_dim]``.
        attention_mask: ``None`` in a packed pass.
        scaling: Factor on the scores; ``None`` is ``head_dim ** -0.5``.
        sliding_window: A query sees itself and the ``sliding_window - 1`` tokens before; ``None`` sees all.
        **kwargs: The rest of transformers' interface.

    Returns:
        ``[1, tokens, heads, head_dim]`` and no attention weights.

    Raises:
        UnsupportedModelError: The layer needs something this function does not do.
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
    """The sequences' parts of a tensor ``[heads, tokens, head_dim]``."""
    return [tokens] if len(sizes) == 1 else list(torch.split(tokens, sizes, dim=1))


def _sharing_groups(caches: Sequence[SequenceKV]) -> list[tuple[SequenceKV, list[int]]]:
    """Bases, and the indices of the sequences that read them: forks, and the base itself where it is one."""
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
