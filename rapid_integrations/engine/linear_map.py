"""Linear maps by a model's own weights, those of one input as one product.

Queries, keys and values are products with the same rows, and so are the two branches of a gated layer. Their
weights are laid one below the other in memory, and the parameters of the model become views of it: one call
instead of two or three, larger products, and nothing held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapid_integrations.engine import cpu_kernels
from rapid_integrations.engine.int8 import Int8Linear, int8_linear

LinearMap = Callable[[Tensor], Tensor]
"""Takes ``[rows, in]`` to ``[rows, out]``."""


def linear_map(*modules: Any) -> LinearMap:
    """The map of linear layers of the same input, their outputs side by side.

    Where their weights can be one matrix, they are laid together: the parameters keep their identity, shape
    and values, but move in memory. Weights of different kinds, or in formats of quantisation libraries, stay,
    as do those made in inference mode, which cannot be moved.

    Args:
        *modules: Layers of class ``nn.Linear`` or :class:`Int8Linear`.
    """
    weights, biases = [module.weight for module in modules], [module.bias for module in modules]
    if len(modules) > 1 and not (
        len({(type(module), module.weight.dtype) for module in modules}) == 1
        and len({bias is None for bias in biases}) == 1
        and all(type(weight) in (Tensor, nn.Parameter) for weight in weights)  # quantised: subclasses
        and not any(weight.is_inference() for weight in weights)
    ):
        return _SideBySide([linear_map(module) for module in modules])
    weight, bias = _laid_together(weights), None if biases[0] is None else _laid_together(biases)
    if type(modules[0]) is Int8Linear:
        return _Int8Map(weight, bias, _laid_together([module.scale for module in modules]))
    return (_CpuMap if cpu_kernels.takes(weight) else _Map)(weight, bias)


@dataclass(frozen=True, slots=True)
class _Map:
    """A linear map.

    Attributes:
        weight: ``[out, in]``.
        bias: ``[out]``, or ``None``.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)


class _CpuMap(_Map):
    """A linear map in float32 on a CPU, by the kernel that is fastest there."""

    def __call__(self, hidden: Tensor) -> Tensor:
        return cpu_kernels.linear(hidden, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Int8Map(_Map):
    """A linear map in 8-bit integers.

    Attributes:
        scale: ``[out]``, what a step of each of the weight's rows is.
    """

    scale: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        return int8_linear(hidden, self.weight, self.scale, self.bias)


@dataclass(frozen=True, slots=True)
class _SideBySide:
    """Maps of the same input that cannot be one product."""

    maps: Sequence[LinearMap]

    def __call__(self, hidden: Tensor) -> Tensor:
        return torch.cat([each(hidden) for each in self.maps], -1)


def _laid_together(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of the rows of several, which become views of it; those that already are stay."""
    first = tensors[0].detach()
    if len(tensors) == 1:
        return first
    size = sum(len(tensor) for tensor in tensors)
    if _adjacent(tensors):
        return first.as_strided((size, *first.shape[1:]), first.stride())
    joined = torch.cat([tensor.detach() for tensor in tensors])
    start = 0
    for tensor in tensors:
        tensor.data = joined[start : start + len(tensor)]
        start += len(tensor)
    return joined


def _adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors lie one behind the other in one storage."""
    return all(tensor.is_contiguous() for tensor in tensors) and all(
        left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        and left.storage_offset() + left.numel() == right.storage_offset()
        for left, right in pairwise(tensors)
    )
