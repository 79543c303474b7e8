"""oneDNN's products compute what torch's own do."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCAB, tiny_model
from torch import nn

from rapid_integrations.engine import onednn
from rapid_integrations.engine.attention import PackedBatch
from rapid_integrations.engine.kv import SequenceKV
from rapid_integrations.engine.model import CausalModel, Step
from rapid_integrations.engine.shared_attention import _joined

pytestmark = pytest.mark.skipif(
    not onednn.takes(torch.zeros(1)), reason="torch was built without MKL or without oneDNN"
)


@pytest.fixture(autouse=True)
def slow_mkl(monkeypatch) -> None:
    """As on a processor for which MKL has no kernels of its own."""
    monkeypatch.setattr(onednn, "MKL_IS_FAST", False)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_linear_layer_is_torchs(rows, with_bias, monkeypatch) -> None:
    hidden, weight = normal(rows, 24), normal(48, 24)
    monkeypatch.setattr(onednn, "_MIN_MULTIPLICATIONS", 8 * weight.numel())
    bias = normal(48) if with_bias else None
    expected = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(onednn.linear(hidden, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_small_product_is_left_to_torch(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(onednn, "_product", lambda *args: calls.append(args[0].shape[0]))
    weight = torch.zeros(512, 1024)
    for rows in (1, 8, 15, 16, 40):
        onednn.linear(torch.zeros(rows, 1024), weight, None)
    onednn.linear(torch.zeros(40, 128), weight[:, :128], None)
    assert calls == [16, 40]


@pytest.mark.parametrize("block", [512, 1024, 4096])
def test_parts_by_heads_make_the_whole(block, monkeypatch) -> None:
    monkeypatch.setattr(onednn, "_MAX_SCORES", block * 5)
    # Prefixes of larger buffers, as a cache has them, and queries as a pass lays them out.
    query, buffers = normal(5, 2, 16).transpose(0, 1), normal(2, 2, 2000, 16)
    keys, values = buffers[:, :, :1700]
    partials = onednn.attention_by_heads(query, keys, values)
    assert len(partials) == -(-1700 // block)
    output, lse = _joined(partials)
    scores = query.double() @ keys.double().transpose(1, 2)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1, keepdim=True), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(output.double(), scores.softmax(-1) @ values.double(), rtol=1e-5, atol=1e-5)


def test_one_score_above_all_others_leaves_the_rest_no_weight() -> None:
    query, keys, values = normal(1, 8, 16), normal(1, 600, 16), normal(1, 600, 16)
    keys[0, 17] = 1000 * query[0, 0]
    output, lse = _joined(onednn.attention_by_heads(query, keys, values))
    assert lse.isfinite().all()
    torch.testing.assert_close(output[0, 0], values[0, 17])


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("past", [1, 511, 512, 1500])
@pytest.mark.parametrize("new", [1, 2, 3, 30, 33, 600])
@pytest.mark.parametrize("mkl_is_fast", [False, True])
@pytest.mark.parametrize("min_scores", [1, 2**30])
def test_new_tokens_attend_as_by_sdpa(kv_heads, past, new, mkl_is_fast, min_scores, monkeypatch) -> None:
    monkeypatch.setattr(onednn, "_MIN_SCORES", min_scores)
    monkeypatch.setattr(onednn, "MKL_IS_FAST", mkl_is_fast)
    kv = SequenceKV(past + new)
    keys, values = normal(2, kv_heads, past + new, 8)
    query = normal(1, 4, new, 8)
    kv.write(0, keys[:, :past], values[:, :past])
    kv.length = past
    output = PackedBatch([kv], [new]).attend(
        0, query, keys[None, :, past:], values[None, :, past:], scaling=None, sliding_window=None
    )
    mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)
    expected = F.scaled_dot_product_attention(query, keys[None], values[None], mask, enable_gqa=True)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_where_mkl_is_fast_the_fused_kernel_attends(monkeypatch) -> None:
    query = torch.zeros(4, 64, 16)
    assert onednn.pays_for_attention(query, 64, 2**20)
    monkeypatch.setattr(onednn, "MKL_IS_FAST", True)
    assert not onednn.pays_for_attention(query, 64, 2**20)


def test_many_scores_go_by_heads_and_few_do_not(monkeypatch) -> None:
    called = []
    by_heads = onednn.attention_by_heads
    monkeypatch.setattr(
        onednn,
        "attention_by_heads",
        lambda query, *rest: called.append(query.shape[1]) or by_heads(query, *rest),
    )
    monkeypatch.setattr(onednn, "_MIN_SCORES", 2 * 600 // torch.get_num_threads())
    model = CausalModel(tiny_model("llama"))
    cache = SequenceKV(700)
    model.forward([Step(cache, [token % VOCAB for token in range(600)], 0)])
    called.clear()
    model.forward([Step(cache, [3], 1)])
    assert called == []
    model.forward([Step(cache, [4, 5, 6], 1)])
    assert called
    assert len(set(called)) == 1


def test_a_lean_decoder_multiplies_by_it_in_float32_only() -> None:
    weight = torch.zeros(2, 2)
    assert onednn.takes(nn.Parameter(weight))
    assert not onednn.takes(weight.bfloat16())
    assert not onednn.takes(weight.to("meta"))

    class Quantised(torch.Tensor):
        pass

    assert not onednn.takes(weight.as_subclass(Quantised))
