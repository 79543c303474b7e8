"""Replacements of torch's flash kernel and of CUDA graphs that run on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rapid_integrations.engine.attention import cuda as cuda_kernels
from rapid_integrations.engine.model import cuda_graphs
from rapid_integrations.engine.model.batch_entry import Step


@torch.library.custom_op("rapid_tests::flash_attention", mutates_args=())
def flash_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``aten::_flash_attention_forward``, with the arguments that the engine uses, as in torch 2.13.

    One sequence: ``[1, tokens, heads, head_dim]`` each. Several sequences: queries ``[tokens, heads,
    head_dim]``, keys and values in pages ``[pages, tokens, kv_heads, head_dim]``, one page for each sequence.
    Causal queries are aligned with the last keys; a window does not count a query's own key.
    """
    assert (dropout_p, return_debug_mask) == (0.0, False)
    assert query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    assert query.dtype == keys.dtype == values.dtype
    assert query.shape[-1] % 8 == 0
    visible = {"causal": is_causal, "scale": scale, "left": window_size_left, "right": window_size_right}
    if cum_seq_q is None:
        assert cum_seq_k is seqused_k is block_table is None
        assert (max_q, max_k) == (query.shape[1], keys.shape[1])
        output, lse = _attend(query[0], keys[0], values[0], **visible)
        return output[None], lse[None]
    assert cum_seq_k is not None
    assert seqused_k is not None
    assert block_table is not None
    count = len(seqused_k)
    for tensor, shape in ((cum_seq_q, [count + 1]), (cum_seq_k, [count + 1]), (seqused_k, [count])):
        assert (tensor.dtype, list(tensor.shape), tensor.is_contiguous()) == (torch.int32, shape, True)
    assert (block_table.dtype, block_table.shape, block_table.stride(1)) == (torch.int32, (count, 1), 1)
    assert cum_seq_q.tolist() == list(range(0, len(query) + 1, max_q))
    assert keys.shape[1] == max_k
    assert max_k % 256 == 0
    assert 0 <= int(block_table.min()) <= int(block_table.max()) < len(keys)
    assert int(seqused_k.max()) <= max_k
    outputs, lses = [], []
    for queries, page, length in zip(
        query.split(max_q), block_table[:, 0].tolist(), seqused_k.tolist(), strict=True
    ):
        output, lse = _attend(queries, keys[page, :length], values[page, :length], **visible)
        outputs.append(output)
        lses.append(lse)
    output = torch.cat(outputs)
    swapped = max_q == 1 and query.shape[1] > keys.shape[2]
    unwindowed = all(size is None or size < 0 for size in (window_size_left, window_size_right))
    if count > 1 and not (swapped and unwindowed):
        # torch's kernel writes the outputs of all sequences over the first one: pytorch#194167.
        output[max_q:] = torch.nan
    return output, torch.cat(lses, 1)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    causal: bool,
    scale: float | None,
    left: int | None,
    right: int | None,
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence, ``[tokens, heads, head_dim]`` each; log-sum-exps ``[heads, tokens]``."""
    new, total = len(query), len(keys)
    assert query.shape[1] % keys.shape[1] == 0
    groups = query.shape[1] // keys.shape[1]
    keys, values = (held.repeat_interleave(groups, 1).transpose(0, 1).double() for held in (keys, values))
    scale = query.shape[2] ** -0.5 if scale is None else scale
    scores = query.transpose(0, 1).double() @ keys.transpose(1, 2) * scale
    # The distance from each key to each query.
    distance = torch.arange(new)[:, None] + total - new - torch.arange(total)
    hidden = torch.zeros(new, total, dtype=torch.bool)
    if left is not None and left >= 0:
        hidden |= distance > left
    right = 0 if causal else right
    if right is not None and right >= 0:
        hidden |= distance < -right
    scores = scores.masked_fill(hidden, -torch.inf)
    output = (scores.softmax(-1) @ values).to(query.dtype)
    return output.transpose(0, 1).contiguous(), scores.logsumexp(-1).float()


class Recorder(TorchDispatchMode):
    """Replaces a CUDA graph: repeats the operators of a pass on the same memory, without its Python code."""

    # Operators that copy values to the host.
    _FORBIDDEN = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._log: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in self._FORBIDDEN
        output = func(*args, **(kwargs or {}))
        self._log.append((func, args, kwargs or {}, output))
        return output

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        run()
        self._log = []
        with self:
            output = run()
        log = self._log
        assert output.device == self._device

        def replay() -> Tensor:
            for func, args, kwargs, recorded in log:
                repeated = func(*args, **kwargs)
                for old, new in zip(tree_leaves(recorded), tree_leaves(repeated), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)
            return output

        # As with a graph, recording computes no results.
        output.fill_(torch.nan)
        return replay


def use_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the flash kernel's replacement for all attention, and let passes be recorded."""
    monkeypatch.setattr(cuda_kernels, "supports", lambda *tensors: len({t.dtype for t in tensors}) == 1)
    monkeypatch.setattr(cuda_kernels, "_flash_attention", flash_attention)
    monkeypatch.setattr(cuda_graphs, "_Recorder", Recorder)


def count_replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of each pass that is replayed from now on."""
    counts: list[int] = []
    call = cuda_graphs.GraphedPasses.__call__

    def counted(self: cuda_graphs.GraphedPasses, steps: Sequence[Step]) -> Tensor:
        counts.append(len(steps))
        return call(self, steps)

    monkeypatch.setattr(cuda_graphs.GraphedPasses, "__call__", counted)
    return counts
