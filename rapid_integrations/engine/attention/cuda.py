"""Attention on CUDA devices by the flash kernel: one call for any number of new tokens behind any past.

torch's own entry to it takes no mask for new tokens behind a past: with one, another kernel runs, that writes
all scores or copies keys for every head that shares them. None is needed: queries are those of the last keys,
which the kernel aligns so itself. It looks back over a window, reads shared keys as they lie in the cache,
and divides the keys of a few queries among all of the device's processors.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

# What the width of its heads is a multiple of; torch's own entry pads copies.
_WIDTH_MULTIPLE = 8

PAGE_TOKENS = 256
"""What the capacity of rows is a multiple of: for the kernel a row is a page."""

# The operator behind torch's own entry; there is no public one that gives the log-sum-exp.
_flash_attention = torch.ops.aten._flash_attention_forward


def takes(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether :func:`attention` runs here: on NVIDIA's devices that torch has the kernel for, in 16 bits.

    Args:
        query: ``[heads, queries, head_dim]``.
        keys: ``[kv_heads, keys, head_dim]``.
        values: The same.
    """
    if query.device.type != "cuda" or not query.shape[2] == keys.shape[2] == values.shape[2]:
        return False
    same = query.dtype == keys.dtype == values.dtype
    return same and _has_kernel(query.device, query.dtype, query.shape[2])


@cache
def _has_kernel(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    if torch.version.hip is not None or width % _WIDTH_MULTIPLE:
        return False
    with torch.cuda.device(device):
        heads = torch.empty(1, 1, 1, width, dtype=dtype, device=device)
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
    """Attention of queries to keys that :func:`takes` takes.

    Args:
        query: ``[heads, queries, head_dim]``.
        keys: ``[kv_heads, keys, head_dim]``, at least as many as there are queries if they are causal.
        values: The same.
        scaling: Factor on the scores; ``None`` is ``head_dim ** -0.5``.
        causal: Whether the queries are those of the last keys, and see no later ones; else they see all.
        window: Causal queries, at least two, see themselves and the ``window - 1`` keys before; ``None``: all
            before.

    Returns:
        Outputs, as ``query``, and their scores' log-sum-exps ``[heads, queries, 1]`` float32.
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
    """Causal attention of equally many new tokens of several sequences, whose lengths the device reads.

    Args:
        query: ``[heads, sequences * new, head_dim]``.
        keys: ``[rows, kv_heads, capacity, head_dim]``, the capacity a multiple of :data:`PAGE_TOKENS`.
        values: The same.
        rows: Each sequence's, ``[sequences, 1]`` int32.
        lengths: How many tokens each has with the new ones, ``[sequences]`` int32.
        scaling: Factor on the scores; ``None`` is ``head_dim ** -0.5``.
        starts: Where each sequence's new tokens begin, and the last one's end, ``[sequences + 1]`` int32.
        window: A query sees itself and the ``window - 1`` keys before; ``None``: all before.

    Returns:
        As ``query``.
    """
    count, capacity = len(rows), keys.shape[2]
    new = query.shape[1] // count
    by_tokens, keys, values = query.transpose(0, 1), keys.transpose(1, 2), values.transpose(1, 2)
    if window is not None and window >= capacity:
        window = None

    def attend(some: slice) -> Tensor:
        number = some.stop - some.start
        output: Tensor = _flash_attention(
            by_tokens[some.start * new : some.stop * new],
            keys,
            values,
            starts[: number + 1],
            starts[: number + 1],  # of the keys it is not read: they are pages
            new,
            capacity,
            0.0,
            # A single query sees all: so said, heads that share keys become queries of theirs.
            new > 1,
            False,
            scale=scaling,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
            seqused_k=lengths[some],
            block_table=rows[some],
        )[0]
        return output

    # Where it divides the keys of several sequences among its processors, torch's kernel writes all of them
    # over the first, but for single queries whose heads share keys (pytorch/pytorch#194167).
    if count == 1 or (new == 1 and query.shape[0] > keys.shape[2] and window is None):
        output = attend(slice(0, count))
    else:
        output = torch.cat([attend(slice(index, index + 1)) for index in range(count)])
    return output.transpose(0, 1)
