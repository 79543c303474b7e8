"""Caches against plain lists, over random sequences of operations."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from helpers.token_caches import TOKEN_BYTES, filled, read, shared, texts
from hypothesis import given, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rapid_integrations.engine.cache.prefix_cache import PrefixCache
from rapid_integrations.engine.cache.sequence_kv import SequenceKV, common_prefix_length

SETTINGS = settings(max_examples=50, deadline=None, derandomize=True, database=None)

# (kv_heads, head_dim) of keys and of values: layers may differ in everything.
LAYERS = {0: ((2, 4), (2, 4)), 1: ((1, 6), (1, 3)), 7: ((3, 2), (3, 5))}


def vectors(layer: int, tokens: list[int], kind: int) -> torch.Tensor:
    """``[kv_heads, tokens, head_dim]``, different for each token, layer, head, channel and kind."""
    heads, size = LAYERS[layer][kind]
    grid = torch.arange(heads * size, dtype=torch.float32).reshape(heads, 1, size)
    values = torch.tensor(tokens, dtype=torch.float32)[None, :, None]
    return values * 1000 + layer * 100 + grid + 50 * kind


class CacheMachine(RuleBasedStateMachine):
    """Every cache behaves as a list of tokens when it is read through writes."""

    caches = Bundle("caches")

    @initialize(target=caches, capacity=st.integers(1, 20))
    def make(self, capacity: int) -> Any:
        return [SequenceKV(capacity), []]

    @rule(held=caches, count=st.integers(1, 9), first=st.integers(0, 900), junk=st.integers(0, 3))
    def write(self, held: Any, count: int, first: int, junk: int) -> None:
        cache, model = held
        new = list(range(first, first + count))
        for layer in LAYERS:
            keys, values = cache.write(layer, vectors(layer, new, 0), vectors(layer, new, 1))
            assert torch.equal(keys, vectors(layer, model + new, 0))
            assert torch.equal(values, vectors(layer, model + new, 1))
            assert cache.length == len(model), "a write does not advance"
        # Written tokens that length does not cover do not count, as after a failed pass.
        kept = max(0, count - junk)
        cache.length += kept
        model.extend(new[:kept])

    @rule(held=caches, length=st.integers(-2, 40))
    def rollback(self, held: Any, length: int) -> None:
        cache, model = held
        cache.rollback(length)
        del model[max(length, 0) :]

    @rule(held=caches, capacity=st.integers(0, 60))
    def reserve(self, held: Any, capacity: int) -> None:
        cache, _ = held
        before = cache.capacity
        cache.reserve(capacity)
        if capacity <= before:
            assert cache.capacity == before
        else:
            assert capacity <= cache.capacity <= capacity * 17 / 16

    @rule(target=caches, held=caches, share=st.floats(0, 1), capacity=st.integers(0, 40))
    def copy(self, held: Any, share: float, capacity: int) -> Any:
        cache, model = held
        length = int(share * len(model))
        copied = cache.copy_prefix(length, capacity)
        assert copied.capacity >= max(length, capacity)
        return [copied, model[:length]]

    @rule(held=caches)
    def read_back(self, held: Any) -> None:
        cache, model = held
        probe = [901]
        for layer in LAYERS:
            keys, values = cache.write(layer, vectors(layer, probe, 0), vectors(layer, probe, 1))
            assert torch.equal(keys, vectors(layer, model + probe, 0))
            assert torch.equal(values, vectors(layer, model + probe, 1))
        assert cache.length == len(model)
        floats = sum(heads * size for layer in LAYERS.values() for heads, size in layer)
        assert cache.num_bytes == 4 * floats * cache.capacity


models = st.sampled_from(["target", "drafter"])


class StoreMachine(RuleBasedStateMachine):
    """The prefix cache against a list of (model, tokens, bytes), least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[tuple[str, list[int], int]] = []
        self.budget = 0

    @initialize(budget=st.integers(0, 200))
    def make(self, budget: int) -> None:
        self.budget = budget * TOKEN_BYTES
        self.store = PrefixCache(self.budget)

    @rule(model=models, tokens=texts, spare=st.integers(0, 20), beyond=st.integers(0, 3))
    def put(self, model: str, tokens: list[int], spare: int, beyond: int) -> None:
        # The sequence may be longer than its cache: its last tokens were never read.
        cache = filled(tokens, len(tokens) + spare)
        self.store.put(model, tokens + [9] * beyond, cache)
        size = cache.capacity * TOKEN_BYTES
        if size > self.budget or len(tokens) < PrefixCache.MIN_TOKENS:
            return
        for entry in list(self.held):
            common = shared(entry[1], tokens)
            if entry[0] == model and common == len(tokens) <= len(entry[1]):
                self.held.remove(entry)
                self.held.append(entry)
                return
            if entry[0] == model and common == len(entry[1]):
                self.held.remove(entry)
        self.held.append((model, tokens, size))
        while sum(entry[2] for entry in self.held) > self.budget:
            self.held.pop(0)

    @rule(model=models, tokens=texts, capacity=st.integers(0, 200))
    def take(self, model: str, tokens: list[int], capacity: int) -> None:
        cache = self.store.take(model, tokens, capacity=capacity)
        lengths = [(shared(entry[1], tokens), entry) for entry in self.held if entry[0] == model]
        longest = max((length for length, _ in lengths), default=0)
        if longest < PrefixCache.MIN_TOKENS:
            assert cache is None
            return
        assert cache is not None
        assert read(cache) == tokens[:longest]
        assert cache.length == longest
        assert cache.capacity >= capacity
        entry = next(entry for length, entry in lengths if length == longest)
        self.held.remove(entry)
        if longest < PrefixCache.HAND_OVER_SHARE * len(
            entry[1]
        ):  # copied: the entry stays, as the latest used
            self.held.append(entry)
        # Changes by the new owner do not affect the entries.
        junk = torch.full((1, 5, 1), 77.0)
        cache.rollback(longest // 2)
        cache.write(0, junk, -junk)

    @precondition(lambda self: self.held)
    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.held = []

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.store.num_bytes == sum(entry[2] for entry in self.held) <= self.budget
        assert len(self.store) == len(self.held)
        entries = [
            (key[0], entry.tokens.tolist(), read(entry.kv)) for key, entry in self.store._entries.items()
        ]
        assert entries == [(model, tokens, tokens) for model, tokens, _ in self.held]


def test_a_cache_behaves_as_a_list_of_tokens() -> None:
    run_state_machine_as_test(CacheMachine, settings=SETTINGS)


def test_the_prefix_cache_keeps_its_budget_and_returns_correct_prefixes() -> None:
    run_state_machine_as_test(StoreMachine, settings=SETTINGS)


@SETTINGS
@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_length_matches_a_plain_loop(left: list[int], right: list[int]) -> None:
    as_array = [np.asarray(side, dtype=np.int64) for side in (left, right)]
    assert common_prefix_length(*as_array) == shared(left, right)
