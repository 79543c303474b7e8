"""Replayed passes give the same logits and caches as ordinary passes; a replacement records them on a CPU."""

import gc
import random
import re

import pytest
import torch
from helpers.tiny_models import VOCAB, run_all, tiny_model

from rapid_integrations.config import EngineLimits, SamplingParams, SpeculationParams
from rapid_integrations.engine.attention import cuda as cuda_kernels
from rapid_integrations.engine.cache.prefix_cache import PrefixCache
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model import cuda_graphs
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.model.cuda_graphs import MAX_SEQUENCES, NEW_TOKENS, GraphedPasses
from rapid_integrations.engine.requests import Request
from rapid_integrations.errors import ConfigurationError, UnsupportedModelError

MAX_NEW_TOKENS = NEW_TOKENS[-1]

recording = pytest.mark.usefixtures("flash_kernel")


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(count)]


class Twins:
    """A cache for graphs, and one with the same tokens for ordinary passes."""

    def __init__(self, model: CausalModel, tokens: list[int]) -> None:
        self.model = model
        self.graphed, self.plain = SequenceKV(len(tokens) + 8), SequenceKV(len(tokens) + 8)
        for cache in (self.graphed, self.plain):
            model.forward([Step(cache, tokens, 0)])

    def fork(self, length: int) -> "Twins":
        fork = object.__new__(Twins)
        fork.model = self.model
        fork.graphed, fork.plain = self.graphed.fork(length, length + 8), self.plain.copy_prefix(length, 8)
        return fork

    def rollback(self, tokens: int) -> None:
        for cache in (self.graphed, self.plain):
            cache.rollback(cache.length - tokens)


def agree(model: CausalModel, passes: GraphedPasses, pairs: list[Twins], counts, wanted, rng) -> None:
    """Read new tokens by graphs and by ordinary passes, and compare logits and caches."""
    new = [words(rng, count) for count in counts]
    steps = [
        [Step(cache, tokens, n) for cache, tokens, n in zip(caches, new, wanted, strict=True)]
        for caches in ([pair.graphed for pair in pairs], [pair.plain for pair in pairs])
    ]
    found, expected = model.forward(steps[0], passes), model.forward(steps[1])
    # In 16 bits, partial results are rounded more often.
    allowed = 1e-4 if model.kv_dtype is None else 0.02
    torch.testing.assert_close(found, expected, rtol=allowed, atol=allowed * float(expected.std()))
    for pair in pairs:
        assert pair.graphed.length == pair.plain.length
        for (_, *held), (_, *other) in zip(pair.graphed.layers(), pair.plain.layers(), strict=True):
            for graphed, plain in zip(held, other, strict=True):
                torch.testing.assert_close(graphed, plain, rtol=allowed, atol=allowed)


@recording
@pytest.mark.parametrize("change", [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}])
def test_any_number_of_heads_may_share_keys(change) -> None:
    model = CausalModel(tiny_model("llama", **change))
    passes = GraphedPasses(model, 1024)
    rng = random.Random(7)
    pairs = [Twins(model, words(rng, length)) for length in (5, 90, 200)]
    for counts in ([1, 1, 1], [1, 4, 2], [1, 1, 1], [3, 1, 8]):
        agree(model, passes, pairs, counts, [1, 1, 1], rng)


@recording
@pytest.mark.parametrize("kv_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_replayed_passes_of_any_sequences_match_ordinary_passes(architecture, kv_dtype, monkeypatch) -> None:
    monkeypatch.setattr(SequenceKV, "FORK_TOKENS", 4)
    monkeypatch.setattr(SequenceKV, "MIN_FORK_TOKENS", 8)
    model = CausalModel(tiny_model(architecture), kv_dtype=kv_dtype)
    passes = GraphedPasses(model, 2048)
    rng = random.Random(architecture)
    document = Twins(model, words(rng, 90))
    pairs = [document, document.fork(90), document.fork(41), Twins(model, words(rng, 3))]
    for turn in range(40):
        together = rng.sample(pairs, rng.randint(1, len(pairs)))
        counts = [rng.choice([1, 1, 1, 2, 3, 5, 16]) for _ in together]
        wanted = [rng.randint(1, count) for count in counts]
        agree(model, passes, together, counts, wanted, rng)
        for pair, count in zip(together, counts, strict=True):
            if pair is not document:
                pair.rollback(rng.randint(0, count))
        if turn == 20:  # one sequence ends, another begins
            pairs[-1] = Twins(model, words(rng, 60))
            gc.collect()


@recording
def test_a_sequence_keeps_its_row_until_it_ends_moves_out_or_outgrows_it() -> None:
    model = CausalModel(tiny_model("llama"))
    passes = GraphedPasses(model, 1100)
    rng = random.Random(2)
    assert passes._free_rows() == set(range(MAX_SEQUENCES)), "the check leaves its rows"
    pairs = [Twins(model, words(rng, 20)) for _ in range(MAX_SEQUENCES)]
    late = Twins(model, words(rng, 1000))

    def supported() -> bool:
        return passes.supports([Step(late.graphed, [5])])

    for _ in range(2):
        for pair in pairs:
            assert supported() == bool(passes._free_rows())
            agree(model, passes, [pair], [1], [1], rng)
    assert not supported()
    assert not passes.supports([Step(pairs[0].graphed, [5]), Step(late.graphed, [5])])
    agree(model, passes, [pairs[0], late], [1, 2], [1, 1], rng)
    assert late.graphed.owns_buffers
    pairs[3].graphed.move_to_own_buffers()
    assert passes._free_rows() == {3}
    agree(model, passes, [late, pairs[0]], [1, 2], [1, 2], rng)
    assert not late.graphed.owns_buffers
    del pairs[6]
    gc.collect()
    assert passes._free_rows() == {6}
    agree(model, passes, pairs, [1] * len(pairs), [1] * len(pairs), rng)
    assert passes._free_rows() == set()
    # 1003 tokens. It fills its row of 1024 tokens and then outgrows it.
    for count in (16, 5):
        agree(model, passes, [late], [count], [1], rng)
    assert not supported()
    agree(model, passes, [late], [1], [1], rng)
    assert late.graphed.owns_buffers
    assert len(passes._free_rows()) == 1


@recording
def test_unsupported_passes_are_not_replayed() -> None:
    model = CausalModel(tiny_model("llama"))
    passes = GraphedPasses(model, 1030)
    rng = random.Random(3)
    pairs = [Twins(model, words(rng, 10)) for _ in range(MAX_SEQUENCES + 1)]
    steps = [Step(pair.graphed, [4]) for pair in pairs]
    assert passes.supports(steps[:-1])
    assert not passes.supports(steps)
    assert not passes.supports([])
    assert passes.supports([Step(pairs[0].graphed, [4] * MAX_NEW_TOKENS)])
    assert not passes.supports([Step(pairs[0].graphed, [4] * (MAX_NEW_TOKENS + 1))])
    assert not passes.supports([Step(SequenceKV(8), [4])])
    assert not passes.supports([Step(pairs[0].graphed, [4], 0)])
    agree(model, passes, pairs, [1] * len(pairs), [1] * len(pairs), rng)
    agree(model, passes, pairs[:1], [MAX_NEW_TOKENS + 4], [3], rng)
    # The padding of a pass needs room too.
    edge = Twins(model, words(rng, 1020))
    assert passes.supports([Step(edge.graphed, [4] * 4)])
    assert not passes.supports([Step(edge.graphed, [4] * 5)])
    agree(model, passes, [edge], [3], [3], rng)
    agree(model, passes, [edge], [3], [3], rng)


@recording
def test_all_graphs_are_recorded_at_the_start(monkeypatch) -> None:
    model = CausalModel(tiny_model("llama"))
    recorded: list[int] = []
    record = cuda_graphs._Recorder.__call__
    monkeypatch.setattr(cuda_graphs._Recorder, "__call__", lambda *args: recorded.append(1) or record(*args))
    passes = GraphedPasses(model, 1024)
    assert len(recorded) == MAX_SEQUENCES * len(NEW_TOKENS)
    rng = random.Random(4)
    pairs = [Twins(model, words(rng, 10)) for _ in range(2)]
    for counts in ([1], [3], [4], [16], [1, 1], [1, 2], [5, 2]):
        agree(model, passes, pairs[: len(counts)], counts, [1] * len(counts), rng)
    assert len(recorded) == MAX_SEQUENCES * len(NEW_TOKENS)


@recording
def test_caches_in_the_prefix_cache_own_their_buffers() -> None:
    model = CausalModel(tiny_model("llama"))
    passes = GraphedPasses(model, 1024)
    rng = random.Random(5)
    tokens = words(rng, 40)
    cache = SequenceKV(48)
    model.forward([Step(cache, tokens[:39], 0)])
    model.forward([Step(cache, tokens[39:])], passes)
    assert passes._row(cache) == 0
    held = [(keys.clone(), values.clone()) for _, keys, values in cache.layers()]
    assert cache.num_bytes > 1000 * cache.prefix_bytes / 48
    store = PrefixCache(10**9)
    store.put(model, tokens, cache)
    assert store.num_bytes < 2 * cache.prefix_bytes
    # Another sequence overwrites its row.
    assert passes._free_rows() == set(range(MAX_SEQUENCES))
    successor = Twins(model, words(rng, 60))
    agree(model, passes, [successor], [1], [1], rng)
    assert passes._row(successor.graphed) == 0
    taken = store.take(model, tokens, capacity=64)
    assert taken is cache
    for (_, keys, values), (before, other) in zip(taken.layers(), held, strict=True):
        assert torch.equal(keys, before[:, : taken.length])
        assert torch.equal(values, other[:, : taken.length])


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("self_drafting", [True, False])
def test_an_engine_gives_the_same_answers_with_graphs(greedy, self_drafting, replayed) -> None:
    """Drafts, lookups, rollbacks and the prefix cache, with requests that start and end."""
    target = CausalModel(tiny_model("llama"))
    drafter = target if self_drafting else CausalModel(tiny_model("llama", seed=1))
    rng = random.Random(6)
    document = words(rng, 60)
    requests = [
        Request(
            [*document, *words(rng, 5)],
            [*document[20:50], *words(rng, 5)],
            SamplingParams(temperature=0.0 if greedy else 0.8, seed=number, max_new_tokens=5 + 7 * number),
            SpeculationParams(num_draft_tokens=4, transfer_strength=2.0),
        )
        for number in range(5)
    ]
    answers = []
    for tokens in (0, 1024):
        engine = Engine(target, drafter, limits=EngineLimits(cuda_graph_tokens=tokens, max_active_requests=3))
        replayed.clear()  # the passes of the check
        try:
            answers.append(
                [tokens for tokens, _ in run_all(engine, requests) + run_all(engine, requests[:2])]
            )
        finally:
            engine.close()
    assert answers[0] == answers[1]
    assert len(replayed) > 20
    assert max(replayed) == 3


def test_graphs_require_a_device() -> None:
    model = CausalModel(tiny_model("llama"))
    with pytest.raises(ConfigurationError, match=re.escape("has torch.float32 on cpu. Leave it at 0")):
        Engine(model, model, limits=EngineLimits(cuda_graph_tokens=4096))
    # Without a drafter there are no graphs.
    Engine(model, None, limits=EngineLimits(cuda_graph_tokens=4096)).close()


def test_graphs_require_the_lean_decoder() -> None:
    model = CausalModel(tiny_model("gemma3"))
    with pytest.raises(ConfigurationError, match="run by its modelling code"):
        GraphedPasses(model, 4096)


@recording
def test_a_graph_with_other_results_is_rejected(monkeypatch) -> None:
    model = CausalModel(tiny_model("llama"))
    attend = cuda_kernels.attention_in_rows
    monkeypatch.setattr(
        cuda_kernels, "attention_in_rows", lambda *args, **kwargs: attend(*args, **kwargs) * 1.5
    )
    with pytest.raises(UnsupportedModelError, match="computes other logits than the model"):
        GraphedPasses(model, 1024)


@recording
def test_a_graph_that_repeats_its_first_output_is_rejected(monkeypatch) -> None:
    """As an empty graph does, which was recorded on another device."""
    model = CausalModel(tiny_model("llama"))

    def repeats(self, run):
        output = run()
        return lambda: output

    monkeypatch.setattr(cuda_graphs._Recorder, "__call__", repeats)
    with pytest.raises(UnsupportedModelError, match="computes other logits than the model"):
        GraphedPasses(model, 1024)


@recording
def test_graphs_that_do_not_fit_into_memory_are_rejected(monkeypatch) -> None:
    model = CausalModel(tiny_model("llama"))

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_graphs._Recorder, "__call__", out_of_memory)
    with pytest.raises(ConfigurationError, match="cuda_graph_tokens=1024 does not fit into the device's mem"):
        Engine(model, model, limits=EngineLimits(cuda_graph_tokens=1024))


@recording
def test_a_pass_that_cannot_be_recorded_is_rejected(monkeypatch) -> None:
    model = CausalModel(tiny_model("llama"))

    def older(*args, scale=None, window_size_left=None, window_size_right=None):  # without pages
        return attend(
            *args, scale=scale, window_size_left=window_size_left, window_size_right=window_size_right
        )

    attend = cuda_kernels._flash_attention
    monkeypatch.setattr(cuda_kernels, "_flash_attention", older)
    with pytest.raises(UnsupportedModelError, match=r"cannot be recorded as a CUDA graph.*try torch 2\.13"):
        GraphedPasses(model, 1024)


@pytest.mark.parametrize("tokens", [-1, 1, 1023, 2048.0, True])
def test_the_number_of_tokens_is_validated(tokens) -> None:
    with pytest.raises(ConfigurationError, match="0 or an integer >= 1024"):
        EngineLimits(cuda_graph_tokens=tokens)


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("window", [None, 300, 9999])
def test_the_arguments_and_shapes_match_torchs_operator(new, window) -> None:
    """Needs no device: torch checks arguments and shapes on meta tensors, but not the limits of kernels."""
    keys, values = torch.empty(2, 3, 2, 1024, 64, dtype=torch.bfloat16, device="meta")
    query = torch.empty(2 * new, 8, 64, dtype=torch.bfloat16, device="meta").transpose(0, 1)
    rows, lengths, starts = (torch.empty(*s, dtype=torch.int32, device="meta") for s in ((2, 1), (2,), (3,)))
    output = cuda_kernels.attention_in_rows(
        query, keys, values, rows, lengths, 0.1, starts=starts, window=window
    )
    assert (output.shape, output.dtype) == (query.shape, query.dtype)
