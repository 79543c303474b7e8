"""Linear layers on every kind of processor: the results are torch's, and each kernel gets its sizes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from rapid_integrations.engine import onednn, processor
from rapid_integrations.engine.model import linear_kernels

pytestmark = pytest.mark.skipif(
    not onednn.supports(torch.zeros(1)), reason="torch was built without MKL or without oneDNN"
)

Calls = list[tuple[int, int]]


@pytest.fixture(autouse=True)
def use(monkeypatch) -> Callable[[processor.ProcessorProfile], None]:
    """Selects a processor's profile; the default is one whose products oneDNN computes."""

    def use(profile: processor.ProcessorProfile) -> None:
        monkeypatch.setattr(processor, "CURRENT", profile)

    use(processor.AVX512)
    return use


def record(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> Calls:
    """The numbers of rows and of outputs of each call of a kernel."""
    calls: Calls = []
    kernel = getattr(owner, name)

    def recorded(hidden, weight, *rest):
        calls.append((len(hidden), len(weight)))
        return kernel(hidden, weight, *rest)

    monkeypatch.setattr(owner, name, recorded)
    return calls


@pytest.fixture
def products(monkeypatch) -> Calls:
    return record(monkeypatch, onednn, "linear")


@pytest.fixture
def blocked(monkeypatch) -> Calls:
    return record(monkeypatch, linear_kernels, "_product_in_blocks")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tolerance: float) -> None:
    found = linear_kernels.linear(hidden, weight, bias).double()
    expected = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_by_onednn_is_torchs(rows, with_bias, products, monkeypatch) -> None:
    weight = normal(48, 24)
    monkeypatch.setattr(linear_kernels, "_MIN_MULTIPLICATIONS", 8 * weight.numel())
    check(normal(rows, 24), weight, normal(48) if with_bias else None, 1e-5)
    assert len(products) == (rows >= 8)


@pytest.mark.parametrize("rows", [1, 2, 17, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_in_blocks_is_torchs(rows, with_bias, use, blocked) -> None:
    use(processor.OTHER)
    # Neither a slice of a wider product nor a part of a larger weight is contiguous.
    hidden, weight = normal(rows, 300)[:, :256], normal(1024, 256)[256:]
    check(hidden, weight, normal(768) if with_bias else None, 1e-4)
    assert blocked == [(rows, 768)]


def multiply(rows: tuple[int, ...], weights: list[torch.Tensor]) -> None:
    for number in rows:
        for weight in weights:
            hidden = torch.zeros(number, weight.shape[1])
            assert linear_kernels.linear(hidden, weight, None).shape == (number, len(weight))


def test_small_products_are_torchs(products) -> None:
    # 513 outputs cannot be divided into blocks.
    weight = torch.zeros(513, 1024)
    multiply((1, 8, 15, 16, 40), [weight])
    multiply((40,), [weight[:, :128]])
    assert products == [(16, 513), (40, 513)]


@pytest.mark.parametrize("profile", [processor.AVX512, processor.OTHER])
def test_products_with_a_large_weight_are_onednns_for_any_number_of_rows(profile, use, products) -> None:
    use(profile)
    multiply((1, 7, 65), [torch.zeros(1023, 1024), torch.zeros(1025, 1024)])
    assert products == [(1, 1025), (7, 1025), (65, 1023), (65, 1025)]


def test_on_intel_onednn_multiplies_few_rows_by_large_weights_only(use, products) -> None:
    use(processor.INTEL)
    multiply((1, 7, 8, 64, 65, 600), [torch.zeros(2048, 1024), torch.zeros(2047, 1024)])
    assert products == [(8, 2048), (64, 2048)]


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (processor.INTEL, []),
        (processor.OTHER, [(1, 512), (1, 4096), (64, 512), (64, 4096)]),
        (processor.AVX512, [(1, 512), (64, 512)]),
    ],
    ids=["intel", "other", "avx512"],
)
def test_few_rows_are_multiplied_in_blocks_if_the_weight_is_large_and_divisible(
    profile, expected, use, blocked
) -> None:
    use(profile)
    multiply((1, 64, 65), [torch.zeros(outputs, 256) for outputs in (512, 256, 515, 4096)])
    assert blocked == expected
