"""Products of float32 matrices by oneDNN, on a CPU, where torch's own go through MKL.

MKL's kernels are not always the fastest: on a Zen 5 oneDNN multiplies 24 rows and more in half the time, on a
Xeon 8 rows by a large matrix. torch's fused attention multiplies by MKL too, which keeps its best kernels for
Intel's processors. Elsewhere attention to many keys is built here from oneDNN's products, head by head, with
few of the scores in memory at a time; on a Xeon the fused kernel takes two thirds of their time.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn

from rapid_integrations._processor import processor_facts

# The operator that torch's own compiler calls for a linear layer; there is no public one for dense tensors.
_AVAILABLE = (
    torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]  # untyped in torch
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # as above
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
MKL_IS_FAST = "GenuineIntel" in processor_facts().get("vendor_id", platform.processor())
"""Whether torch's fused attention, which multiplies by MKL, beats attention made of matrix products here."""

# Fewer rows are bound by reading the weights.
_MIN_ROWS = 8
# A call takes some 20 microseconds more than torch's own: what fewer multiplications do not make up for.
_MIN_MULTIPLICATIONS = 2**23
# Scores of a head, by thread, from which attention pays its calls for every head and the merging.
_MIN_SCORES = 2**17
# Of more queries, as a prompt's, the fused kernel is about as fast, and oneDNN keeps hundreds of megabytes.
_MAX_QUERIES = 128
# Scores of a head that exist at a time, and what the number of their keys is a multiple of: oneDNN prepares
# itself anew for every shape.
_MAX_SCORES = 2**20
_KEYS_MULTIPLE = 512


def takes(weight: Tensor) -> bool:
    """Whether products with a linear layer's weight can be oneDNN's: plain numbers in float32 on a CPU."""
    return (
        _AVAILABLE
        and type(weight) in (Tensor, nn.Parameter)  # quantised weights are of subclasses
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
    )


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden @ weight.T + bias`` for a weight that :func:`takes` takes.

    Args:
        hidden: ``[rows, in]`` float32.
        weight: ``[out, in]``.
        bias: ``[out]``, or ``None``.

    Returns:
        ``[rows, out]``.
    """
    rows = hidden.shape[0]
    if rows < _MIN_ROWS or rows * weight.numel() < _MIN_MULTIPLICATIONS:
        return nn.functional.linear(hidden, weight, bias)
    return _product(hidden, weight, bias)


def pays_for_attention(query: Tensor, num_queries: int, num_keys: int) -> bool:
    """Whether :func:`attention_by_heads` runs here and is the faster way.

    Args:
        query: The queries, in any shape.
        num_queries: How many belong to a head of keys.
        num_keys: How many keys each of them sees.
    """
    if MKL_IS_FAST or not takes(query):
        return False
    return num_queries <= _MAX_QUERIES and num_queries * num_keys >= _MIN_SCORES * torch.get_num_threads()


def attention_by_heads(query: Tensor, keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Attention to keys that every query sees, in partial results over some of the keys each.

    Args:
        query: ``[kv_heads, queries, head_dim]`` float32, scaled.
        keys: ``[kv_heads, keys, head_dim]``.
        values: The same.

    Returns:
        Outputs ``[kv_heads, queries, head_dim]`` and their scores' log-sum-exps ``[kv_heads, queries, 1]``.
    """
    block = max(_MAX_SCORES // query.shape[1] // _KEYS_MULTIPLE, 1) * _KEYS_MULTIPLE
    partials = []
    for start in range(0, keys.shape[1], block):
        some = slice(start, start + block)
        outputs, lses = [], []
        for head, head_keys, head_values in zip(query, keys[:, some], values[:, some], strict=True):
            scores = _product(head, head_keys)
            largest = scores.amax(-1, keepdim=True)
            weights = torch.softmax(scores, -1, out=scores)
            # The largest weight is exp(largest - lse).
            lses.append(largest - weights.amax(-1, keepdim=True).log())
            outputs.append(_product(weights, head_values.t()))
        partials.append((torch.stack(outputs), torch.stack(lses)))
    return partials


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return product
