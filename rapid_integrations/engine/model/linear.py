"""Linear maps by a model's own layers, small ones of the same input as one product.

Queries, keys and values are products with the same rows, as are the two branches of a gated layer. On a CPU
a small model takes as long for calling products as for computing them. The weights of such maps are laid one
below the other in memory, and the parameters of the model become views of it: one call instead of two or
three, and nothing held twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapid_integrations.engine.attention import cpu as cpu_kernels
from rapid_integrations.engine.model.quantized import Int8Linear, int8_linear

# Numbers in all weights of an input up to which they are joined: reading more takes far longer than a call,
# and weights that are mapped from a file would become memory of the process.
_MAX_JOINED = 2**20


@dataclass(frozen=True, slots=True)
class LinearMap:
    """A linear map.

    Attributes:
        weight: ``[out, in]``.
        bias: ``[out]``, or ``None``.
    """

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(module: Any) -> LinearMap:
        """The map of an ``nn.Linear`` or an :class:`Int8Linear`, on its own parameters."""
        if isinstance(module, Int8Linear):
            return _Int8Map(module.weight, module.bias, module.scale)
        return (_CpuMap if cpu_kernels.takes(module.weight) else LinearMap)(module.weight, module.bias)

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[rows, in]`` to ``[rows, out]``."""
        return F.linear(hidden, self.weight, self.bias)

    def tensors(self) -> list[Tensor | None]:
        """What it is made of."""
        return [getattr(self, each.name) for each in fields(self)]


class _CpuMap(LinearMap):
    """A linear map in float32 on a CPU, by the kernel that is fastest there."""

    def __call__(self, hidden: Tensor) -> Tensor:
        return cpu_kernels.linear(hidden, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Int8Map(LinearMap):
    """A linear map in 8-bit integers.

    Attributes:
        scale: ``[out]``, what a step of each of the weight's rows is.
    """

    scale: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        return int8_linear(hidden, self.weight, self.scale, self.bias)


class LinearMaps:
    """Linear maps of the same input.

    Where they can be one product, their parameters move in memory; they keep their identity, shape and
    values. What is changed in them, or given them as ``data``, later is seen.

    Args:
        *modules: Layers of class ``nn.Linear`` or :class:`Int8Linear`.

    Attributes:
        parts: The map of each.
    """

    def __init__(self, *modules: Any) -> None:
        self.parts = [LinearMap.of(module) for module in modules]
        self._ends = list(accumulate(len(part.weight) for part in self.parts))[:-1]
        self._tensors = [tensor for part in self.parts for tensor in part.tensors() if tensor is not None]
        self._addresses: list[int] = []
        self._joined: LinearMap | None = None
        if _can_be_one(self.parts):
            self._join()

    def side_by_side(self, hidden: Tensor) -> Tensor:
        """``[rows, in]`` to ``[rows, sum of out]``."""
        joined = self._one()
        return torch.cat([part(hidden) for part in self.parts], -1) if joined is None else joined(hidden)

    def apart(self, hidden: Tensor) -> Sequence[Tensor]:
        """``[rows, in]`` to ``[rows, out]`` of each."""
        joined = self._one()
        if joined is None:
            return [part(hidden) for part in self.parts]
        return torch.tensor_split(joined(hidden), self._ends, -1)

    def _one(self) -> LinearMap | None:
        """All of them as one, laid together again if their parameters have been given other memory."""
        if self._joined is not None and self._where() != self._addresses:
            self._join()
        return self._joined

    def _where(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]

    def _join(self) -> None:
        weights, *others = zip(*(part.tensors() for part in self.parts), strict=True)
        weight = _laid_together(weights)
        assert weight is not None
        self._joined = type(self.parts[0])(weight, *map(_laid_together, others))
        self._addresses = self._where()


def _can_be_one(maps: Sequence[LinearMap]) -> bool:
    """Whether maps are small, on a CPU, and made of the same kind of plain tensors."""
    if len(maps) == 1 or len({type(each) for each in maps}) > 1:
        return False
    if sum(each.weight.numel() for each in maps) > _MAX_JOINED:
        return False
    for alike in zip(*(each.tensors() for each in maps), strict=True):
        tensors = [tensor for tensor in alike if tensor is not None]
        if len(tensors) not in (0, len(maps)) or len({tensor.dtype for tensor in tensors}) > 1:
            return False
        for tensor in tensors:
            # Weights in the formats of quantisation libraries are of subclasses.
            plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()
            if not plain or tensor.device.type != "cpu":
                return False
    return True


@torch.inference_mode(False)
def _laid_together(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """One tensor of the rows of several, which become views of it; ``None`` of none."""
    held = [tensor.detach() for tensor in tensors if tensor is not None]
    if not held:
        return None
    joined = torch.cat(held)
    start = 0
    for tensor in tensors:
        assert tensor is not None
        tensor.data = joined[start : start + len(tensor)]
        start += len(tensor)
    return joined
