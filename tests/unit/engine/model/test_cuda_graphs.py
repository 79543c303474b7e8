"""Passes that are replayed compute what passes do, wherever caches lie; a stand-in records them here."""

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
from rapid_integrations.engine.model import cuda_graphs as graphs
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.model.cuda_graphs import MAX_NEW_TOKENS, MAX_SEQUENCES, GraphedPasses
from rapid_integrations.engine.requests import Request
from rapid_integrations.errors import ConfigurationError, UnsupportedModelError

recording = pytest.mark.usefixtures("flash_kernel")


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(count)]


class Twins:
    """A cache that graphs work on, and one of the same tokens that they never see."""

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
    """Read new tokens both ways."""
    new = [words(rng, count) for count in counts]
    steps = [
        [Step(cache, tokens, n) for cache, tokens, n in zip(caches, new, wanted, strict=True)]
        for caches in ([pair.graphed for pair in pairs], [pair.plain for pair in pairs])
    ]
    found, expected = model.forward(steps[0], passes), model.forward(steps[1])
    # In 16 bits parts that are merged are rounded more often.
    allowed = 1e-4 if model.kv_dtype is None else 0.02
    torch.testing.assert_close(found, expected, rtol=allowed, atol=allowed * float(expected.std()))
    for pair in pairs:
        assert pair.graphed.length == pair.plain.length
        for (_, *held), (_, *other) in zip(pair.graphed.layers(), pair.plain.layers(), strict=True):
            for one, another in zip(held, other, strict=True):
                torch.testing.assert_close(one, another, rtol=allowed, atol=allowed)


@recording
@pytest.mark.parametrize("change", [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}])
def test_heads_share_keys_or_do_not(change) -> None:
    model = CausalModel(tiny_model("llama", **change))
    passes = GraphedPasses(model, 1024)
    rng = random.Random(7)
    pairs = [Twins(model, words(rng, length)) for length in (5, 90, 200)]
    for counts in ([1, 1, 1], [1, 4, 2], [1, 1, 1], [3, 1, 8]):
        agree(model, passes, pairs, counts, [1, 1, 1], rng)


@recording
@pytest.mark.parametrize("kv_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_passes_of_any_company_compute_what_they_do_unrecorded(architecture, kv_dtype, monkeypatch) -> None:
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
        if turn == 20:  # one leaves, another comes
            pairs[-1] = Twins(model, words(rng, 60))
            gc.collect()


@recording
def test_rows_grow_are_left_and_are_taken_from_who_was_not_drafted_for(monkeypatch) -> None:
    model = CausalModel(tiny_model("llama"))
    passes = GraphedPasses(model, 2048)
    rng = random.Random(2)
    one = Twins(model, words(rng, 20))

    def rows() -> tuple[int, int]:
        assert passes._rows is not None
        return len(passes._rows), passes._rows.tokens

    agree(model, passes, [one], [1], [1], rng)
    assert rows() == (1, 1024)
    assert one.graphed.lies_in(passes._rows._rows[0])
    others = [Twins(model, words(rng, 20)) for _ in range(MAX_SEQUENCES + 2)]
    agree(model, passes, [one, *others[:2]], [1, 2, 1], [1, 1, 1], rng)
    assert rows() == (4, 1024)
    # Longer than a row: it grows; longer than the limit: it is not replayed.
    long = Twins(model, words(rng, 1023))
    agree(model, passes, [long], [2], [2], rng)
    assert rows() == (4, 2048)
    for count in (1000, 23, 1):
        agree(model, passes, [long], [count], [1], rng)
    assert long.graphed.length == 2049
    assert not passes.takes([Step(long.graphed, [5])])
    # One by one they take each other's places.
    for pair in others:
        agree(model, passes, [pair], [1], [1], rng)
    assert rows() == (4, 2048)
    assert sum(any(pair.graphed.lies_in(row) for row in passes._rows._rows) for pair in others) == 4
    agree(model, passes, others[:MAX_SEQUENCES], [1] * MAX_SEQUENCES, [1] * MAX_SEQUENCES, rng)
    assert rows() == (8, 2048)
    for _ in range(3):
        agree(model, passes, rng.sample([one, *others], 5), [1] * 5, [1] * 5, rng)


@recording
def test_what_is_not_replayed_is_read_as_ever() -> None:
    model = CausalModel(tiny_model("llama"))
    passes = GraphedPasses(model, 1030)
    rng = random.Random(3)
    pairs = [Twins(model, words(rng, 10)) for _ in range(MAX_SEQUENCES + 1)]
    steps = [Step(pair.graphed, [4]) for pair in pairs]
    assert passes.takes(steps[:-1])
    assert not passes.takes(steps)
    assert not passes.takes([])
    assert passes.takes([Step(pairs[0].graphed, [4] * MAX_NEW_TOKENS)])
    assert not passes.takes([Step(pairs[0].graphed, [4] * (MAX_NEW_TOKENS + 1))])
    assert not passes.takes([Step(SequenceKV(8), [4])])
    assert not passes.takes([Step(pairs[0].graphed, [4], 0)])
    agree(model, passes, pairs, [1] * len(pairs), [1] * len(pairs), rng)
    agree(model, passes, pairs[:1], [MAX_NEW_TOKENS + 4], [3], rng)
    # Tokens that fill up a pass need room too.
    edge = Twins(model, words(rng, 1020))
    assert passes.takes([Step(edge.graphed, [4] * 4)])
    assert not passes.takes([Step(edge.graphed, [4] * 5)])
    agree(model, passes, [edge], [3], [3], rng)
    agree(model, passes, [edge], [3], [3], rng)


@recording
def test_each_shape_is_recorded_once(monkeypatch) -> None:
    model = CausalModel(tiny_model("llama"))
    passes = GraphedPasses(model, 1024)
    recorded: list[int] = []
    record = graphs._Recorder.__call__
    monkeypatch.setattr(graphs._Recorder, "__call__", lambda *given: recorded.append(1) or record(*given))
    rng = random.Random(4)
    pairs = [Twins(model, words(rng, 10)) for _ in range(2)]
    for counts in ([1], [3], [4], [1], [2], [2], [3]):
        agree(model, passes, pairs[:1], counts, [1], rng)
    assert len(recorded) == 3
    # Another row is needed: all is recorded anew, where it is met again.
    for counts in ([1, 1], [1, 2], [2, 2], [1, 1]):
        agree(model, passes, pairs, counts, [1, 1], rng)
    assert len(recorded) == 5
    agree(model, passes, pairs[:1], [2], [1], rng)
    assert len(recorded) == 6


@recording
def test_the_store_is_given_buffers_of_their_own() -> None:
    model = CausalModel(tiny_model("llama"))
    passes = GraphedPasses(model, 1024)
    rng = random.Random(5)
    tokens = words(rng, 40)
    cache = SequenceKV(48)
    model.forward([Step(cache, tokens[:39], 0)])
    model.forward([Step(cache, tokens[39:])], passes)
    held = [(keys.clone(), values.clone()) for _, keys, values in cache.layers()]
    assert cache.num_bytes > 1000 * cache.prefix_bytes / 48
    store = PrefixCache(10**9)
    store.put(model, tokens, cache)
    assert store.num_bytes < 2 * cache.prefix_bytes
    # Its row is another's now.
    agree(model, passes, [Twins(model, words(rng, 60))], [1], [1], rng)
    assert passes._rows is not None
    assert len(passes._rows) == 1
    taken = store.take(model, tokens, capacity=64)
    assert taken is cache
    for (_, keys, values), (before, other) in zip(taken.layers(), held, strict=True):
        assert torch.equal(keys, before[:, : taken.length])
        assert torch.equal(values, other[:, : taken.length])


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_an_engine_answers_as_without_graphs(greedy, own, replayed) -> None:
    """Drafts, guesses, rollbacks and the store, with requests that come and go."""
    target = CausalModel(tiny_model("llama"))
    drafter = target if own else CausalModel(tiny_model("llama", seed=1))
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
        try:
            answers.append(
                [tokens for tokens, _ in run_all(engine, requests) + run_all(engine, requests[:2])]
            )
        finally:
            engine.close()
    assert answers[0] == answers[1]
    assert len(replayed) > 20
    assert max(replayed) == 3


def test_without_a_device_there_are_no_graphs() -> None:
    model = CausalModel(tiny_model("llama"))
    with pytest.raises(ConfigurationError, match=re.escape("has torch.float32 on cpu. Leave it at 0")):
        Engine(model, model, limits=EngineLimits(cuda_graph_tokens=4096))
    # Plain decoding drafts nothing.
    Engine(model, None, limits=EngineLimits(cuda_graph_tokens=4096)).close()


def test_a_model_that_is_run_by_its_modelling_code_has_no_graphs() -> None:
    model = CausalModel(tiny_model("gemma3"))
    with pytest.raises(ConfigurationError, match="run by its modelling code"):
        GraphedPasses(model, 4096)


@recording
def test_a_graph_that_computes_something_else_is_refused(monkeypatch) -> None:
    model = CausalModel(tiny_model("llama"))
    attend = cuda_kernels.attention_in_rows
    monkeypatch.setattr(
        cuda_kernels, "attention_in_rows", lambda *args, **kwargs: attend(*args, **kwargs) * 1.5
    )
    with pytest.raises(UnsupportedModelError, match="computes other logits than the model"):
        GraphedPasses(model, 1024)


@recording
def test_a_graph_that_repeats_what_it_was_recorded_with_is_refused(monkeypatch) -> None:
    """As one that was recorded on another device, and is empty."""
    model = CausalModel(tiny_model("llama"))

    def repeats(self, run):
        output = run()
        return lambda: output

    monkeypatch.setattr(graphs._Recorder, "__call__", repeats)
    with pytest.raises(UnsupportedModelError, match="computes other logits than the model"):
        GraphedPasses(model, 1024)


@recording
def test_where_memory_runs_out_passes_go_on_unrecorded(monkeypatch, caplog) -> None:
    model = CausalModel(tiny_model("llama"))
    engine = Engine(model, model, limits=EngineLimits(cuda_graph_tokens=1024))
    full = torch.OutOfMemoryError("CUDA out of memory")

    def fails(*_):
        raise full

    monkeypatch.setattr(graphs._Recorder, "__call__", fails)
    request = Request(
        list(range(3, 40)), list(range(20, 40)), SamplingParams(max_new_tokens=20, ignore_eos=True)
    )
    try:
        ((tokens, finished),) = run_all(engine, [request])
    finally:
        engine.close()
    assert len(tokens) == 20
    assert finished.stats.drafted_tokens > 0
    assert [record.levelname for record in caplog.records if "memory ran out" in record.message] == [
        "WARNING"
    ]


@recording
def test_a_pass_that_cannot_be_recorded_is_refused(monkeypatch) -> None:
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
def test_tokens_must_be_a_number_of_them(tokens) -> None:
    with pytest.raises(ConfigurationError, match="0 or an integer >= 1024"):
        EngineLimits(cuda_graph_tokens=tokens)


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("window", [None, 300, 9999])
def test_torchs_function_takes_the_arguments_and_gives_the_shapes(new, window) -> None:
    """Without a device: torch knows its operators' arguments and shapes, not what kernels refuse."""
    keys, values = torch.empty(2, 3, 2, 1024, 64, dtype=torch.bfloat16, device="meta")
    query = torch.empty(2 * new, 8, 64, dtype=torch.bfloat16, device="meta").transpose(0, 1)
    rows, lengths, starts = (torch.empty(*s, dtype=torch.int32, device="meta") for s in ((2, 1), (2,), (3,)))
    output = cuda_kernels.attention_in_rows(
        query, keys, values, rows, lengths, 0.1, starts=starts, window=window
    )
    assert (output.shape, output.dtype) == (query.shape, query.dtype)
