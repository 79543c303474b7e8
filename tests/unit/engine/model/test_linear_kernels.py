"""Linear layers in float32 on a CPU, for every processor profile."""

import pytest
import torch
import torch.nn.functional as F
from helpers.cpu_kernels import needs_onednn, normal

from rapid_integrations.engine import onednn, processor
from rapid_integrations.engine.model import linear_kernels

pytestmark = needs_onednn


@pytest.fixture(autouse=True)
def avx512_profile(monkeypatch) -> None:
    monkeypatch.setattr(processor, "CURRENT", processor.AVX512)


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_matches_torch(rows, with_bias, monkeypatch) -> None:
    hidden, weight = normal(rows, 24), normal(48, 24)
    monkeypatch.setattr(linear_kernels, "_MIN_MULTIPLICATIONS", 8 * weight.numel())
    bias = normal(48) if with_bias else None
    expected = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(
        linear_kernels.linear(hidden, weight, bias).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_torch_computes_small_products(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(onednn, "linear", lambda *args: calls.append(args[0].shape[0]))
    # This number of outputs cannot be divided into blocks.
    weight = torch.zeros(513, 1024)
    for rows in (1, 8, 15, 16, 40):
        linear_kernels.linear(torch.zeros(rows, 1024), weight, None)
    linear_kernels.linear(torch.zeros(40, 128), weight[:, :128], None)
    assert calls == [16, 40]


@pytest.mark.parametrize("profile", [processor.AVX512, processor.OTHER])
def test_onednn_computes_large_weights_for_any_number_of_rows(profile, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(processor, "CURRENT", profile)
    monkeypatch.setattr(onednn, "linear", lambda *args: calls.append((len(args[0]), len(args[1]))))
    for outputs in (1023, 1025):
        for rows in (1, 7, 65):
            linear_kernels.linear(torch.zeros(rows, 1024), torch.zeros(outputs, 1024), None)
    assert calls == [(65, 1023), (1, 1025), (7, 1025), (65, 1025)]


def test_on_intel_onednn_computes_few_rows_by_large_weights(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(processor, "CURRENT", processor.INTEL)
    monkeypatch.setattr(onednn, "linear", lambda *args: calls.append(len(args[0])))
    large, small = torch.zeros(2048, 1024), torch.zeros(2047, 1024)
    for rows in (1, 7, 8, 64, 65, 600):
        linear_kernels.linear(torch.zeros(rows, 1024), large, None)
        linear_kernels.linear(torch.zeros(rows, 1024), small, None)
    assert calls == [8, 64]


@pytest.mark.parametrize("rows", [1, 2, 17, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_in_blocks_matches_torch(rows, with_bias, monkeypatch) -> None:
    monkeypatch.setattr(processor, "CURRENT", processor.OTHER)
    # Slices: the rows are not contiguous, and the weight is part of a larger one.
    hidden, weight = normal(rows, 300)[:, :256], normal(1024, 256)[256:]
    bias = normal(768) if with_bias else None
    expected = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(
        linear_kernels.linear(hidden, weight, bias).double(), expected, rtol=1e-5, atol=1e-4
    )


def test_blocks_require_few_rows_a_large_weight_and_divisible_outputs(monkeypatch) -> None:
    calls: list[int] = []
    in_blocks = linear_kernels._product_in_blocks

    def counted(hidden, weight, blocks):
        calls.append(len(hidden))
        return in_blocks(hidden, weight, blocks)

    monkeypatch.setattr(linear_kernels, "_product_in_blocks", counted)
    large, small, odd = torch.zeros(512, 256), torch.zeros(256, 256), torch.zeros(515, 256)
    largest = torch.zeros(4096, 256)
    monkeypatch.setattr(processor, "CURRENT", processor.INTEL)
    linear_kernels.linear(torch.zeros(3, 256), large, None)
    assert calls == []
    for profile, expected in ((processor.OTHER, [1, 1, 64, 64]), (processor.AVX512, [1, 64])):
        monkeypatch.setattr(processor, "CURRENT", profile)
        calls.clear()
        for rows in (1, 64, 65):
            for weight in (large, small, odd, largest):
                assert linear_kernels.linear(torch.zeros(rows, 256), weight, None).shape == (
                    rows,
                    len(weight),
                )
        assert calls == expected
