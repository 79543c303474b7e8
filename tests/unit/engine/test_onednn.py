"""Which tensors oneDNN's products accept."""

import pytest
import torch
from torch import nn

from rapid_integrations.engine import onednn

WEIGHT = torch.zeros(2, 2)


class Quantised(torch.Tensor):
    pass


@pytest.mark.skipif(not onednn.supports(WEIGHT), reason="torch was built without MKL or without oneDNN")
def test_plain_float32_tensors_on_a_cpu_are_supported() -> None:
    assert onednn.supports(nn.Parameter(WEIGHT))


@pytest.mark.parametrize(
    "weight",
    [WEIGHT.bfloat16(), WEIGHT.to("meta"), WEIGHT.as_subclass(Quantised)],
    ids=["bfloat16", "another device", "a subclass"],
)
def test_others_are_not(weight: torch.Tensor) -> None:
    assert not onednn.supports(weight)
