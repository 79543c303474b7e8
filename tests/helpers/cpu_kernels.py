"""Kernels of a CPU: the condition under which they exist, and random inputs."""

import pytest
import torch

from rapid_integrations.engine import onednn

needs_onednn = pytest.mark.skipif(
    not onednn.supports(torch.zeros(1)), reason="torch was built without MKL or without oneDNN"
)


def normal(*shape: int) -> torch.Tensor:
    """Random numbers that are the same for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
