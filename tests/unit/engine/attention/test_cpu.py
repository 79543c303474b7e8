"""Every kind of processor's kernels compute what torch's own do."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import VOCAB, tiny_model
from torch import nn

from rapid_integrations.engine.attention import cpu as cpu_kernels
from rapid_integrations.engine.attention.packed import PackedBatch
from rapid_integrations.engine.attention.split_kv import _joined
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel

pytestmark = pytest.mark.skipif(
    not cpu_kernels.takes(torch.zeros(1)), reason="torch was built without MKL or without oneDNN"
)


@pytest.fixture(autouse=True)
def slow_mkl(monkeypatch) -> None:
    """As on a processor from whose kernels MKL keeps away."""
    monkeypatch.setattr(cpu_kernels, "HERE", cpu_kernels.AVX512)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_linear_layer_is_torchs(rows, with_bias, monkeypatch) -> None:
    hidden, weight = normal(rows, 24), normal(48, 24)
    monkeypatch.setattr(cpu_kernels, "_MIN_MULTIPLICATIONS", 8 * weight.numel())
    bias = normal(48) if with_bias else None
    expected = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(
        cpu_kernels.linear(hidden, weight, bias).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_a_small_product_is_left_to_torch(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(cpu_kernels, "_product", lambda *args: calls.append(args[0].shape[0]))
    # Outputs that are no blocks.
    weight = torch.zeros(513, 1024)
    for rows in (1, 8, 15, 16, 40):
        cpu_kernels.linear(torch.zeros(rows, 1024), weight, None)
    cpu_kernels.linear(torch.zeros(40, 128), weight[:, :128], None)
    assert calls == [16, 40]


@pytest.mark.parametrize("processor", [cpu_kernels.AVX512, cpu_kernels.OTHER])
def test_a_large_weight_is_onednns_from_one_row_on(processor, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(cpu_kernels, "HERE", processor)
    monkeypatch.setattr(cpu_kernels, "_product", lambda *args: calls.append((len(args[0]), len(args[1]))))
    for outputs in (1023, 1025):
        for rows in (1, 7, 65):
            cpu_kernels.linear(torch.zeros(rows, 1024), torch.zeros(outputs, 1024), None)
    assert calls == [(65, 1023), (1, 1025), (7, 1025), (65, 1025)]


def test_on_intel_onednn_has_few_rows_by_large_weights(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(cpu_kernels, "HERE", cpu_kernels.INTEL)
    monkeypatch.setattr(cpu_kernels, "_product", lambda *args: calls.append(len(args[0])))
    large, small = torch.zeros(2048, 1024), torch.zeros(2047, 1024)
    for rows in (1, 7, 8, 64, 65, 600):
        cpu_kernels.linear(torch.zeros(rows, 1024), large, None)
        cpu_kernels.linear(torch.zeros(rows, 1024), small, None)
    assert calls == [8, 64]


@pytest.mark.parametrize("rows", [1, 2, 17, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_linear_layer_by_blocks_is_torchs(rows, with_bias, monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "HERE", cpu_kernels.OTHER)
    # Rows as a slice of a wider product, and a weight that is part of a larger one, are not contiguous.
    hidden, weight = normal(rows, 300)[:, :256], normal(1024, 256)[256:]
    bias = normal(768) if with_bias else None
    expected = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(
        cpu_kernels.linear(hidden, weight, bias).double(), expected, rtol=1e-5, atol=1e-4
    )


def test_blocks_are_for_few_rows_a_large_weight_and_outputs_that_divide(monkeypatch) -> None:
    calls: list[int] = []
    by_blocks = cpu_kernels._product_by_blocks

    def counted(hidden, weight, blocks):
        calls.append(len(hidden))
        return by_blocks(hidden, weight, blocks)

    monkeypatch.setattr(cpu_kernels, "_product_by_blocks", counted)
    large, small, odd = torch.zeros(512, 256), torch.zeros(256, 256), torch.zeros(515, 256)
    largest = torch.zeros(4096, 256)
    monkeypatch.setattr(cpu_kernels, "HERE", cpu_kernels.INTEL)
    cpu_kernels.linear(torch.zeros(3, 256), large, None)
    assert calls == []
    for processor, expected in ((cpu_kernels.OTHER, [1, 1, 64, 64]), (cpu_kernels.AVX512, [1, 64])):
        monkeypatch.setattr(cpu_kernels, "HERE", processor)
        calls.clear()
        for rows in (1, 64, 65):
            for weight in (large, small, odd, largest):
                assert cpu_kernels.linear(torch.zeros(rows, 256), weight, None).shape == (rows, len(weight))
        assert calls == expected


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("GenuineIntel", "AVX512", "INTEL"),
        ("GenuineIntel", "AVX2", "INTEL"),
        ("AuthenticAMD", "AVX512", "AVX512"),
        ("AuthenticAMD", "AVX2", "OTHER"),
        ("", "DEFAULT", "OTHER"),
    ],
)
def test_the_kind_of_processor_is_told_by_maker_and_registers(
    vendor, capability, expected, monkeypatch
) -> None:
    monkeypatch.setattr(cpu_kernels, "processor_facts", lambda: {"vendor_id": vendor})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu_kernels._processor() is getattr(cpu_kernels, expected)


@pytest.mark.parametrize("block", [512, 1024, 4096])
def test_parts_by_heads_make_the_whole(block, monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_MAX_SCORES", block * 5)
    # Prefixes of larger buffers, as a cache has them, and queries as a pass lays them out.
    query, buffers = normal(5, 2, 16).transpose(0, 1), normal(2, 2, 2000, 16)
    keys, values = buffers[:, :, :1700]
    partials = cpu_kernels.attention_by_heads(query, keys, values)
    assert len(partials) == -(-1700 // block)
    output, lse = _joined(partials)
    scores = query.double() @ keys.double().transpose(1, 2)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1, keepdim=True), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(output.double(), scores.softmax(-1) @ values.double(), rtol=1e-5, atol=1e-5)


def test_one_score_above_all_others_leaves_the_rest_no_weight() -> None:
    query, keys, values = normal(1, 8, 16), normal(1, 600, 16), normal(1, 600, 16)
    keys[0, 17] = 1000 * query[0, 0]
    output, lse = _joined(cpu_kernels.attention_by_heads(query, keys, values))
    assert lse.isfinite().all()
    torch.testing.assert_close(output[0, 0], values[0, 17])


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("past", [1, 511, 512, 1500])
@pytest.mark.parametrize("new", [1, 2, 3, 30, 33, 600])
@pytest.mark.parametrize("processor", [cpu_kernels.INTEL, cpu_kernels.AVX512, cpu_kernels.OTHER])
@pytest.mark.parametrize("min_scores", [1, 2**30])
def test_new_tokens_attend_as_by_sdpa(kv_heads, past, new, processor, min_scores, monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_MIN_SCORES", min_scores)
    monkeypatch.setattr(cpu_kernels, "HERE", processor)
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


@pytest.mark.parametrize("processor", [cpu_kernels.INTEL, cpu_kernels.OTHER])
def test_where_the_fused_kernel_is_fast_it_attends(processor, monkeypatch) -> None:
    query = torch.zeros(4, 64, 16)
    assert cpu_kernels.pays_for_attention(query, 64, 2**20)
    monkeypatch.setattr(cpu_kernels, "HERE", processor)
    assert not cpu_kernels.pays_for_attention(query, 64, 2**20)


def test_many_scores_go_by_heads_and_few_do_not(monkeypatch) -> None:
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


def test_a_lean_decoder_multiplies_by_it_in_float32_only() -> None:
    weight = torch.zeros(2, 2)
    assert cpu_kernels.takes(nn.Parameter(weight))
    assert not cpu_kernels.takes(weight.bfloat16())
    assert not cpu_kernels.takes(weight.to("meta"))

    class Quantised(torch.Tensor):
        pass

    assert not cpu_kernels.takes(weight.as_subclass(Quantised))
