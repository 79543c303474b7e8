"""Attention by oneDNN's matrix products, for processors on which torch's fused kernel is slow.

Each head is computed separately, over blocks of keys, so that few scores are in memory at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rapid_integrations.engine import onednn, processor

# The minimum scores of a head and thread for which the calls for every head and block pay.
_MIN_SCORES = 2**17
# For more queries, as in a prompt, the fused kernel is about as fast, and oneDNN keeps hundreds of megabytes.
_MAX_QUERIES = 128
# The maximum scores of a head in memory at a time. The number of keys is a multiple of _KEYS_MULTIPLE,
# because oneDNN compiles a kernel for every new shape.
_MAX_SCORES = 2**20
_KEYS_MULTIPLE = 512


def pays(query: Tensor, num_queries: int, num_keys: int) -> bool:
    """Whether :func:`attention_by_heads` is available and faster than torch's fused kernel.

    Args:
        query: The queries, in any shape.
        num_queries: The number of queries for each head of keys.
        num_keys: The number of keys that each of them attends to.
    """
    if processor.CURRENT.fused_attention or not onednn.supports(query):
        return False
    return num_queries <= _MAX_QUERIES and num_queries * num_keys >= _MIN_SCORES * torch.get_num_threads()


def attention_by_heads(query: Tensor, keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Attention without a mask, as partial results over blocks of keys.

    Args:
        query: ``[kv_heads, queries, head_dim]`` float32, scaled.
        keys: ``[kv_heads, keys, head_dim]``.
        values: ``[kv_heads, keys, head_dim]``.

    Returns:
        For each block the output ``[kv_heads, queries, head_dim]`` and the log-sum-exp of the scores
        ``[kv_heads, queries, 1]``.
    """
    block_keys = max(_MAX_SCORES // query.shape[1] // _KEYS_MULTIPLE, 1) * _KEYS_MULTIPLE
    partials = []
    for start in range(0, keys.shape[1], block_keys):
        block = slice(start, start + block_keys)
        outputs, lses = [], []
        for head, head_keys, head_values in zip(query, keys[:, block], values[:, block], strict=True):
            scores = onednn.linear(head, head_keys)
            largest = scores.amax(-1, keepdim=True)
            weights = torch.softmax(scores, -1, out=scores)
            # The largest weight is exp(largest - lse).
            lses.append(largest - weights.amax(-1, keepdim=True).log())
            outputs.append(onednn.linear(weights, head_values.t()))
        partials.append((torch.stack(outputs), torch.stack(lses)))
    return partials
