"""The question agreement: how far the drafter's context covers the question, as the engine measures it."""

from collections.abc import Sequence

import pytest
import torch
from helpers.tiny_models import VOCAB, reference_generate, run, run_all, tiny_model

from rapid_integrations.config import EngineLimits, SamplingParams, SpeculationParams
from rapid_integrations.engine.decoding.draft_length import DraftLength
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.requests import Request

GENERATOR = torch.Generator().manual_seed(5)
DOCUMENT = torch.randint(3, VOCAB, (150,), generator=GENERATOR).tolist()
EXCERPT = DOCUMENT[30:70]
QUESTIONS = [torch.randint(3, VOCAB, (9,), generator=GENERATOR).tolist() for _ in range(3)]
# Wide weights make these models confident: questions that surprise only the drafter are rare.
SOFT = {"initializer_range": 0.06}


@pytest.fixture(scope="module")
def models():
    return tiny_model("llama", 0, **SOFT), tiny_model("llama", 1, **SOFT)


def request(question: Sequence[int], **speculation) -> Request:
    sampling = SamplingParams(max_new_tokens=10)
    return Request(
        DOCUMENT + list(question), EXCERPT + list(question), sampling, SpeculationParams(**speculation)
    )


def expected(models, question: Sequence[int]) -> float:
    """The formula on the models' own forward passes."""
    found = []
    for model, context in zip(models, (DOCUMENT, EXCERPT), strict=True):
        tokens = torch.tensor([context + list(question)])
        with torch.inference_mode():
            probs = model(input_ids=tokens, use_cache=False).logits[0].softmax(-1)
        # The token before the question's first token differs.
        places = range(len(context) + 1, tokens.shape[1])
        found.append([probs[place - 1, tokens[0, place]].item() for place in places])
    return 1 - max([0.0, *(p - q for p, q in zip(*found, strict=True))])


def engine_of(models, **limits) -> Engine:
    return Engine(*(CausalModel(model) for model in models), limits=EngineLimits(**limits))


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 2048])
def test_it_does_not_depend_on_how_prompts_are_read(models, chunk) -> None:
    engine = engine_of(models, prefill_chunk_tokens=chunk)
    for question in [*QUESTIONS, QUESTIONS[0]]:  # the last prompt is known to the end
        _, stats = run(engine, request(question))
        assert stats.question_agreement == pytest.approx(expected(models, question), abs=1e-5)
    assert stats.reused_prefix_tokens == len(DOCUMENT) + len(QUESTIONS[0]) - 1, "it is remembered"
    engine.close()


class Failing(CausalModel):
    """Fails once after a pass that returned logits, as if memory ran out there."""

    failed = False

    def forward(self, steps):
        logits = super().forward(steps)
        if not self.failed and steps[0].num_logits > 1 and steps[0].cache.length > 40:
            self.failed = True
            raise torch.OutOfMemoryError("no memory")
        return logits


@pytest.mark.parametrize("chunk", [4, 2048])
@pytest.mark.parametrize("which", [0, 1])
def test_a_pass_that_is_tried_again_is_noted_once(models, chunk, which) -> None:
    made = [(Failing if place == which else CausalModel)(model) for place, model in enumerate(models)]
    engine = Engine(*made, limits=EngineLimits(prefill_chunk_tokens=chunk))
    tokens, stats = run(engine, request(QUESTIONS[0]))
    assert made[which].failed
    assert stats.question_agreement == pytest.approx(expected(models, QUESTIONS[0]), abs=1e-5)
    other = engine_of(models)
    assert tokens == run(other, request(QUESTIONS[0]))[0]
    for each in (engine, other):
        each.close()


@pytest.mark.parametrize(
    "speculation",
    [
        {"acceptance": "lossless"},
        {"adaptive_transfer": False},
        {"transfer_strength": 0},
        {"acceptance": "mixture"},
    ],
)
def test_it_is_measured_where_strength_or_draft_length_depend_on_it(models, speculation) -> None:
    engine = engine_of(models)
    for fixed in (True, False):
        asked = request(QUESTIONS[0], **speculation, num_draft_tokens=3 if fixed else None)
        run(engine, asked)
        _, stats = run(engine, asked)
        if fixed:
            assert stats.question_agreement is None
            assert stats.reused_prefix_tokens == len(DOCUMENT) + len(QUESTIONS[0]) - 1
        else:
            assert stats.question_agreement == pytest.approx(expected(models, QUESTIONS[0]), abs=1e-5)
    engine.close()


def test_acceptance_is_learnt_apart_where_the_drafter_does_not_cover_the_question(
    models, monkeypatch
) -> None:
    learnt = []

    class Recorded(DraftLength):
        def __init__(self, fixed, max_tokens, costs, acceptance) -> None:
            learnt.append(acceptance)
            super().__init__(fixed, max_tokens, costs, acceptance)

    monkeypatch.setattr("rapid_integrations.engine.scheduler.DraftLength", Recorded)
    engine = engine_of(models)
    for place, grounds in enumerate((1.0, 0.1, 0.9, 0.0)):
        monkeypatch.setattr(
            "rapid_integrations.engine.agreement.question_agreement", lambda *probs, g=grounds: g
        )
        run(engine, request([*QUESTIONS[0], place]))
    assert learnt[0] is learnt[2]
    assert learnt[1] is learnt[3]
    assert learnt[0] is not learnt[1]
    engine.close()


def test_prompts_of_one_pass_have_their_own_agreements(models) -> None:
    engine = engine_of(models)
    wanted = [expected(models, question) for question in QUESTIONS]
    assert len({round(value, 4) for value in wanted}) == 3
    answers = run_all(engine, [request(question) for question in QUESTIONS])
    assert [finished.stats.question_agreement for _, finished in answers] == pytest.approx(wanted, abs=1e-5)
    engine.close()


def test_only_the_last_tokens_of_a_long_ending_count(models) -> None:
    question = torch.randint(3, VOCAB, (100,), generator=torch.Generator().manual_seed(6)).tolist()
    engine = engine_of(models)
    # A fixed draft length without transfer measures no agreement.
    run(engine, request(question, acceptance="lossless", num_draft_tokens=2))
    _, again = run(engine, request(question))
    engine.close()
    other = engine_of(models)
    _, stats = run(other, request(question))
    other.close()
    # The prompts are known: 64 tokens of the ending are read anew, and the one before the first of them.
    assert again.reused_prefix_tokens == len(DOCUMENT) + 100 - 64 - 1
    assert again.question_agreement == pytest.approx(stats.question_agreement, abs=1e-5)


@pytest.mark.parametrize(
    ("excerpt", "wanted"),
    [
        (DOCUMENT + QUESTIONS[0], 1.0),  # it reads all that the target reads
        (EXCERPT, 1.0),  # nothing in common at the end: nothing is known against it
        (None, None),
    ],
)
def test_prompts_without_a_shared_ending(models, excerpt, wanted) -> None:
    engine = engine_of(models)
    sampling = SamplingParams(max_new_tokens=4)
    _, stats = run(engine, Request(DOCUMENT + QUESTIONS[0], excerpt, sampling))
    assert stats.question_agreement == wanted
    engine.close()


def test_a_drafter_that_does_not_cover_the_question_cannot_steer(models, monkeypatch) -> None:
    monkeypatch.setattr("rapid_integrations.engine.agreement.question_agreement", lambda *probs: 0.0)
    engine = engine_of(models)
    steered = []
    for question in QUESTIONS:
        tokens, stats = run(engine, request(question, transfer_strength=50.0))
        assert stats.question_agreement == 0
        assert tokens == reference_generate(tiny_model("llama", 0, **SOFT), DOCUMENT + question, 10)
        monkeypatch.undo()
        steered.append(run(engine, request(question, transfer_strength=50.0, adaptive_transfer=False))[0])
        monkeypatch.setattr("rapid_integrations.engine.agreement.question_agreement", lambda *probs: 0.0)
        assert steered[-1] != tokens
    engine.close()
