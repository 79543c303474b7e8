"""Which tensors oneDNN's products support."""

import pytest
import torch
from torch import nn

from rapid_integrations.engine import onednn


@pytest.mark.skipif(
    not onednn.supports(torch.zeros(1)), reason="torch was built without MKL or without oneDNN"
)
def test_only_plain_float32_tensors_on_a_cpu_are_supported() -> None:
    weight = torch.zeros(2, 2)
    assert onednn.supports(nn.Parameter(weight))
    assert not onednn.supports(weight.bfloat16())
    assert not onednn.supports(weight.to("meta"))

    class Quantised(torch.Tensor):
        pass

    assert not onednn.supports(weight.as_subclass(Quantised))
