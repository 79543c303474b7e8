"""On an NVIDIA device: kernels match torch's own attention, and graphs match ordinary passes."""

import random

import pytest
import torch
from helpers.packed_reference import found_and_expected
from helpers.tiny_models import VOCAB, run_all, tiny_model

from rapid_integrations.config import EngineLimits, SamplingParams, SpeculationParams
from rapid_integrations.engine.attention import cuda as cuda_kernels
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.model.cuda_graphs import GraphedPasses
from rapid_integrations.engine.requests import Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
ROUNDING = 0.02


def normal(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to("cuda", torch.bfloat16)


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(count)]


@pytest.mark.parametrize("new", [1, 2, 11, 700])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("past", [0, 30, 5000])
@pytest.mark.parametrize("window", [None, 20, 1000])
def test_new_tokens_after_a_past_match_sdpa(new, groups, past, window) -> None:
    total, kv_heads = past + new, 2
    keys, values, query = normal(kv_heads, total, 64), normal(kv_heads, total, 64), normal(8, new, 64)
    query = query[: kv_heads * groups]
    assert cuda_kernels.supports(query, keys, values)
    found, _ = found_and_expected(query, keys, values, scaling=0.1, window=window)
    # In float32 torch's own kernels are used.
    _, expected = found_and_expected(
        *(tensor.float() for tensor in (query, keys, values)), scaling=0.1, window=window
    )
    torch.testing.assert_close(found.float(), expected, rtol=ROUNDING, atol=ROUNDING)


def test_forks_give_the_same_logits_as_copies(monkeypatch) -> None:
    monkeypatch.setattr(SequenceKV, "FORK_TOKENS", 4)
    monkeypatch.setattr(SequenceKV, "MIN_FORK_TOKENS", 8)
    model = CausalModel(tiny_model("llama").to("cuda", torch.bfloat16))
    rng = random.Random(1)
    base = SequenceKV(100)
    model.forward([Step(base, words(rng, 90), 0)])
    forks, copies = ([make(length, 120) for length in (90, 90, 41)] for make in (base.fork, base.copy_prefix))
    for counts in ((1, 1, 1), (5, 1, 12)):
        new = [words(rng, count) for count in counts]
        shared, alone = (
            model.forward([Step(c, tokens, len(tokens)) for c, tokens in zip(caches, new, strict=True)])
            for caches in (forks, copies)
        )
        torch.testing.assert_close(shared, alone, rtol=0, atol=0.1 * float(alone.std()))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_graphs_match_ordinary_passes(architecture) -> None:
    model = CausalModel(tiny_model(architecture).to("cuda", torch.bfloat16))
    assert model.lean
    graphs = GraphedPasses(model, 2048)
    rng = random.Random(architecture)
    pairs = []
    for length in (5, 90, 1000):
        tokens = words(rng, length)
        pairs.append((SequenceKV(length + 60), SequenceKV(length + 60)))
        for cache in pairs[-1]:
            model.forward([Step(cache, tokens, 0)])
    for turn in range(30):
        together = rng.sample(pairs, rng.randint(1, 3))
        new = [words(rng, rng.choice([1, 1, 2, 3, 8])) for _ in together]
        steps, plain = (
            [Step(pair[which], tokens, len(tokens)) for pair, tokens in zip(together, new, strict=True)]
            for which in (0, 1)
        )
        assert graphs.supports(steps)
        found, expected = model.forward(steps, graphs), model.forward(plain)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * float(expected.std()))
        for pair, tokens in zip(together, new, strict=True):
            for cache in pair:
                cache.rollback(cache.length - turn % len(tokens) - turn % 2)


def test_an_engine_uses_graphs() -> None:
    model = CausalModel(tiny_model("llama").to("cuda", torch.bfloat16))
    rng = random.Random(6)
    document = words(rng, 60)
    requests = [
        Request(
            [*document, *words(rng, 5)],
            [*document[20:50], *words(rng, 5)],
            SamplingParams(max_new_tokens=40, ignore_eos=True),
            SpeculationParams(num_draft_tokens=4),
        )
        for _ in range(5)
    ]
    engine = Engine(model, model, limits=EngineLimits(cuda_graph_tokens=1024))
    try:
        answers = run_all(engine, requests)
    finally:
        engine.close()
    assert [len(tokens) for tokens, _ in answers] == [40] * 5
    assert sum(finished.stats.drafted_tokens for _, finished in answers) > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device only")
def test_a_drafter_may_be_on_another_device() -> None:
    target = CausalModel(tiny_model("llama").to("cuda:0", torch.bfloat16))
    drafter = CausalModel(tiny_model("llama", seed=1).to("cuda:1", torch.bfloat16))
    prompt = words(random.Random(7), 40)
    request = Request(prompt, prompt[20:], SamplingParams(max_new_tokens=30, ignore_eos=True))
    engine = Engine(target, drafter, limits=EngineLimits(cuda_graph_tokens=1024))
    try:
        ((tokens, _),) = run_all(engine, [request])
    finally:
        engine.close()
    assert len(tokens) == 30
