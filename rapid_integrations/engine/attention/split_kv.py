"""Attention over several parts of the keys, and of several sequences over one copy of a shared prefix.

Shared keys are read once for the queries of all sequences, and each sequence's own keys separately. Partial
results are merged by the log-sum-exp of their scores: ``out = sum_k exp(lse_k - lse) out_k`` with
``lse = log sum_k exp(lse_k)`` (M. Milakov and N. Gimelshein, arXiv:1805.02867; J. Juravsky et al.,
"Hydragen", arXiv:2402.05099).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rapid_integrations.engine import processor
from rapid_integrations.engine.attention import cpu as cpu_kernels
from rapid_integrations.engine.attention import cuda as cuda_kernels
from rapid_integrations.engine.cache.sequence_kv import SequenceKV

# Keys whose scores are in memory at a time where no fused kernel returns the log-sum-exp.
_BLOCK_KEYS = 4096
# The part of the past that is attended to without a mask has a multiple of this length.
_PAST_MULTIPLE = 512
# Up to this many new tokens, one call with a mask over all keys beats two calls and a merge.
_MAX_MASKED_TOKENS = 32

MaskOf = Callable[[int, int, int | None, torch.device, torch.dtype], Tensor]
"""Makes a causal mask: tokens before, new tokens, window, device, dtype."""

Partial = tuple[Tensor, Tensor]
"""An output ``[heads, queries, head_dim]`` and the log-sum-exp ``[heads, queries, 1]``, in float32."""


def attend_shared(
    base: SequenceKV,
    layer: int,
    members: Sequence[tuple[SequenceKV, int, Tensor]],
    scaling: float | None,
    mask_of: MaskOf,
) -> list[Tensor]:
    """Attend the new tokens of sequences that share a base; their keys and values are written already.

    Args:
        base: The cache with the shared prefix.
        layer: The layer's index.
        members: Forks of the base, and the base itself if it takes part: the cache, its number of tokens
            including the new ones, and the queries of its last tokens, ``[heads, queries, head_dim]``.
        scaling: Factor on the scores; ``None`` is ``head_dim ** -0.5``.
        mask_of: Makes causal masks.

    Returns:
        Each member's output, in the shape of its queries.
    """
    queries = [query for _, _, query in members]
    lengths = [cache.base_length for cache, _, _ in members]
    # The base itself has base_length 0; it takes part in the sharing up to the longest fork.
    longest = max(lengths)
    lengths = [length or longest for length in lengths]
    partials: list[list[Partial]] = [[] for _ in members]
    for start, stop in pairwise(sorted({0, *lengths})):
        sharing = [index for index, length in enumerate(lengths) if length >= stop]
        joined = torch.cat([queries[index] for index in sharing], 1)
        output, lse = _partial_attention(joined, *base.read(layer, start, stop), scaling)
        sizes = [queries[index].shape[1] for index in sharing]
        pieces = zip(torch.split(output, sizes, 1), torch.split(lse, sizes, 1), strict=True)
        for index, partial in zip(sharing, pieces, strict=True):
            partials[index].append(partial)
    outputs = []
    for (cache, end, query), length, shared in zip(members, lengths, partials, strict=True):
        keys, values = cache.read(layer, length, end)
        causal = mask_of if query.shape[1] > 1 else None
        separate = _partial_attention(query, keys, values, scaling, causal)
        outputs.append(_merged([*shared, separate]).to(query.dtype))
    return outputs


def attend_in_parts(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, mask_of: MaskOf
) -> Tensor:
    """Attend new tokens after a past on a CPU. All of them see the whole past, which needs no mask.

    Up to :data:`_MAX_MASKED_TOKENS` tokens use one mask over all keys. More tokens attend to the past and to
    each other separately, because a mask over the past would be as large as the scores of a head. The last
    tokens of the past are computed together with the new ones, so that the remaining past has one of few
    lengths: oneDNN compiles a kernel for every new shape. Many new tokens, as in a prompt, use a causal
    kernel among themselves, which computes half of the scores.

    Args:
        query: ``[heads, new, head_dim]``.
        keys: ``[kv_heads, total, head_dim]``, those of the new tokens last.
        values: ``[kv_heads, total, head_dim]``.
        scaling: Factor on the scores; ``None`` is ``head_dim ** -0.5``.
        mask_of: Makes causal masks.

    Returns:
        Outputs in the shape of ``query``.
    """
    new, total = query.shape[1], keys.shape[1]
    past = total - new
    rows = query.shape[0] // keys.shape[0] * new
    if new <= _MAX_MASKED_TOKENS and not cpu_kernels.pays(query, rows, past):
        mask = mask_of(past, new, None, query.device, query.dtype) if new > 1 else None
        return _fused_attention(query, keys, values, scaling, mask)[0].reshape(query.shape)
    if new < _PAST_MULTIPLE:
        past -= past % _PAST_MULTIPLE
        recent = _partial_attention(query, keys[:, past:], values[:, past:], scaling, mask_of)
    else:
        recent = _causal_attention(query, keys[:, past:], values[:, past:], scaling)
    if not past:
        return recent[0].to(query.dtype)
    before = _partial_attention(query, keys[:, :past], values[:, :past], scaling)
    return _merged([before, recent]).to(query.dtype)


def _partial_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, causal: MaskOf | None = None
) -> Partial:
    """Attention over a part of the keys.

    Args:
        query: ``[heads, queries, head_dim]``.
        keys: ``[kv_heads, keys, head_dim]``.
        values: ``[kv_heads, keys, head_dim]``.
        scaling: Factor on the scores; ``None`` is ``head_dim ** -0.5``.
        causal: Makes masks if the queries belong to the last keys; ``None`` if every query sees all keys.
    """
    if cuda_kernels.supports(query, keys, values):
        output, lse = cuda_kernels.attention(query, keys, values, scaling, causal=causal is not None)
        return output.float(), lse
    heads, count, head_dim = query.shape
    rows = heads // keys.shape[0] * count
    mask = None
    if causal is not None:
        mask = causal(keys.shape[1] - count, count, None, query.device, query.dtype)
    on_cpu = query.device.type == "cpu"
    if on_cpu and (mask is not None or not cpu_kernels.pays(query, rows, keys.shape[1])):
        output, lse = _fused_attention(query, keys, values, scaling, mask)
        return output.float().reshape(heads, count, head_dim), lse.float().reshape(heads, count, 1)
    # Heads that share keys become additional queries of these keys.
    folded = query.reshape(keys.shape[0], rows, head_dim)
    scale = head_dim**-0.5 if scaling is None else scaling
    if on_cpu:
        output, lse = _joined(cpu_kernels.attention_by_heads(folded * scale, keys, values))
    else:
        if mask is not None:
            mask = mask.repeat(rows // count, 1)
        output, lse = _blockwise(folded.float() * scale, keys, values, mask)
    return output.reshape(heads, count, head_dim), lse.reshape(heads, count, 1)


def _fused_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention by torch's fused kernel on a CPU; arguments as in :func:`_partial_attention`.

    Returns:
        ``[kv_heads, heads / kv_heads * queries, head_dim]`` and ``[kv_heads, heads / kv_heads * queries]``.
    """
    kv_heads, groups = keys.shape[0], query.shape[0] // keys.shape[0]
    if groups > 1:  # heads that share keys become additional queries
        query = query.reshape(kv_heads, -1, query.shape[2])
        mask = None if mask is None else mask.repeat(groups, 1)
    rows = query.shape[1]
    if rows == 1 and query.dtype == torch.bfloat16 and processor.CURRENT.bfloat16_in_pairs:
        query = query.expand(-1, 2, -1)  # a single query has no mask
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], keys[None], values[None], attn_mask=mask, scale=scaling
    )
    return output[0, :, :rows], lse[0, :, :rows]


def _causal_attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Partial:
    """Causal attention without a past on a CPU; arguments as in :func:`attend_in_parts`."""
    heads, count, head_dim = query.shape
    by_keys = query.view(keys.shape[0], -1, count, head_dim)
    keys, values = (held[:, None].expand(-1, by_keys.shape[1], -1, -1) for held in (keys, values))
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        by_keys, keys, values, is_causal=True, scale=scaling
    )
    return output.float().reshape(heads, count, head_dim), lse.float().reshape(heads, count, 1)


def _blockwise(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Partial:
    """Attention of scaled queries over blocks of keys, in float32."""
    partials = []
    for start in range(0, keys.shape[1], _BLOCK_KEYS):
        block = slice(start, start + _BLOCK_KEYS)
        scores = query @ keys[:, block].float().transpose(1, 2)
        if mask is not None:
            # Filled instead of added, because adding -inf to an overflowed score gives NaN.
            scores = scores.masked_fill(mask[:, block] < 0, -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        # The clamp avoids NaN for a query that sees nothing of this block: its weights become 0.
        weights = (scores - lse.clamp_min(torch.finfo(scores.dtype).min)).exp()
        partials.append((weights @ values[:, block].float(), lse))
    return _joined(partials)


def _joined(partials: Sequence[Partial]) -> Partial:
    """The output and log-sum-exp over all of the keys."""
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
