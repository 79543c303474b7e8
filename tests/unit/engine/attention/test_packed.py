"""Packed attention against scaled dot-product attention over all of a sequence's keys."""

import pytest
import torch
import torch.nn.functional as F
from helpers.packed_reference import found_and_expected

from rapid_integrations.engine import processor
from rapid_integrations.engine.attention.packed import PackedBatch
from rapid_integrations.engine.cache.sequence_kv import SequenceKV

WIDTH = 16


@pytest.fixture(
    autouse=True,
    params=[processor.INTEL, processor.AVX512, processor.OTHER],
    ids=["intel", "avx512", "other"],
)
def processor_profile(request, monkeypatch) -> None:
    """The kernels depend on the processor."""
    monkeypatch.setattr(processor, "CURRENT", request.param)


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
    found, expected = found_and_expected(query, keys, values, scaling=scaling, window=window)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_single_bfloat16_query_is_duplicated_where_that_is_faster(monkeypatch) -> None:
    rows: list[int] = []
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def counted(query, *args, **kwargs):
        rows.append(query.shape[2])
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", counted)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 50, WIDTH, generator=generator).to(torch.bfloat16)
    query = torch.randn(2, 1, WIDTH, generator=generator).to(torch.bfloat16)
    found = []
    for profile in (processor.AVX512, processor.INTEL):
        monkeypatch.setattr(processor, "CURRENT", profile)
        cache = SequenceKV(64)
        cache.write(0, keys[:, :49], values[:, :49])
        cache.length = 49
        batch = PackedBatch([cache], [1])
        found.append(batch.attend(0, query, keys[:, 49:], values[:, 49:], scaling=0.3, sliding_window=None))
    assert rows == [2, 1]
    expected = F.scaled_dot_product_attention(*(t.double()[None] for t in (query, keys, values)), scale=0.3)[
        0
    ]
    for output in found:
        assert output.shape == query.shape
        torch.testing.assert_close(output.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("new", [1, 3, 12, 40])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("past", [0, 30, 3000])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float16])
def test_keys_and_values_are_rounded_once_and_summed_in_float32(
    new: int, groups: int, past: int, window: int | None, kv_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(new)
    total, kv_heads = past + new, 2
    keys, values = torch.randn(2, kv_heads, total, WIDTH, generator=generator)
    query = torch.randn(kv_heads * groups, new, WIDTH, generator=generator)
    cache = SequenceKV(64)
    before = PackedBatch([cache], [past], kv_dtype=kv_dtype)
    if past:
        before.attend(0, query[:, :0], keys[:, :past], values[:, :past], scaling=None, sliding_window=window)
        cache.length = past
    batch = PackedBatch([cache], [new], kv_dtype=kv_dtype)
    found = batch.attend(0, query, keys[:, past:], values[:, past:], scaling=None, sliding_window=window)
    assert found.dtype == query.dtype == torch.float32
    for held, given in zip(cache.read(0, 0, total), (keys, values), strict=True):
        assert torch.equal(held, given.to(kv_dtype))
    distance = torch.arange(past, total)[:, None] - torch.arange(total)
    seen = (distance >= 0) & (distance < (window or total))
    rounded = (tensor.to(kv_dtype).double()[None] for tensor in (query, keys, values))
    expected = F.scaled_dot_product_attention(*rounded, attn_mask=seen, enable_gqa=True)[0].float()
    # Weights and outputs are rounded; sums in the narrow format would differ by more.
    torch.testing.assert_close(found, expected, rtol=0, atol=2 * torch.finfo(kv_dtype).eps)


@pytest.mark.parametrize(
    "num_logits", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 5, 0], [2, 0, 13, 0], [40, 1, 14, 3]]
)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("window", [None, 5, 64])
@pytest.mark.parametrize("forked", [False, True])
def test_attention_of_wanted_tokens_only_matches_attention_of_all(
    num_logits: list[int], groups: int, window: int | None, forked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SequenceKV, "MIN_FORK_TOKENS", SequenceKV.FORK_TOKENS)
    generator = torch.Generator().manual_seed(1)
    past, counts, kv_heads = 140, [40, 1, 14, 3], 2
    tokens = sum(counts)
    base = SequenceKV(past)
    base.write(0, *torch.randn(2, kv_heads, past, WIDTH, generator=generator))
    base.length = past
    query = torch.randn(kv_heads * groups, tokens, WIDTH, generator=generator)
    keys, values = torch.randn(2, kv_heads, tokens, WIDTH, generator=generator)

    def attended(batch: PackedBatch, query: torch.Tensor) -> torch.Tensor:
        return batch.attend(0, query, keys, values, scaling=None, sliding_window=window)

    def batch() -> PackedBatch:
        begin_alike = base.fork if forked else base.copy_prefix
        caches = [begin_alike(past, 200), SequenceKV(1), begin_alike(130, 200), base.copy_prefix(past, 200)]
        if forked:
            caches[3] = base
        return PackedBatch(caches, counts, num_logits)

    selected, full = batch(), batch()
    found = attended(selected, selected.select_wanted(query.transpose(0, 1)).transpose(0, 1))
    expected = full.select_wanted(attended(full, query).transpose(0, 1)).transpose(0, 1)
    assert found.shape[1] == sum(num_logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for count, here, there in zip(counts, selected.caches, full.caches, strict=True):
        for held, wanted in zip(
            here.read(0, 0, here.length + count), there.read(0, 0, there.length + count), strict=True
        ):
            assert torch.equal(held, wanted)
