"""Lossless greedy output is transformers' own ``generate()``, token for token."""

import random

import pytest
from tiny_models import ARCHITECTURES, VOCAB, reference_generate, run_all, tiny_model

from rapid_integrations.config import EngineLimits, SamplingParams, SpeculationParams
from rapid_integrations.engine.model import CausalModel
from rapid_integrations.engine.scheduler import Engine, Request

NEW_TOKENS = 20
DRAFTERS = ("self", "smaller", "larger")
DRAFT_LENGTHS = (None, 0, 1, 2, 3, 5, 8, 12)


def drafter_for(kind: str, architecture: str) -> CausalModel | None:
    layers = {"smaller": 1, "larger": 8}
    if kind == "self":
        return None
    return CausalModel(tiny_model(architecture, seed=1, num_hidden_layers=layers[kind]))


@pytest.mark.parametrize("drafter_kind", DRAFTERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lossless_greedy_equals_generate(architecture: str, drafter_kind: str) -> None:
    rng = random.Random(f"{architecture} {drafter_kind}")
    reference_model = tiny_model(architecture)
    target = CausalModel(tiny_model(architecture))
    drafter = drafter_for(drafter_kind, architecture) or target
    engine = Engine(target, drafter, limits=EngineLimits(prefill_chunk_tokens=37))
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 150))] for _ in range(8)]
    expected = [reference_generate(reference_model, prompt, NEW_TOKENS) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(expected), "the references must be distinct"
    cases = 0
    try:
        for draft_length in DRAFT_LENGTHS:
            # Ragged batches of different sizes; the drafter reads another part of the prompt than the target.
            batch_size = rng.randint(1, len(prompts))
            chosen = rng.sample(range(len(prompts)), batch_size)
            requests = [
                Request(
                    prompts[index],
                    prompts[index][-rng.randint(1, 40) :],
                    SamplingParams(max_new_tokens=NEW_TOKENS),
                    SpeculationParams(acceptance="lossless", num_draft_tokens=draft_length),
                )
                for index in chosen
            ]
            for index, (tokens, finished) in zip(chosen, run_all(engine, requests), strict=True):
                assert tokens == expected[index], (draft_length, batch_size)
                assert finished.stats.completion_tokens in (len(tokens), len(tokens) + 1)
                cases += 1
    finally:
        engine.close()
    assert cases >= len(DRAFT_LENGTHS)


def test_self_speculation_on_the_same_context_accepts_everything() -> None:
    target = CausalModel(tiny_model("llama"))
    engine = Engine(target, target)
    prompt = list(range(3, 60))
    speculation = SpeculationParams(acceptance="lossless", num_draft_tokens=5)
    ((_, finished),) = run_all(
        engine, [Request(prompt, prompt, SamplingParams(max_new_tokens=30, ignore_eos=True), speculation)]
    )
    engine.close()
    assert finished.stats.acceptance_rate == 1.0
    assert finished.stats.rounds == 5
    assert finished.stats.drafted_tokens == 25
