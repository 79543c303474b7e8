"""Replayed passes compute the same as other passes; kernels and recording are replaced by ones for a CPU."""

import gc
import random
import re
from collections.abc import Sequence

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
from rapid_integrations.engine.model.cuda_graphs import NEW_TOKENS, GraphedPasses
from rapid_integrations.engine.requests import Request
from rapid_integrations.errors import ConfigurationError, UnsupportedModelError

recording = pytest.mark.usefixtures("flash_kernel")
ROWS = 5


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch) -> None:
    """Fewer graphs than usual, which take less time to record."""
    monkeypatch.setattr(cuda_graphs, "MAX_SEQUENCES", ROWS)


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(count)]


class Twins:
    """Two caches with the same tokens, one of which takes part in replayed passes."""

    def __init__(self, model: CausalModel, tokens: list[int]) -> None:
        self.graphed, self.plain = SequenceKV(len(tokens) + 8), SequenceKV(len(tokens) + 8)
        for cache in (self.graphed, self.plain):
            model.forward([Step(cache, tokens, 0)])

    def fork(self, length: int) -> "Twins":
        fork = object.__new__(Twins)
        fork.graphed, fork.plain = self.graphed.fork(length, length + 8), self.plain.copy_prefix(length, 8)
        return fork

    def rollback(self, num_tokens: int) -> None:
        for cache in (self.graphed, self.plain):
            cache.rollback(cache.length - num_tokens)


def check(
    model: CausalModel,
    passes: GraphedPasses,
    twins: Sequence[Twins],
    counts: Sequence[int],
    rng: random.Random,
    *,
    replayed: bool = True,
) -> None:
    """Read new tokens into both caches and compare logits, keys and values."""
    new = [words(rng, count) for count in counts]
    wanted = [rng.randint(1, count) for count in counts]
    graphed, plain = (
        [Step(cache, tokens, n) for cache, tokens, n in zip(caches, new, wanted, strict=True)]
        for caches in ([pair.graphed for pair in twins], [pair.plain for pair in twins])
    )
    assert passes.supports(graphed) == replayed
    found, expected = model.forward(graphed, passes), model.forward(plain)
    # In 16 bits, parts that are merged are rounded more often.
    allowed = 1e-4 if model.kv_dtype is None else 0.02
    torch.testing.assert_close(found, expected, rtol=allowed, atol=allowed * float(expected.std()))
    for pair in twins:
        assert pair.graphed.length == pair.plain.length
        for (_, *left), (_, *right) in zip(pair.graphed.layers(), pair.plain.layers(), strict=True):
            for held, wanted_values in zip(left, right, strict=True):
                torch.testing.assert_close(held, wanted_values, rtol=allowed, atol=allowed)


@recording
@pytest.mark.parametrize(
    ("architecture", "kv_dtype", "change"),
    [
        ("llama", None, {"num_key_value_heads": 4}),
        ("llama", None, {"num_key_value_heads": 1}),
        *[(name, kv_dtype, {}) for name in ("llama", "qwen2", "qwen3", "mistral")
          for kv_dtype in (None, "bfloat16")],
    ],
)  # fmt: skip
def test_replayed_passes_compute_the_same(architecture, kv_dtype, change, monkeypatch) -> None:
    monkeypatch.setattr(SequenceKV, "FORK_TOKENS", 4)
    monkeypatch.setattr(SequenceKV, "MIN_FORK_TOKENS", 8)
    model = CausalModel(tiny_model(architecture, **change), kv_dtype=kv_dtype)
    passes = GraphedPasses(model, 1024)
    rng = random.Random(architecture)
    document = Twins(model, words(rng, 90))
    twins = [document, document.fork(90), document.fork(41), Twins(model, words(rng, 3))]
    for turn in range(40):
        together = rng.sample(twins, rng.randint(1, len(twins)))
        counts = [rng.choice([1, 1, 1, 2, 3, 5, 16]) for _ in together]
        check(model, passes, together, counts, rng)
        for pair, count in zip(together, counts, strict=True):
            if pair is not document:
                pair.rollback(rng.randint(0, count))
        if turn == 20:
            twins[-1] = Twins(model, words(rng, 60))
            gc.collect()


@recording
def test_a_sequence_without_a_free_row_is_not_replayed() -> None:
    model = CausalModel(tiny_model("llama"))
    passes = GraphedPasses(model, 1024)
    rng = random.Random(2)
    twins = [Twins(model, words(rng, 20)) for _ in range(ROWS + 1)]
    check(model, passes, twins[:2], [1, 2], rng)
    check(model, passes, twins[1:ROWS], [2] * (ROWS - 1), rng)
    check(model, passes, twins[1:], [1] * ROWS, rng, replayed=False)
    check(model, passes, twins[-1:], [3], rng, replayed=False)
    assert [pair.graphed.owns_buffers for pair in twins] == [False] * ROWS + [True]
    # A cache that is deleted frees its row.
    del twins[0]
    gc.collect()
    check(model, passes, twins, [1] * ROWS, rng)
    # So does one that outgrows its row.
    check(model, passes, twins[:1], [1020], rng, replayed=False)
    assert twins[0].graphed.owns_buffers
    check(model, passes, [Twins(model, words(rng, 5))], [1], rng)


@recording
def test_limits_of_replayed_passes() -> None:
    model = CausalModel(tiny_model("llama"))
    passes = GraphedPasses(model, 1030)
    rng = random.Random(3)
    twins = [Twins(model, words(rng, 10)) for _ in range(ROWS + 1)]
    cache = twins[0].graphed
    assert passes.supports([Step(pair.graphed, [4]) for pair in twins[:ROWS]])
    assert passes.supports([Step(cache, [4] * NEW_TOKENS[-1])])
    for steps in (
        [],
        [Step(pair.graphed, [4]) for pair in twins],
        [Step(cache, [4] * (NEW_TOKENS[-1] + 1))],
        [Step(SequenceKV(8), [4])],
        [Step(cache, [4], 0)],
    ):
        assert not passes.supports(steps)
    check(model, passes, twins, [1] * len(twins), rng, replayed=False)
    # Padding tokens need room, too: 1,030 is rounded down to 1,024.
    long = Twins(model, words(rng, 1020))
    assert not passes.supports([Step(long.graphed, [4] * 5)])
    check(model, passes, [long], [3], rng)
    check(model, passes, [long], [3], rng, replayed=False)


@recording
def test_the_prefix_cache_copies_tokens_out_of_a_row() -> None:
    model = CausalModel(tiny_model("llama"))
    passes = GraphedPasses(model, 1024)
    rng = random.Random(5)
    tokens = words(rng, 40)
    cache = SequenceKV(48)
    model.forward([Step(cache, tokens[:39], 0)])
    model.forward([Step(cache, tokens[39:])], passes)
    assert not cache.owns_buffers
    before = [(keys.clone(), values.clone()) for _, keys, values in cache.layers()]
    store = PrefixCache(10**9)
    store.put(model, tokens, cache)
    assert store.num_bytes < 2 * cache.prefix_bytes
    # Another sequence overwrites the row.
    check(model, passes, [Twins(model, words(rng, 60))], [1], rng)
    taken = store.take(model, tokens, capacity=64)
    assert taken is cache
    for (_, *held), expected in zip(taken.layers(), before, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(held, expected, strict=True))


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("self_drafting", [True, False])
def test_an_engine_gives_the_same_answers_with_graphs(greedy, self_drafting, replayed) -> None:
    """Drafts, guesses, rollbacks and the prefix cache, with requests that come and go."""
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
        replayed.clear()
        try:
            answers.append(
                [tokens for tokens, _ in run_all(engine, requests) + run_all(engine, requests[:2])]
            )
        finally:
            engine.close()
    assert answers[0] == answers[1]
    assert len(replayed) > 20
    assert max(replayed) == 3


# Refusals --------------------------------------------------------------------------------------------------


def test_without_a_device_there_are_no_graphs() -> None:
    model = CausalModel(tiny_model("llama"))
    with pytest.raises(ConfigurationError, match=re.escape("has torch.float32 on cpu. Leave it at 0")):
        Engine(model, model, limits=EngineLimits(cuda_graph_tokens=4096))
    # Plain decoding has no drafter, and needs no graphs.
    Engine(model, None, limits=EngineLimits(cuda_graph_tokens=4096)).close()


def test_a_model_that_is_run_by_its_modelling_code_has_no_graphs() -> None:
    with pytest.raises(ConfigurationError, match="run by its modelling code"):
        GraphedPasses(CausalModel(tiny_model("gemma3")), 4096)


@recording
@pytest.mark.parametrize("fault", ["wrong attention", "a replay without effect", "one wrong graph"])
def test_graphs_that_compute_other_logits_are_refused(fault, monkeypatch) -> None:
    record, attend = cuda_graphs._Recorder.__call__, cuda_kernels.attention_in_rows
    recorded: list[int] = []

    def repeating(self, run):
        output = run()
        return lambda: output

    def one_wrong(self, run):
        recorded.append(1)
        replay = record(self, run)
        return replay if len(recorded) != 7 else lambda: replay() * 1.5

    if fault == "wrong attention":
        monkeypatch.setattr(cuda_kernels, "attention_in_rows", lambda *a, **k: attend(*a, **k) * 1.5)
    else:
        wrong = repeating if fault == "a replay without effect" else one_wrong
        monkeypatch.setattr(cuda_graphs._Recorder, "__call__", wrong)
    with pytest.raises(UnsupportedModelError, match="computes other logits than the model"):
        GraphedPasses(CausalModel(tiny_model("llama")), 1024)


@recording
@pytest.mark.parametrize("fault", ["no pages", "no memory"])
def test_passes_that_cannot_be_recorded_are_refused(fault, monkeypatch) -> None:
    attend = cuda_kernels._flash_attention

    def without_pages(*args, scale=None, window_size_left=None, window_size_right=None):
        return attend(
            *args, scale=scale, window_size_left=window_size_left, window_size_right=window_size_right
        )

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if fault == "no pages":
        monkeypatch.setattr(cuda_kernels, "_flash_attention", without_pages)
    else:
        monkeypatch.setattr(cuda_graphs._Recorder, "__call__", out_of_memory)
    with pytest.raises(
        UnsupportedModelError, match=r"cannot be recorded as CUDA graphs.*lower it if memory is short.*2\.13"
    ):
        GraphedPasses(CausalModel(tiny_model("llama")), 1024)


@pytest.mark.parametrize("tokens", [-1, 1, 1023, 2048.0, True])
def test_cuda_graph_tokens_must_be_0_or_at_least_1024(tokens) -> None:
    with pytest.raises(ConfigurationError, match="0 or an integer >= 1024"):
        EngineLimits(cuda_graph_tokens=tokens)


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("window", [None, 300, 9999])
def test_torchs_operator_accepts_the_arguments_and_returns_the_shapes(new, window) -> None:
    """On the meta device, torch checks an operator's arguments and shapes, but not what kernels refuse."""
    keys, values = torch.empty(2, 3, 2, 1024, 64, dtype=torch.bfloat16, device="meta")
    query = torch.empty(2 * new, 8, 64, dtype=torch.bfloat16, device="meta").transpose(0, 1)
    rows, lengths, starts = (torch.empty(*s, dtype=torch.int32, device="meta") for s in ((2, 1), (2,), (3,)))
    output = cuda_kernels.attention_in_rows(
        query, keys, values, rows, lengths, 0.1, starts=starts, window=window
    )
    assert (output.shape, output.dtype) == (query.shape, query.dtype)
