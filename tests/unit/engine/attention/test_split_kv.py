"""Attention over parts of the keys, and of forks over one copy of their shared prefix."""

import random

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import ARCHITECTURES, VOCAB, tiny_model

from rapid_integrations.engine.attention import split_kv
from rapid_integrations.engine.attention.packed import PackedBatch
from rapid_integrations.engine.attention.split_kv import (
    _blockwise,
    _merged,
    _partial_attention,
    attend_in_parts,
)
from rapid_integrations.engine.cache.prefix_cache import PrefixCache
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel


@pytest.fixture(autouse=True)
def _fork_short_texts(monkeypatch) -> None:
    monkeypatch.setattr(SequenceKV, "FORK_TOKENS", 4)
    monkeypatch.setattr(SequenceKV, "MIN_FORK_TOKENS", 8)


# Partial results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("blockwise", [False, True])
def test_partial_results_merge_to_the_full_result(kv_heads, blockwise, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(kv_heads)
    query = torch.randn(4, 5, 16, generator=generator)
    keys, values = torch.randn(2, kv_heads, 50, 16, generator=generator)
    mask_of = PackedBatch([], []).mask
    mask = mask_of(45, 5, None, query.device, query.dtype)
    expected = F.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, scale=0.3, enable_gqa=True
    )[0]
    if blockwise:
        monkeypatch.setattr(split_kv, "_BLOCK_KEYS", 7)

        def partial(part, causal):
            folded = query.reshape(kv_heads, -1, 16) * 0.3
            its_mask = mask[:, part].repeat(4 // kv_heads, 1) if causal else None
            output, lse = _blockwise(folded, keys[:, part], values[:, part], its_mask)
            return output.reshape(4, 5, 16), lse.reshape(4, 5, 1)
    else:

        def partial(part, causal):
            return _partial_attention(query, keys[:, part], values[:, part], 0.3, causal)

    pieces = [slice(0, 20), slice(20, 21), slice(21, 50)]
    merged = _merged([partial(p, mask_of if p.stop == 50 else None) for p in pieces])
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


def test_a_block_that_is_masked_for_a_query_has_no_weight(monkeypatch) -> None:
    monkeypatch.setattr(split_kv, "_BLOCK_KEYS", 4)
    query, keys, values = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = PackedBatch([], []).mask(0, 8, None, query.device, query.dtype)
    output, lse = _blockwise(query, keys, values, mask)
    expected = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=1.0)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert lse.isfinite().all()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("past", [1, 600, 1024])
@pytest.mark.parametrize("new", [511, 512, 700])
def test_many_new_tokens_after_a_past_match_sdpa(kv_heads, past, new) -> None:
    generator = torch.Generator().manual_seed(new)
    query = torch.randn(new, 4, 16, generator=generator).transpose(0, 1)  # the memory layout of a pass
    keys, values = torch.randn(2, kv_heads, past + new, 16, generator=generator)
    found = attend_in_parts(query, keys, values, 0.3, PackedBatch([], []).mask)
    mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)
    expected = F.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, scale=0.3, enable_gqa=True
    )[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Forks -----------------------------------------------------------------------------------------------------


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(count)]


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forks_give_the_same_logits_as_copies(architecture, with_base) -> None:
    model = CausalModel(tiny_model(architecture))
    rng = random.Random(1)
    document = words(rng, 90)
    base = SequenceKV(100)
    model.forward([Step(base, document, 0)])
    # Forks of the document, forks of parts of it, and a sequence that shares nothing.
    lengths = [90, 90, 41, 90, 63]
    forks = [base.fork(length, 100) for length in lengths]
    copies = [base.copy_prefix(length, 100) for length in lengths]
    if with_base:
        forks.append(base)
        copies.append(base.copy_prefix(90, 100))
    assert [fork.base_length for fork in forks[:5]] == [88, 88, 40, 88, 60]
    forks.append(SequenceKV(4))
    copies.append(SequenceKV(4))
    for _ in range(6):
        counts = [rng.choice([1, 1, 3, 12]) for _ in forks]
        new = [words(rng, count) for count in counts]
        wanted = [rng.randint(0, count) for count in counts]
        shared, alone = (
            model.forward([Step(c, tokens, n) for c, tokens, n in zip(caches, new, wanted, strict=True)])
            for caches in (forks, copies)
        )
        torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4 * float(alone.std()))
        for fork, copy, count in zip(forks, copies, counts, strict=True):
            back = rng.randint(0, count)
            fork.rollback(fork.length - back)
            copy.rollback(copy.length - back)


def test_a_fork_stores_only_the_tokens_after_the_shared_ones() -> None:
    model = CausalModel(tiny_model("llama"))
    base = SequenceKV(1000)
    model.forward([Step(base, words(random.Random(2), 1000), 0)])
    fork = base.fork(999, 1010)
    assert (fork.length, fork.base_length) == (999, 996)
    assert fork.num_bytes < 0.02 * base.num_bytes
    for cache in (fork, base):
        assert cache.prefix_bytes == sum(keys.nbytes + values.nbytes for _, keys, values in cache.layers())
    for (_, *own), (_, *its_base) in zip(fork.layers(), base.layers(), strict=True):
        for held, wanted in zip(own, its_base, strict=True):
            assert torch.equal(held, wanted[:, :999])


def test_a_fork_of_a_fork_shares_the_same_base() -> None:
    model = CausalModel(tiny_model("llama"))
    base = SequenceKV(40)
    text = words(random.Random(3), 60)
    model.forward([Step(base, text[:40], 0)])
    fork = base.fork(38, 60)
    model.forward([Step(fork, text[38:60], 0)])
    second = fork.fork(55, 80)
    assert second.base is base
    assert second.base_length == 36
    alone = SequenceKV(80)
    expected = model.forward([Step(alone, [*text[:55], 9], 1)])
    torch.testing.assert_close(model.forward([Step(second, [9], 1)]), expected, rtol=1e-4, atol=1e-4)


def test_short_prefixes_are_copied_instead_of_shared() -> None:
    model = CausalModel(tiny_model("llama"))
    base = SequenceKV(40)
    model.forward([Step(base, words(random.Random(4), 40), 0)])
    assert base.fork(7, 20).base is None
    assert base.fork(7, 20).length == 7


def test_tokens_that_forks_read_cannot_be_rolled_back() -> None:
    model = CausalModel(tiny_model("llama"))
    base = SequenceKV(40)
    model.forward([Step(base, words(random.Random(5), 40), 0)])
    fork = base.fork(30, 40)
    base.rollback(28)
    with pytest.raises(ValueError, match="the first 28 are read by forks"):
        base.rollback(27)
    with pytest.raises(ValueError, match="the first 28 are in the base"):
        fork.rollback(27)
    assert (base.length, fork.length) == (28, 30)
    del fork
    base.rollback(3)
    assert base.length == 3


def test_growing_a_base_leaves_its_forks_intact() -> None:
    model = CausalModel(tiny_model("llama"))
    base = SequenceKV(40)
    text = words(random.Random(6), 40)
    model.forward([Step(base, text, 0)])
    fork = base.fork(40, 50)
    model.forward([Step(base, words(random.Random(7), 30), 0)])
    assert base.capacity >= 70
    expected = model.forward([Step(SequenceKV(50), [*text, 9], 1)])
    torch.testing.assert_close(model.forward([Step(fork, [9], 1)]), expected, rtol=1e-4, atol=1e-4)


def test_the_prefix_cache_counts_bases_and_hands_over_no_cache_that_forks_read() -> None:
    model = CausalModel(tiny_model("llama"))
    text = words(random.Random(8), 40)
    base = SequenceKV(40)
    model.forward([Step(base, text, 0)])
    fork = base.fork(40, 60)
    other = words(random.Random(9), 20)
    model.forward([Step(fork, other, 0)])
    store = PrefixCache(10**9)
    store.put(model, [*text, *other], fork)
    assert store.num_bytes == fork.num_bytes + base.num_bytes
    store.put(model, [*text[:40]], base)
    # The prompt has fewer tokens in common with the text than the fork has.
    taken = store.take(model, [*text[:38], 5, 6, 7], capacity=50)
    assert taken is not None
    assert taken is not base
    assert taken is not fork
    assert taken.length == 38
    for layer, keys, values in taken.layers():
        wanted = base.read(layer, 0, 38)
        assert torch.equal(keys, wanted[0])
        assert torch.equal(values, wanted[1])
