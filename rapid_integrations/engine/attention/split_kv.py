"""Attention of several sequences that begin alike, over one copy of what they share.

The keys that sequences share are read once for all of their queries, what is a sequence's own apart, and the
partial results are put together by their log-sum-exps: ``out = sum_k exp(lse_k - lse) out_k`` with
``lse = log sum_k exp(lse_k)`` (M. Milakov and N. Gimelshein, arXiv:1805.02867; J. Juravsky et al.,
"Hydragen", arXiv:2402.05099).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rapid_integrations.engine.attention import cpu as cpu_kernels
from rapid_integrations.engine.attention import cuda as cuda_kernels
from rapid_integrations.engine.cache.sequence_kv import SequenceKV

# Keys whose scores exist at a time where no fused kernel returns the log-sum-exp.
_BLOCK_KEYS = 4096
# The past that fewer new tokens attend to without a mask ends at a multiple of this.
_PAST_TOKENS = 512
# So few new tokens take a mask over all of their keys, which is small: one call instead of two and a merger.
# (A Xeon, 700 to 8k keys: 2 to 12 of them take a target's pass 5 to 30 % less time.)
_MASKED_TOKENS = 32

MaskOf = Callable[[int, int, int | None, torch.device, torch.dtype], Tensor]
Partial = tuple[Tensor, Tensor]
"""An output ``[heads, queries, head_dim]`` and its scores' log-sum-exps ``[heads, queries, 1]``, float32."""


def attend_shared(
    base: SequenceKV,
    layer: int,
    members: Sequence[tuple[SequenceKV, int, Tensor]],
    scaling: float | None,
    mask_of: MaskOf,
) -> list[Tensor]:
    """Attend the new tokens of sequences that share a base; their keys and values are written already.

    Args:
        base: Holds what they share.
        layer: The layer.
        members: Forks of the base, and the base itself if it takes part, each with how many tokens it has
            with the new ones, and with the queries of the last of them, ``[heads, queries, head_dim]``.
        scaling: Factor on the scores; ``None`` is ``head_dim ** -0.5``.
        mask_of: Causal masks, by tokens before, new tokens, window, device and dtype.

    Returns:
        Each member's output, as its queries.
    """
    queries = [query for _, _, query in members]
    # How much of the base each member sees as shared: the base itself goes as far as any fork.
    lengths = [cache.base_length for cache, _, _ in members]
    longest = max(lengths)
    lengths = [length or longest for length in lengths]
    partials: list[list[Partial]] = [[] for _ in members]
    for start, stop in pairwise(sorted({0, *lengths})):
        together = [index for index, length in enumerate(lengths) if length >= stop]
        joined = torch.cat([queries[index] for index in together], 1)
        output, lse = _partial_attention(joined, *base.read(layer, start, stop), scaling)
        sizes = [queries[index].shape[1] for index in together]
        pieces = zip(torch.split(output, sizes, 1), torch.split(lse, sizes, 1), strict=True)
        for index, partial in zip(together, pieces, strict=True):
            partials[index].append(partial)
    outputs = []
    for (cache, end, query), length, found in zip(members, lengths, partials, strict=True):
        keys, values = cache.read(layer, length, end)
        causal = mask_of if query.shape[1] > 1 else None
        found.append(_partial_attention(query, keys, values, scaling, causal))
        outputs.append(_merged(found).to(query.dtype))
    return outputs


def attend_in_parts(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, mask_of: MaskOf
) -> Tensor:
    """Attend one or more new tokens behind a past: all see all of it, so that only what is new needs a mask.

    A mask over the past too is as large as the scores of a head: only a few new tokens take one. The past's
    last tokens go with some new ones, so that the numbers of keys that all see repeat: oneDNN prepares itself
    anew for every shape. Many new tokens, as a prompt's, go by themselves, for a causal kernel computes half
    of their scores.

    Args:
        query: ``[heads, new, head_dim]``.
        keys: ``[kv_heads, total, head_dim]``, those of the new tokens last.
        values: The same.
        scaling: Factor on the scores; ``None`` is ``head_dim ** -0.5``.
        mask_of: Causal masks, by tokens before, new tokens, window, device and dtype.

    Returns:
        As ``query``.
    """
    new, total = query.shape[1], keys.shape[1]
    past = total - new
    rows = query.shape[0] // keys.shape[0] * new
    if new <= _MASKED_TOKENS and not cpu_kernels.pays_for_attention(query, rows, past):
        mask = mask_of(past, new, None, query.device, query.dtype) if new > 1 else None
        return _fused_attention(query, keys, values, scaling, mask)[0].reshape(query.shape)
    if new < _PAST_TOKENS:
        past -= past % _PAST_TOKENS
        among = _partial_attention(query, keys[:, past:], values[:, past:], scaling, mask_of)
    else:
        among = _causal_attention(query, keys[:, past:], values[:, past:], scaling)
    if not past:
        return among[0].to(query.dtype)
    before = _partial_attention(query, keys[:, :past], values[:, :past], scaling)
    return _merged([before, among]).to(query.dtype)


def _partial_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, causal: MaskOf | None = None
) -> Partial:
    """Attention over some of the keys.

    Args:
        query: ``[heads, queries, head_dim]``.
        keys: ``[kv_heads, keys, head_dim]``.
        values: The same.
        scaling: Factor on the scores; ``None`` is ``head_dim ** -0.5``.
        causal: Makes masks, where the queries are those of the last keys; ``None``: all of them are seen.
    """
    if cuda_kernels.takes(query, keys, values):
        output, lse = cuda_kernels.attention(query, keys, values, scaling, causal=causal is not None)
        return output.float(), lse
    heads, count, width = query.shape
    rows = heads // keys.shape[0] * count
    mask = None
    if causal is not None:
        mask = causal(keys.shape[1] - count, count, None, query.device, query.dtype)
    if query.device.type == "cpu" and (
        mask is not None or not cpu_kernels.pays_for_attention(query, rows, keys.shape[1])
    ):
        output, lse = _fused_attention(query, keys, values, scaling, mask)
        return output.float().reshape(heads, count, width), lse.float().reshape(heads, count, 1)
    # Heads that share keys are further queries of theirs.
    folded = query.reshape(keys.shape[0], rows, width)
    scale = width**-0.5 if scaling is None else scaling
    if query.device.type == "cpu":
        output, lse = _joined(cpu_kernels.attention_by_heads(folded * scale, keys, values))
    else:
        if mask is not None:
            mask = mask.repeat(rows // count, 1)
        output, lse = _blockwise(folded.float() * scale, keys, values, mask)
    return output.reshape(heads, count, width), lse.reshape(heads, count, 1)


def _fused_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention by torch's fused kernel on a CPU; arguments as of :func:`_partial_attention`.

    Returns:
        ``[kv_heads, heads / kv_heads * queries, head_dim]`` and ``[kv_heads, heads / kv_heads * queries]``.
    """
    kv_heads, groups = keys.shape[0], query.shape[0] // keys.shape[0]
    if groups > 1:  # heads that share keys are further queries of theirs
        query = query.reshape(kv_heads, -1, query.shape[2])
        mask = None if mask is None else mask.repeat(groups, 1)
    rows = query.shape[1]
    if rows == 1 and query.dtype == torch.bfloat16 and cpu_kernels.HERE.bfloat16_in_pairs:
        query = query.expand(-1, 2, -1)  # there is no mask for one
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], keys[None], values[None], attn_mask=mask, scale=scaling
    )
    return output[0, :, :rows], lse[0, :, :rows]


def _causal_attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Partial:
    """Attention of tokens among themselves, on a CPU; arguments as of :func:`attend_in_parts`."""
    heads, count, width = query.shape
    by_keys = query.view(keys.shape[0], -1, count, width)
    keys, values = (held[:, None].expand(-1, by_keys.shape[1], -1, -1) for held in (keys, values))
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        by_keys, keys, values, is_causal=True, scale=scaling
    )
    return output.float().reshape(heads, count, width), lse.float().reshape(heads, count, 1)


def _blockwise(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Partial:
    """Scaled queries over blocks of keys, in float32."""
    partials = []
    for start in range(0, keys.shape[1], _BLOCK_KEYS):
        block = slice(start, start + _BLOCK_KEYS)
        scores = query @ keys[:, block].float().transpose(1, 2)
        if mask is not None:
            # Not added: a score that overflowed would not be hidden.
            scores = scores.masked_fill(mask[:, block] < 0, -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        # A block of which a query sees nothing has no weight.
        weights = (scores - lse.clamp_min(torch.finfo(scores.dtype).min)).exp()
        partials.append((weights @ values[:, block].float(), lse))
    return _joined(partials)


def _joined(partials: Sequence[Partial]) -> Partial:
    """One partial result over all of the keys."""
    if len(partials) == 1:
        return partials[0]
    return _merged(partials), torch.stack([lse for _, lse in partials]).logsumexp(0)


def _merged(partials: Sequence[Partial]) -> Tensor:
    """The output over all of the keys."""
    if len(partials) == 1:
        return partials[0][0]
    lses = torch.stack([lse for _, lse in partials])
    weights = (lses - lses.logsumexp(0)).exp()
    return (weights * torch.stack([output for output, _ in partials])).sum(0)
