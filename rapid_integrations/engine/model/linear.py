"""The linear maps of a model's layers, and small ones with the same input as a single product.

Queries, keys and values are products with the same input, and so are the two branches of a gated layer. On a
CPU a small model spends as much time in the calls as in the arithmetic. :class:`LinearGroup` stores the
weights of such maps one below the other, and makes the model's parameters views of this memory: one call
instead of two or three, and no weight is stored twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid_integrations.engine import onednn
from rapid_integrations.engine.model import linear_kernels
from rapid_integrations.engine.model.quantized import Int8Linear, int8_linear

# The maximum numbers in the weights of a group. Reading larger weights takes far longer than a call, and
# weights that are mapped from a file would be copied into memory.
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
        """The map of an ``nn.Linear`` or an :class:`Int8Linear`, which refers to the module's parameters."""
        if isinstance(module, Int8Linear):
            return _Int8Map(module.weight, module.bias, module.scale)
        kind = _Float32Map if onednn.supports(module.weight) else LinearMap
        return kind(module.weight, module.bias)

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[rows, in]`` to ``[rows, out]``."""
        return F.linear(hidden, self.weight, self.bias)


class _Float32Map(LinearMap):
    """A linear map in float32 on a CPU."""

    def __call__(self, hidden: Tensor) -> Tensor:
        return linear_kernels.linear(hidden, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Int8Map(LinearMap):
    """A linear map in 8-bit integers.

    Attributes:
        scale: ``[out]``, the size of one step in each row of the weight.
    """

    scale: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        return int8_linear(hidden, self.weight, self.scale, self.bias)


class LinearGroup:
    """Linear maps of the same input, joined into one product where that is faster: small ones in float32.

    Joined parameters move to other memory; their identity, shape and values stay. Changes of their values in
    place have effect. If a parameter is given other memory (``parameter.data = …``), the group computes its
    maps separately from then on.

    Args:
        *modules: Layers of class ``nn.Linear`` or :class:`Int8Linear`.

    Attributes:
        parts: The map of each module.
    """

    def __init__(self, *modules: Any) -> None:
        self.parts = [LinearMap.of(module) for module in modules]
        self._ends = list(accumulate(len(part.weight) for part in self.parts))[:-1]
        self._joined = _join(self.parts) if _can_join(self.parts) else None
        self._addresses = self._current_addresses()

    def concatenated(self, hidden: Tensor) -> Tensor:
        """``[rows, in]`` to ``[rows, sum of out]``."""
        joined = self._valid_join()
        return torch.cat([part(hidden) for part in self.parts], -1) if joined is None else joined(hidden)

    def separate(self, hidden: Tensor) -> Sequence[Tensor]:
        """``[rows, in]`` to ``[rows, out]`` of each map."""
        joined = self._valid_join()
        if joined is None:
            return [part(hidden) for part in self.parts]
        return torch.tensor_split(joined(hidden), self._ends, -1)

    def _valid_join(self) -> LinearMap | None:
        """The joined map, unless a parameter no longer is a view of its memory."""
        if self._joined is not None and self._current_addresses() != self._addresses:
            self._joined = None
        return self._joined

    def _current_addresses(self) -> list[int]:
        if self._joined is None:
            return []
        return [tensor.data_ptr() for part in self.parts for tensor in _tensors(part)]


def _tensors(part: LinearMap) -> list[Tensor]:
    return [part.weight] if part.bias is None else [part.weight, part.bias]


def _can_join(parts: Sequence[LinearMap]) -> bool:
    """Whether maps can and should be one product. In bfloat16 this was measured to be slower."""
    return (
        all(type(part) is _Float32Map for part in parts)
        and sum(part.weight.numel() for part in parts) <= _MAX_JOINED
        and len({part.bias is None for part in parts}) == 1
        and not any(tensor.is_inference() for part in parts for tensor in _tensors(part))
    )


def _join(parts: Sequence[LinearMap]) -> LinearMap:
    """One map of several; their weights and biases become views of its own."""
    biases = [part.bias for part in parts if part.bias is not None]
    return _Float32Map(_stack([part.weight for part in parts]), _stack(biases) if biases else None)


@torch.inference_mode(False)
def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors, and replace their data by views of the result."""
    stacked = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, view in zip(tensors, torch.split(stacked, [len(tensor) for tensor in tensors]), strict=True):
        tensor.data = view
    return stacked
