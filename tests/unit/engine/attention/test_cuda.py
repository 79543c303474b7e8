"""The flash kernel: correct arguments on a CPU replacement, and accepted by torch's operator."""

import random

import pytest
import torch
from helpers.packed_reference import found_and_expected
from helpers.tiny_models import ARCHITECTURES, VOCAB, tiny_model

from rapid_integrations.engine.attention import cuda as cuda_kernels
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel


@pytest.mark.parametrize("new", [1, 2, 40])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("past", [0, 30])
@pytest.mark.parametrize("window", [None, 1, 20, 64])
@pytest.mark.parametrize("scaling", [None, 0.1])
@pytest.mark.usefixtures("flash_kernel")
def test_new_tokens_after_a_past_match_sdpa(new, groups, past, window, scaling) -> None:
    generator = torch.Generator().manual_seed(new)
    total, kv_heads = past + new, 2
    keys, values = torch.randn(2, kv_heads, total, 16, generator=generator)
    query = torch.randn(kv_heads * groups, new, 16, generator=generator)
    found, expected = found_and_expected(query, keys, values, scaling=scaling, window=window)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_match_those_without_the_kernel(architecture, request, monkeypatch) -> None:
    """Prompts in chunks, several sequences, forks and rollbacks, with the layers of each architecture."""
    monkeypatch.setattr(SequenceKV, "FORK_TOKENS", 4)
    monkeypatch.setattr(SequenceKV, "MIN_FORK_TOKENS", 8)
    model = CausalModel(tiny_model(architecture))

    def logits() -> torch.Tensor:
        rng = random.Random(1)

        def words(count: int) -> list[int]:
            return [rng.randrange(3, VOCAB) for _ in range(count)]

        base, other = SequenceKV(100), SequenceKV(8)
        found = [model.forward([Step(base, words(60), 1), Step(other, words(9), 3)])]
        found.append(model.forward([Step(base, words(41), 0), Step(other, words(1), 1)]))
        caches = [base.fork(99, 120), base.fork(70, 120), base, other]
        for counts in ((1, 1, 1, 1), (5, 1, 12, 2), (1, 30, 3, 1)):
            found.append(model.forward([Step(c, words(n), n) for c, n in zip(caches, counts, strict=True)]))
            for cache, count in zip(caches, counts, strict=True):
                cache.rollback(cache.length - count // 2)
        return torch.cat(found)

    expected = logits()
    request.getfixturevalue("flash_kernel")
    torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 300)])
def test_the_arguments_and_shapes_match_torchs_operator(kv_heads, causal, window) -> None:
    """Needs no device: torch checks arguments and shapes on meta tensors."""
    # Parts of larger buffers, as in a cache.
    keys, values = torch.empty(2, kv_heads, 1000, 64, dtype=torch.bfloat16, device="meta")[:, :, :700]
    query = torch.empty(11, 8, 64, dtype=torch.bfloat16, device="meta").transpose(0, 1)
    output, lse = cuda_kernels.attention(query, keys, values, 0.1, causal=causal, window=window)
    assert (output.shape, output.dtype) == (query.shape, query.dtype)
    assert (lse.shape, lse.dtype) == (torch.Size([8, 11, 1]), torch.float32)


def test_the_kernel_does_not_support_a_cpu() -> None:
    query, keys, values = torch.zeros(3, 2, 4, 16, dtype=torch.bfloat16)
    assert not cuda_kernels.supports(query, keys, values)
