"""Lossless greedy output is transformers' own ``generate()``, token for token.

A case is one answer of one request in a ragged batch. ``RAPID_LOSSLESS_CASES`` sets how many run in all,
150 unless set, spread evenly over architectures and drafters; about twenty share a pair of random models::

    RAPID_LOSSLESS_CASES=1500 pytest tests/integration/test_lossless.py
"""

import itertools
import os
import random

import pytest
from helpers.tiny_models import ARCHITECTURES, VOCAB, reference_generate, run_all, tiny_model

from rapid_integrations.config import EngineLimits, SamplingParams, SpeculationParams
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.requests import Request

NEW_TOKENS = 20
DRAFTERS = {"self": None, "smaller": 1, "larger": 8}
DRAFT_LENGTHS = (None, *range(13))
PROMPTS = 8
BATCHES_PER_MODEL = 5
CASES = int(os.environ.get("RAPID_LOSSLESS_CASES", "150"))


@pytest.mark.parametrize("drafter_kind", DRAFTERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lossless_greedy_equals_generate(architecture: str, drafter_kind: str) -> None:
    rng = random.Random(f"{architecture} {drafter_kind}")
    wanted = -(-CASES // (len(ARCHITECTURES) * len(DRAFTERS)))
    # All draft lengths in turn, with another start for each pair of models.
    draft_lengths = itertools.islice(itertools.cycle(DRAFT_LENGTHS), rng.randrange(len(DRAFT_LENGTHS)), None)
    cases = 0
    for seed in itertools.count():
        if cases >= wanted:
            break
        cases += compare(architecture, DRAFTERS[drafter_kind], seed, draft_lengths, rng, wanted - cases)
    assert cases >= wanted > 0


def compare(architecture, drafter_layers, seed, draft_lengths, rng, wanted) -> int:
    """Run a few batches on one pair of random models; returns the number of compared answers."""
    reference_model = tiny_model(architecture, seed)
    target = CausalModel(tiny_model(architecture, seed))
    drafter = target
    if drafter_layers is not None:
        drafter = CausalModel(tiny_model(architecture, seed + 1000, num_hidden_layers=drafter_layers))
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 150))] for _ in range(PROMPTS)]
    expected = [reference_generate(reference_model, prompt, NEW_TOKENS) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) > PROMPTS / 2, "the references must be distinct"
    engine = Engine(target, drafter, limits=EngineLimits(prefill_chunk_tokens=37))
    cases = 0
    try:
        for draft_length in itertools.islice(draft_lengths, BATCHES_PER_MODEL):
            # Ragged batches of different sizes; the drafter gets only the end of the prompt.
            batch_size = rng.randint(1, PROMPTS)
            chosen = rng.sample(range(PROMPTS), batch_size)
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
                assert tokens == expected[index], (seed, draft_length, batch_size, len(prompts[index]))
                assert finished.stats.completion_tokens in (len(tokens), len(tokens) + 1)
                cases += 1
            if cases >= wanted:
                break
    finally:
        engine.close()
    return cases


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
