"""Packed attention of one sequence, against scaled dot-product attention over all of its keys."""

import pytest
import torch
import torch.nn.functional as F

from rapid_integrations.engine.attention import PackedBatch
from rapid_integrations.engine.kv import SequenceKV

WIDTH = 16


@pytest.mark.parametrize("new", [1, 2, 3, 6, 12, 13, 40])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("past", [0, 30])
@pytest.mark.parametrize("window", [None, 20, 64])
@pytest.mark.parametrize("scaling", [None, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_and_many_queries_see_the_keys_before_them(
    new: int, groups: int, past: int, window: int | None, scaling: float | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(new)
    total, kv_heads = past + new, 2
    keys, values = torch.randn(2, kv_heads, total, WIDTH, generator=generator, dtype=torch.float32).to(dtype)
    query = torch.randn(kv_heads * groups, new, WIDTH, generator=generator).to(dtype)
    cache = SequenceKV(64)
    cache.write(0, keys[:, :past], values[:, :past])
    cache.length = past
    found = PackedBatch([cache], [new]).attend(
        0, query[None], keys[None, :, past:], values[None, :, past:], scaling=scaling, sliding_window=window
    )
    distance = torch.arange(past, total)[:, None] - torch.arange(total)
    seen = (distance >= 0) & (distance < (window or total))
    expected = F.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=seen, scale=scaling, enable_gqa=True
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
