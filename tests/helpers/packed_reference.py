"""Outputs of packed attention and of scaled dot-product attention over all keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid_integrations.engine.attention.packed import PackedBatch
from rapid_integrations.engine.cache.sequence_kv import SequenceKV


def found_and_expected(
    query: Tensor, keys: Tensor, values: Tensor, *, scaling: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of new tokens after a past, by a packed batch and by torch, in the shape of ``query``.

    Args:
        query: ``[heads, new, head_dim]``, the queries of the last tokens.
        keys: ``[kv_heads, total, head_dim]``.
        values: ``[kv_heads, total, head_dim]``.
        scaling: Factor on the scores; ``None`` is ``head_dim ** -0.5``.
        window: A query sees itself and the ``window - 1`` tokens before it; ``None`` all before it.
    """
    new, total = query.shape[1], keys.shape[1]
    past = total - new
    cache = SequenceKV(64)
    cache.write(0, keys[:, :past], values[:, :past])
    cache.length = past
    found = PackedBatch([cache], [new]).attend(
        0, query, keys[:, past:], values[:, past:], scaling=scaling, sliding_window=window
    )
    distance = torch.arange(past, total)[:, None] - torch.arange(total)
    visible = ((distance >= 0) & (distance < (window or total))).to(query.device)
    expected = F.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=visible, scale=scaling, enable_gqa=True
    )
    return found, expected[0]
