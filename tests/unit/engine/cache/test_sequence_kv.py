"""Growth and capacity of a sequence's cache."""

import weakref

import pytest
import torch

from rapid_integrations.engine.cache import sequence_kv
from rapid_integrations.engine.cache.prefix_cache import PrefixCache
from rapid_integrations.engine.cache.sequence_kv import SequenceKV


def cache_of(tokens: int, capacity: int) -> SequenceKV:
    kv = SequenceKV(capacity)
    kv.write(0, torch.randn(2, tokens, 4), torch.randn(2, tokens, 4))
    kv.length = tokens
    return kv


def buffers(kv: SequenceKV) -> list[int]:
    return [part.data_ptr() for _, *parts in kv.layers() for part in parts]


@pytest.mark.parametrize("text", [1000, 5000, 16400, 120_000])
def test_a_slightly_longer_question_about_the_same_text_copies_nothing(text: int) -> None:
    store = PrefixCache(10**9)
    model = object()
    kv = cache_of(text, text + 256)
    held = buffers(kv)
    for longer in (3, 4, 9, 20):
        store.put(model, range(text), kv)  # type: ignore[arg-type]
        kv = store.take(model, range(text), capacity=text + 256 + longer)  # type: ignore[arg-type, assignment]
        assert kv.capacity >= text + 256 + longer
    assert buffers(kv) == held


@pytest.mark.parametrize("capacity", [*range(1, 70), 1000, 1024, 1025, 16656, 120_300])
def test_capacity_is_rounded_up_by_at_most_a_sixteenth(capacity: int) -> None:
    assert capacity <= SequenceKV(capacity).capacity <= capacity * 17 / 16


def test_a_fork_rounds_up_only_its_own_tokens() -> None:
    fork = cache_of(16400, 16656).fork(16390, 16700)
    assert fork.base_length == 16384
    assert 16700 <= fork.capacity <= 16384 + (16700 - 16384) * 17 / 16


def test_growth_frees_each_layer_before_it_allocates_the_next() -> None:
    cache = SequenceKV(64)
    for layer in range(8):
        cache.write(layer, torch.ones(2, 64, 16), torch.ones(2, 64, 16))
    cache.length = 64
    before = [weakref.ref(held.keys) for held in cache._layers.values()]
    alive: list[int] = []
    extended = sequence_kv._extended

    def counted(held, capacity):
        alive.append(sum(keys() is not None for keys in before))
        return extended(held, capacity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence_kv, "_extended", counted)
        cache.reserve(200)
    assert alive == [8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1]
    assert cache.length == 64
