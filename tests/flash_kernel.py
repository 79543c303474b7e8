"""What the flash kernel of CUDA devices computes, on a CPU, for tests of the code that calls it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from rapid_integrations.engine import cuda_kernels, graphs


def flash_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cum_seq_q: None,
    cum_seq_k: None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None,
    window_size_left: int | None,
    window_size_right: int | None,
) -> tuple[Tensor, Tensor]:
    """``aten::_flash_attention_forward`` for one sequence: ``[1, tokens, heads, head_dim]`` each.

    Causal queries are aligned with the last keys; windows count the keys beside a query's own.
    """
    assert (cum_seq_q, cum_seq_k, dropout_p, return_debug_mask) == (None, None, 0.0, False)
    assert (max_q, max_k) == (query.shape[1], keys.shape[1])
    assert query.shape[2] % keys.shape[2] == 0
    groups = query.shape[2] // keys.shape[2]
    keys, values = (held.repeat_interleave(groups, 2).transpose(1, 2).double() for held in (keys, values))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    scores = query.transpose(1, 2).double() @ keys.transpose(2, 3) * scale
    # How far each key is behind each query.
    behind = torch.arange(max_q)[:, None] + max_k - max_q - torch.arange(max_k)
    unseen = torch.zeros(max_q, max_k, dtype=torch.bool)
    if window_size_left is not None and window_size_left >= 0:
        unseen |= behind > window_size_left
    right = 0 if is_causal else window_size_right
    if right is not None and right >= 0:
        unseen |= behind < -right
    scores = scores.masked_fill(unseen, -torch.inf)
    output = (scores.softmax(-1) @ values).to(query.dtype)
    return output.transpose(1, 2), scores.logsumexp(-1).float()


def varlen_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """``torch.nn.attention.varlen.varlen_attn`` over pages, of which each sequence has one."""
    pages, capacity = keys.shape[:2]
    assert {t.dtype for t in (cu_seq_q, cu_seq_k, seqused_k, block_table)} == {torch.int32}
    assert enable_gqa
    assert capacity == max_k
    assert capacity % 256 == 0
    assert int(seqused_k.max()) <= capacity
    assert block_table.shape == (len(seqused_k), 1)
    assert int(block_table.max()) < pages
    assert cu_seq_q.diff().tolist() == [max_q] * len(seqused_k)
    left, right = (None if size < 0 else size for size in window_size)
    outputs = []
    for start, length, (page,) in zip(
        cu_seq_q.tolist(), seqused_k.tolist(), block_table.tolist(), strict=False
    ):
        own = query[None, start : start + max_q]
        held = (pool[page, :length][None] for pool in (keys, values))
        output, _ = flash_attention(
            own,
            *held,
            None,
            None,
            max_q,
            length,
            0.0,
            window_size == (-1, 0),
            False,
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        outputs.append(output[0])
    return torch.cat(outputs)


def recorded(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A graph's stand-in: the same memory every time."""
    output = run().clone()
    assert output.device == device

    def replay() -> Tensor:
        return output.copy_(run())

    return replay


@pytest.fixture
def flash_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything goes to the flash kernel, as on a CUDA device, and passes can be recorded."""
    monkeypatch.setattr(cuda_kernels, "takes", lambda *tensors: len({t.dtype for t in tensors}) == 1)
    monkeypatch.setattr(cuda_kernels, "_flash_attention", flash_attention)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attention)
    monkeypatch.setattr(graphs, "_recorded", recorded)
