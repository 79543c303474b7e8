"""What the flash kernel of CUDA devices computes, on a CPU, for tests of the code that calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rapid_integrations.engine.attention import cuda as cuda_kernels
from rapid_integrations.engine.model import cuda_graphs as graphs
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
    """``aten::_flash_attention_forward``, as far as the engine uses it, and as it is in torch 2.13.

    For one sequence, ``[1, tokens, heads, head_dim]`` each; or for several, ``[tokens, heads, head_dim]``,
    and keys and values in pages ``[pages, tokens, kv_heads, head_dim]``, one a sequence. Causal queries are
    aligned with the last keys; windows count the keys beside a query's own.
    """
    assert (dropout_p, return_debug_mask) == (0.0, False)
    assert query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    assert query.dtype == keys.dtype == values.dtype
    assert query.shape[-1] % 8 == 0
    seen = {"causal": is_causal, "scale": scale, "left": window_size_left, "right": window_size_right}
    if cum_seq_q is None:
        assert cum_seq_k is seqused_k is block_table is None
        assert (max_q, max_k) == (query.shape[1], keys.shape[1])
        output, lse = _attend(query[0], keys[0], values[0], **seen)
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
    for own, page, length in zip(
        query.split(max_q), block_table[:, 0].tolist(), seqused_k.tolist(), strict=True
    ):
        output, lse = _attend(own, keys[page, :length], values[page, :length], **seen)
        outputs.append(output)
        lses.append(lse)
    output = torch.cat(outputs)
    swapped = max_q == 1 and query.shape[1] > keys.shape[2]
    unwindowed = all(size is None or size < 0 for size in (window_size_left, window_size_right))
    if count > 1 and not (swapped and unwindowed):
        # What its processors divide among them is all written over the first sequence: pytorch#194167.
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
    """Of one sequence, ``[tokens, heads, head_dim]`` each; log-sum-exps ``[heads, tokens]``."""
    new, total = len(query), len(keys)
    assert query.shape[1] % keys.shape[1] == 0
    groups = query.shape[1] // keys.shape[1]
    keys, values = (held.repeat_interleave(groups, 1).transpose(0, 1).double() for held in (keys, values))
    scale = query.shape[2] ** -0.5 if scale is None else scale
    scores = query.transpose(0, 1).double() @ keys.transpose(1, 2) * scale
    # How far each key is behind each query.
    behind = torch.arange(new)[:, None] + total - new - torch.arange(total)
    unseen = torch.zeros(new, total, dtype=torch.bool)
    if left is not None and left >= 0:
        unseen |= behind > left
    right = 0 if causal else right
    if right is not None and right >= 0:
        unseen |= behind < -right
    scores = scores.masked_fill(unseen, -torch.inf)
    output = (scores.softmax(-1) @ values).to(query.dtype)
    return output.transpose(0, 1).contiguous(), scores.logsumexp(-1).float()


class Recorder(TorchDispatchMode):
    """A CUDA graph's stand-in: repeats the operators of a pass, on the same memory, and no Python."""

    # What reads from the device, or depends on what was read.
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
            for func, args, kwargs, known in log:
                again = func(*args, **kwargs)
                for held, new in zip(tree_leaves(known), tree_leaves(again), strict=True):
                    if held.data_ptr() != new.data_ptr():
                        held.copy_(new)
            return output

        # As with a graph, what recording computed is none of the results.
        output.fill_(torch.nan)
        return replay


def use_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything go to the flash kernel, as on a CUDA device, and passes be recorded."""
    monkeypatch.setattr(cuda_kernels, "supports", lambda *tensors: len({t.dtype for t in tensors}) == 1)
    monkeypatch.setattr(cuda_kernels, "_flash_attention", flash_attention)
    monkeypatch.setattr(graphs, "_Recorder", Recorder)


def count_replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each pass has that is replayed from now on."""
    counts: list[int] = []
    call = graphs.GraphedPasses.__call__

    def counted(self: graphs.GraphedPasses, steps: Sequence[Step]) -> Tensor:
        counts.append(len(steps))
        return call(self, steps)

    monkeypatch.setattr(graphs.GraphedPasses, "__call__", counted)
    return counts
