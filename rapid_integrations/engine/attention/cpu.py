"""Which kernels multiply and attend fastest on a CPU in float32, by what was measured on three kinds.

torch's own products and its fused attention go through MKL, which keeps its AVX-512 kernels for Intel's
processors, and elsewhere gives products of few rows to one thread or divides them badly. What helps there:
oneDNN's products; attention built of them, head by head, with few of the scores in memory at a time; and
linear layers as batches of products, one for each block of their outputs.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rapid_integrations.engine.processor import processor_facts

# The operator that torch's own compiler calls for a linear layer; there is no public one for dense tensors.
_AVAILABLE = (
    torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]  # untyped in torch
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # as above
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


@dataclass(frozen=True, slots=True)
class Processor:
    """What is fastest on a kind of processors.

    Attributes:
        fused_attention: Whether torch's fused kernel attends faster than matrix products do, where several
            queries share keys. By the products that win elsewhere, 17 queries over 16k keys take 1.4 times as
            long on a Zen 3, and 1.5 times on a Xeon.
        single_query_by_products: Whether one query whose keys no other head shares goes by products: four
            fifths of the fused kernel's time, but on a Xeon.
        bfloat16_in_pairs: Whether torch's fused kernel takes less time for two queries in bfloat16 than for
            one: half of it on a Zen 4, where one takes more than twice the time that it does in float32.
        blocks_below: Of weights with fewer numbers, few rows go through a linear layer block by block of its
            outputs; 0: never. On a Zen 3 with two threads one row by a weight of 2048 x 2048 takes 0.65 of
            the time of torch's product, 4 to 26 rows 0.4 to 0.45, 64 rows 0.6; 0.7 to 0.9 of oneDNN's. On a
            Zen 4 0.6 to 0.9 by weights of 2**17 to 2**20 numbers, so that a small model's pass over one
            token takes 0.8 of the time; by larger weights oneDNN's take 0.4 to 0.7, from one row on.
        few_rows_only: Whether oneDNN's products are for few rows by a large weight: a Xeon with two threads
            takes 0.4 to 0.8 of torch's time for 8 to 64 rows by 2048 x 2048 and more, 1.05 to 1.1 for 1,024
            rows, and 1.3 to 1.4 for 26 by small weights. Elsewhere they are faster than torch's throughout.
    """

    fused_attention: bool
    single_query_by_products: bool
    bfloat16_in_pairs: bool
    blocks_below: int
    few_rows_only: bool


INTEL = Processor(
    fused_attention=True,
    single_query_by_products=False,
    bfloat16_in_pairs=False,
    blocks_below=0,
    few_rows_only=True,
)
AVX512 = Processor(
    fused_attention=False,
    single_query_by_products=True,
    bfloat16_in_pairs=True,
    blocks_below=2**20,
    few_rows_only=False,
)
OTHER = Processor(
    fused_attention=True,
    single_query_by_products=True,
    bfloat16_in_pairs=False,
    blocks_below=2**62,
    few_rows_only=False,
)


def _processor() -> Processor:
    if "GenuineIntel" in processor_facts().get("vendor_id", platform.processor()):
        return INTEL
    return AVX512 if torch.backends.cpu.get_cpu_capability() == "AVX512" else OTHER


HERE = _processor()
"""This machine's: of Intel (measured: a Xeon), another with AVX-512 (a Zen 4) or without (a Zen 3)."""

# Few rows, the least number of blocks, and the sizes from which weights are large: by blocks, by oneDNN from
# one row on, and by oneDNN where it is for those only.
_MAX_FEW_ROWS = 64
_MIN_BLOCKS = 8
_MIN_WEIGHT_BY_BLOCKS = 2**17
_MIN_WEIGHT_BY_A_ROW = 2**20
_MIN_LARGE_WEIGHT = 2**21
# Fewer rows by a small weight are bound by reading it.
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
    rows, size = hidden.shape[0], weight.numel()
    if rows <= _MAX_FEW_ROWS and _MIN_WEIGHT_BY_BLOCKS <= size < HERE.blocks_below:
        blocks = 1 << (max(_MIN_BLOCKS, torch.get_num_threads()) - 1).bit_length()
        if weight.shape[0] % blocks == 0:
            product = _product_by_blocks(hidden, weight, blocks)
            return product if bias is None else product.add_(bias)
    pays = rows >= _MIN_ROWS and rows * size >= _MIN_MULTIPLICATIONS
    if HERE.few_rows_only:
        pays = pays and rows <= _MAX_FEW_ROWS and size >= _MIN_LARGE_WEIGHT
    elif size >= _MIN_WEIGHT_BY_A_ROW:
        pays = True
    return _product(hidden, weight, bias) if pays else nn.functional.linear(hidden, weight, bias)


def pays_for_attention(query: Tensor, num_queries: int, num_keys: int) -> bool:
    """Whether :func:`attention_by_heads` runs here and is the faster way.

    Args:
        query: The queries, in any shape.
        num_queries: How many belong to a head of keys.
        num_keys: How many keys each of them sees.
    """
    if HERE.fused_attention or not takes(query):
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


def _product_by_blocks(hidden: Tensor, weight: Tensor, blocks: int) -> Tensor:
    size, width = weight.shape
    parts = torch.bmm(
        hidden.expand(blocks, -1, -1), weight.view(blocks, size // blocks, width).transpose(1, 2)
    )
    return parts.transpose(0, 1).reshape(len(hidden), size)


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return product
