"""Attention on a CPU matches torch's own, for every processor profile."""

import pytest
import torch
import torch.nn.functional as F
from helpers.cpu_kernels import needs_onednn, normal
from helpers.tiny_models import VOCAB, tiny_model

from rapid_integrations.engine import processor
from rapid_integrations.engine.attention import cpu as cpu_kernels
from rapid_integrations.engine.attention.packed import PackedBatch
from rapid_integrations.engine.attention.split_kv import _joined
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel

pytestmark = needs_onednn


@pytest.fixture(autouse=True)
def avx512_profile(monkeypatch) -> None:
    """The profile on which oneDNN's attention may be used."""
    monkeypatch.setattr(processor, "CURRENT", processor.AVX512)


@pytest.mark.parametrize("block", [512, 1024, 4096])
def test_blocks_of_keys_merge_to_the_full_result(block, monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_MAX_SCORES", block * 5)
    # Keys are prefixes of larger buffers, as in a cache; queries have the memory layout of a pass.
    query, buffers = normal(5, 2, 16).transpose(0, 1), normal(2, 2, 2000, 16)
    keys, values = buffers[:, :, :1700]
    partials = cpu_kernels.attention_by_heads(query, keys, values)
    assert len(partials) == -(-1700 // block)
    output, lse = _joined(partials)
    scores = query.double() @ keys.double().transpose(1, 2)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1, keepdim=True), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(output.double(), scores.softmax(-1) @ values.double(), rtol=1e-5, atol=1e-5)


def test_one_very_large_score_gets_all_the_weight() -> None:
    query, keys, values = normal(1, 8, 16), normal(1, 600, 16), normal(1, 600, 16)
    keys[0, 17] = 1000 * query[0, 0]
    output, lse = _joined(cpu_kernels.attention_by_heads(query, keys, values))
    assert lse.isfinite().all()
    torch.testing.assert_close(output[0, 0], values[0, 17])


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("past", [1, 511, 512, 1500])
@pytest.mark.parametrize("new", [1, 2, 3, 30, 33, 600])
@pytest.mark.parametrize("profile", [processor.INTEL, processor.AVX512, processor.OTHER])
@pytest.mark.parametrize("min_scores", [1, 2**30])
def test_new_tokens_after_a_past_match_sdpa(kv_heads, past, new, profile, min_scores, monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_MIN_SCORES", min_scores)
    monkeypatch.setattr(processor, "CURRENT", profile)
    kv = SequenceKV(past + new)
    keys, values = normal(2, kv_heads, past + new, 8)
    query = normal(4, new, 8)
    kv.write(0, keys[:, :past], values[:, :past])
    kv.length = past
    output = PackedBatch([kv], [new]).attend(
        0, query, keys[:, past:], values[:, past:], scaling=None, sliding_window=None
    )
    mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)
    expected = F.scaled_dot_product_attention(query[None], keys[None], values[None], mask, enable_gqa=True)
    torch.testing.assert_close(output, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("profile", [processor.INTEL, processor.OTHER])
def test_the_fused_kernel_is_used_where_it_is_fast(profile, monkeypatch) -> None:
    query = torch.zeros(4, 64, 16)
    assert cpu_kernels.pays(query, 64, 2**20)
    monkeypatch.setattr(processor, "CURRENT", profile)
    assert not cpu_kernels.pays(query, 64, 2**20)


def test_attention_by_heads_is_used_for_many_scores_only(monkeypatch) -> None:
    called = []
    by_heads = cpu_kernels.attention_by_heads
    monkeypatch.setattr(
        cpu_kernels,
        "attention_by_heads",
        lambda query, *rest: called.append(query.shape[1]) or by_heads(query, *rest),
    )
    monkeypatch.setattr(cpu_kernels, "_MIN_SCORES", 2 * 600 // torch.get_num_threads())
    model = CausalModel(tiny_model("llama"))
    cache = SequenceKV(700)
    model.forward([Step(cache, [token % VOCAB for token in range(600)], 0)])
    called.clear()
    model.forward([Step(cache, [3], 1)])
    assert called == []
    model.forward([Step(cache, [4, 5, 6], 1)])
    assert called
    assert len(set(called)) == 1
