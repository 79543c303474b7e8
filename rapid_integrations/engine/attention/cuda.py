"""Attention on CUDA devices by torch's flash kernel, for any number of new tokens after any past.

torch's public function accepts no past without a mask. With a mask, another kernel runs that writes all
scores or copies keys for every head that shares them. The operator behind it needs no mask, because it aligns
queries with the last keys. It supports a sliding window, reads shared keys where they are in the cache, and
distributes the keys of a few queries over all multiprocessors.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

# The kernel requires this multiple of the head size; torch's public function pads copies.
_HEAD_DIM_MULTIPLE = 8

PAGE_TOKENS = 256
"""The kernel reads a row of keys as one page, whose size must be a multiple of this."""

# There is no public function that returns the log-sum-exp.
_flash_attention = torch.ops.aten._flash_attention_forward


def supports(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether :func:`attention` runs here: in 16 bits on an NVIDIA device for which torch has the kernel.

    Args:
        query: ``[heads, queries, head_dim]``.
        keys: ``[kv_heads, keys, head_dim]``.
        values: ``[kv_heads, keys, head_dim]``.
    """
    if query.device.type != "cuda" or not query.shape[2] == keys.shape[2] == values.shape[2]:
        return False
    same_dtype = query.dtype == keys.dtype == values.dtype
    return same_dtype and _has_kernel(query.device, query.dtype, query.shape[2])


@cache
def _has_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    if torch.version.hip is not None or head_dim % _HEAD_DIM_MULTIPLE:
        return False
    with torch.cuda.device(device):
        heads = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
        return can_use_flash_attention(SDPAParams(heads, heads, heads, None, 0.0, False, False))


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float | None,
    *,
    causal: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries to keys that :func:`supports` accepts.

    Args:
        query: ``[heads, queries, head_dim]``.
        keys: ``[kv_heads, keys, head_dim]``; at least as many as queries if ``causal``.
        values: ``[kv_heads, keys, head_dim]``.
        scaling: Factor on the scores; ``None`` is ``head_dim ** -0.5``.
        causal: True if the queries belong to the last keys and see no later ones; false if every query sees
            all keys.
        window: A causal query sees itself and the ``window - 1`` keys before it; ``None`` all before it.
            Requires at least two queries.

    Returns:
        Outputs in the shape of ``query``, and the log-sum-exp of the scores ``[heads, queries, 1]`` float32.
    """
    query, keys, values = (tensor.transpose(0, 1)[None] for tensor in (query, keys, values))
    output, lse, *_ = _flash_attention(
        query,
        keys,
        values,
        None,
        None,
        query.shape[1],
        keys.shape[1],
        0.0,
        causal,
        False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return output[0].transpose(0, 1), lse[0, :, :, None]


def attention_in_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    lengths: Tensor,
    scaling: float | None,
    *,
    starts: Tensor,
    window: int | None,
) -> Tensor:
    """Causal attention of several sequences with the same number of new tokens; lengths stay on the device.

    Args:
        query: ``[heads, sequences * new, head_dim]``.
        keys: ``[rows, kv_heads, capacity, head_dim]``, the capacity a multiple of :data:`PAGE_TOKENS`.
        values: ``[rows, kv_heads, capacity, head_dim]``.
        rows: The row of each sequence, ``[sequences, 1]`` int32.
        lengths: The number of tokens of each sequence, new ones included, ``[sequences]`` int32.
        scaling: Factor on the scores; ``None`` is ``head_dim ** -0.5``.
        starts: The index of each sequence's first query, and the number of queries,
            ``[sequences + 1]`` int32.
        window: A query sees itself and the ``window - 1`` keys before it; ``None`` all before it.

    Returns:
        Outputs in the shape of ``query``.
    """
    count, capacity = len(rows), keys.shape[2]
    new = query.shape[1] // count
    by_tokens, keys, values = query.transpose(0, 1), keys.transpose(1, 2), values.transpose(1, 2)
    if window is not None and window >= capacity:
        window = None

    def attend(sequences: slice) -> Tensor:
        number = sequences.stop - sequences.start
        output: Tensor = _flash_attention(
            by_tokens[sequences.start * new : sequences.stop * new],
            keys,
            values,
            starts[: number + 1],
            starts[: number + 1],  # required for keys too, but not read: they are in pages
            new,
            capacity,
            0.0,
            # With causal=False for a single query, the kernel treats heads that share keys as queries.
            new > 1,
            False,
            scale=scaling,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
            seqused_k=lengths[sequences],
            block_table=rows[sequences],
        )[0]
        return output

    # When torch's kernel distributes the keys of several sequences, it writes all outputs over the first one.
    # The exception are single queries whose heads share keys (pytorch/pytorch#194167).
    if count == 1 or (new == 1 and query.shape[0] > keys.shape[2] and window is None):
        output = attend(slice(0, count))
    else:
        output = torch.cat([attend(slice(index, index + 1)) for index in range(count)])
    return output.transpose(0, 1)
