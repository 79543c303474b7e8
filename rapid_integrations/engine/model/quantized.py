"""Linear layers in 8-bit integers on a CPU, for a target that is its own, cheaper drafter.

Each row of a weight is rounded once, to 127 steps of its largest absolute value. Activations are rounded in
every pass, to 127 steps of each token's largest absolute value (T. Dettmers et al., arXiv:2208.07339, without
its treatment of outliers). The rounding of a token does not depend on other tokens in the pass, so a
request's distributions do not depend on the requests that are computed with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rapid_integrations.errors import ConfigurationError

_LEVELS = 127
_MIN_SCALE = 1e-12  # avoids a division by zero for rows of zeros


class Int8Linear(nn.Module):
    """A linear layer that multiplies 8-bit integers.

    Args:
        linear: The layer that it replaces; it is not kept.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = _rounded(linear.weight.detach().float())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, hidden: Tensor) -> Tensor:
        """``[…, in]`` to ``[…, out]``, in the same dtype."""
        return int8_linear(hidden, self.weight, self.scale, self.bias)


def int8_linear(hidden: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map as a product of 8-bit integers.

    Args:
        hidden: ``[…, in]``.
        weight: ``[out, in]`` int8.
        scale: ``[out]``, the size of one step in each row of ``weight``.
        bias: ``[out]``, or ``None``.

    Returns:
        ``[…, out]``, in the dtype of ``hidden``.
    """
    rows, row_scale = _rounded(hidden.reshape(-1, hidden.shape[-1]).float())
    product = torch._int_mm(rows, weight.t()).float() * row_scale * scale
    if bias is not None:
        product += bias
    return product.to(hidden.dtype).reshape(*hidden.shape[:-1], len(weight))


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as 8-bit integers ``[rows, width]``, and the size of one step in each row ``[rows, 1]``."""
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(_MIN_SCALE) / _LEVELS
    return (rows / scale).round().to(torch.int8), scale


def quantize_linears(model: PreTrainedModel) -> None:
    """Replace every linear layer of a model on a CPU, the LM head included; embeddings stay.

    Raises:
        ConfigurationError: The model is on another device.
    """
    if devices := {p.device.type for p in model.parameters()} - {"cpu"}:
        raise ConfigurationError(
            f"quantization_config='int8' is for CPUs, but the model is on {', '.join(sorted(devices))}: use "
            "transformers' BitsAndBytesConfig or TorchAoConfig there."
        )
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child))
