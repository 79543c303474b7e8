"""Matrix products by oneDNN in float32 on a CPU, which torch's public functions do not offer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# torch's compiler calls this operator for linear layers; there is no public one for dense tensors.
_AVAILABLE = (
    torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]  # untyped in torch
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # as above
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def supports(tensor: Tensor) -> bool:
    """Whether products with a tensor can be oneDNN's: a plain float32 tensor on a CPU."""
    return (
        _AVAILABLE
        and type(tensor) in (Tensor, nn.Parameter)  # quantised weights are subclasses
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
    )


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows @ weight.T + bias`` for tensors that :func:`supports` accepts.

    Args:
        rows: ``[rows, in]``.
        weight: ``[out, in]``.
        bias: ``[out]``, or ``None``.

    Returns:
        ``[rows, out]``.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product
