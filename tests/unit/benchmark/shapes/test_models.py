"""Models with random weights that answer from a script."""

import json

import pytest
import torch
from helpers.tiny_models import VOCAB, run, tiny_model

from rapid_integrations.benchmark.bound import conditional_acceptance
from rapid_integrations.benchmark.shapes.models import (
    Script,
    ScriptedModel,
    dummy_model,
    load_shape,
    random_prompt,
    random_script,
)
from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.requests import Request
from rapid_integrations.errors import ConfigurationError


def scripted(acceptance: float, *, prompt_tokens: int, seed: int = 0) -> ScriptedModel:
    model = ScriptedModel(tiny_model("llama", seed), name="tiny")
    model.script = Script(random_script(VOCAB, 40, 0), prompt_tokens, acceptance)
    return model


def answer(target, drafter, num_draft_tokens):
    request = Request(
        random_prompt(VOCAB, 50, "a"),
        random_prompt(VOCAB, 20, "b"),
        SamplingParams(max_new_tokens=600, ignore_eos=True),
        SpeculationParams(acceptance="lossless", num_draft_tokens=num_draft_tokens),
    )
    engine = Engine(target, drafter)
    try:
        return run(engine, request)
    finally:
        engine.close()


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("num_draft_tokens", [3, 6])
def test_the_answer_is_the_script_and_the_acceptance_is_as_set(acceptance, num_draft_tokens):
    target = scripted(1.0, prompt_tokens=50)
    tokens, stats = answer(target, scripted(acceptance, prompt_tokens=20, seed=1), num_draft_tokens)
    script = random_script(VOCAB, 40, 0)
    assert tokens == script * 15
    alpha = conditional_acceptance(stats.accepted_tokens / stats.rounds, stats.drafted_tokens / stats.rounds)
    # Some hundred independent draws; the last draft may be shorter.
    assert alpha == pytest.approx(acceptance, abs=0.08)
    assert stats.drafter_passes > 0


def test_target_and_drafter_may_share_weights():
    model = tiny_model("llama")
    target, drafter = (ScriptedModel(model, name="tiny") for _ in range(2))
    script = random_script(VOCAB, 40, 0)
    target.script, drafter.script = Script(script, 50), Script(script, 20, 0.5)
    tokens, stats = answer(target, drafter, 4)
    assert tokens == script * 15
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


def test_without_a_script_the_logits_are_the_model_s_own():
    model = tiny_model("llama")
    logits = [
        made.forward([Step(SequenceKV(16), [5, 6, 7], 2)])
        for made in (ScriptedModel(model, name="tiny"), CausalModel(model))
    ]
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama-3.1-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400)]
)
def test_named_shapes_have_the_published_number_of_parameters(name, parameters):
    model = dummy_model(load_shape(name), dtype=torch.bfloat16, device=torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.config.max_position_embeddings == 131_072


def test_a_model_that_is_not_causal_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigurationError, match="'vit' is not a causal language model"):
        dummy_model(load_shape(str(tmp_path)), dtype=torch.float32, device=torch.device("cpu"))
