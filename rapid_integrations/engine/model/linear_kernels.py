"""Linear layers in float32 on a CPU, by the kernel that is fastest for their size on this processor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rapid_integrations.engine import onednn, processor

# The maximum rows of a product that is split into blocks, and the minimum number of blocks.
_MAX_FEW_ROWS = 64
_MIN_BLOCKS = 8
# The sizes from which weights are split into blocks, are oneDNN's whatever the number of rows, and are
# oneDNN's on processors where it pays for few rows only.
_MIN_BLOCKED_WEIGHT = 2**17
_MIN_WEIGHT_FOR_ANY_ROWS = 2**20
_MIN_WEIGHT_FOR_FEW_ROWS = 2**21
# Products of fewer rows with a small weight are limited by reading the weight.
_MIN_ROWS = 8
# A call of oneDNN takes about 20 microseconds longer than torch's own; fewer multiplications do not pay.
_MIN_MULTIPLICATIONS = 2**23


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden @ weight.T + bias`` for a weight that :func:`onednn.supports` accepts.

    Args:
        hidden: ``[rows, in]`` float32.
        weight: ``[out, in]``.
        bias: ``[out]``, or ``None``.

    Returns:
        ``[rows, out]``.
    """
    rows, size = hidden.shape[0], weight.numel()
    profile = processor.CURRENT
    if rows <= _MAX_FEW_ROWS and _MIN_BLOCKED_WEIGHT <= size < profile.max_blocked_weight:
        blocks = 1 << (max(_MIN_BLOCKS, torch.get_num_threads()) - 1).bit_length()
        if weight.shape[0] % blocks == 0:
            product = _product_in_blocks(hidden, weight, blocks)
            return product if bias is None else product.add_(bias)
    pays = rows >= _MIN_ROWS and rows * size >= _MIN_MULTIPLICATIONS
    if profile.few_rows_only:
        pays = pays and rows <= _MAX_FEW_ROWS and size >= _MIN_WEIGHT_FOR_FEW_ROWS
    elif size >= _MIN_WEIGHT_FOR_ANY_ROWS:
        pays = True
    return onednn.linear(hidden, weight, bias) if pays else nn.functional.linear(hidden, weight, bias)


def _product_in_blocks(hidden: Tensor, weight: Tensor, blocks: int) -> Tensor:
    """The product as a batch of products, one for each block of outputs, which run in parallel."""
    outputs, inputs = weight.shape
    parts = torch.bmm(
        hidden.expand(blocks, -1, -1), weight.view(blocks, outputs // blocks, inputs).transpose(1, 2)
    )
    return parts.transpose(0, 1).reshape(len(hidden), outputs)
