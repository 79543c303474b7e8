"""A self-drafter's passages are found in the target's prompt, and their keys and values are copied."""

import hypothesis.strategies as st
import pytest
import torch
from helpers.tiny_models import run, tiny_model
from hypothesis import given

from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.cache.selection import Selection, copy_selection, find_selection
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.requests import Request

SCAFFOLD, QUESTION = [1, 250, 251, 252], [240, 241, 242, 243, 244]
generator = torch.Generator().manual_seed(1)
DOCUMENT = torch.randint(3, 230, (700,), generator=generator).tolist()
TARGET = [*SCAFFOLD, *DOCUMENT, *QUESTION]
SEPARATOR = [235]


def drafter_prompt(*spans: tuple[int, int]) -> list[int]:
    """A prompt with parts of the document, separated by a token that is not in it."""
    parts: list[int] = []
    for start, stop in spans:
        parts += [*(SEPARATOR if parts else []), *DOCUMENT[start:stop]]
    return [*SCAFFOLD, *parts, *QUESTION]


def selected(prompt: list[int], target: list[int] = TARGET) -> Selection:
    selection = find_selection(target, prompt)
    assert selection is not None
    return selection


def in_document(start: int, stop: int) -> range:
    return range(len(SCAFFOLD) + start, len(SCAFFOLD) + stop)


def test_passages_are_found_where_they_stand_and_separators_are_left_out() -> None:
    selection = selected(drafter_prompt((40, 120), (300, 364)))
    assert selection.runs == (range(len(SCAFFOLD)), in_document(40, 120), in_document(300, 364))
    assert selection.num_last == len(QUESTION)
    assert selection.num_copied == len(SCAFFOLD) + 80 + 64
    expected = [*SCAFFOLD, *DOCUMENT[40:120], *DOCUMENT[300:364], *QUESTION]
    assert selection.tokens(TARGET) == expected


def test_passages_in_another_order_keep_their_order() -> None:
    selection = selected(drafter_prompt((300, 364), (40, 120)))
    assert selection.runs[1:] == (in_document(300, 364), in_document(40, 120))


def test_words_that_are_tokenized_differently_at_a_border_are_left_out() -> None:
    prompt = [*SCAFFOLD, 231, *DOCUMENT[41:119], 232, *QUESTION]
    assert selected(prompt).runs[1:] == (in_document(41, 119),)


def test_of_two_equal_passages_the_one_after_the_last_passage_is_taken() -> None:
    repeated = [*SCAFFOLD, *DOCUMENT[:50], *DOCUMENT[:400], *QUESTION]
    prompt = [*SCAFFOLD, *DOCUMENT[30:50], *DOCUMENT[:20], *DOCUMENT[200:260], *QUESTION]
    runs = selected(prompt, repeated).runs
    assert runs[1] == in_document(30, 70), "the text goes on in the next copy"
    assert runs[2] == in_document(250, 310)


def test_a_prompt_without_passages_copies_the_instructions_only() -> None:
    assert selected([*SCAFFOLD, *QUESTION]).runs == (range(len(SCAFFOLD)),)


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param([*SCAFFOLD, *range(3, 103), *QUESTION], id="passages that the target does not read"),
        pytest.param([249, *DOCUMENT[40:120], *QUESTION], id="other instructions"),
        pytest.param([*SCAFFOLD, *DOCUMENT[40:120], 245], id="another question"),
        pytest.param([*SCAFFOLD, *DOCUMENT[40:120], 239, 244], id="only the very last token in common"),
        pytest.param([1], id="a single token"),
    ],
)
def test_other_prompts_are_read(prompt: list[int]) -> None:
    assert find_selection(TARGET, prompt) is None


def test_a_long_question_is_copied_but_for_its_last_tokens() -> None:
    question = torch.randint(3, 230, (200,), generator=torch.Generator().manual_seed(7)).tolist()
    target = [*SCAFFOLD, *DOCUMENT, *question]
    selection = selected([*SCAFFOLD, *DOCUMENT[40:120], *question], target)
    assert selection.num_last == 65
    assert selection.tokens(target) == [*SCAFFOLD, *DOCUMENT[40:120], *question]


token_lists = st.lists(st.integers(0, 5), min_size=1, max_size=60)


@given(token_lists, token_lists)
def test_a_selection_always_stands_in_the_target_and_ends_with_its_question(
    target: list[int], drafter: list[int]
) -> None:
    selection = find_selection(target, drafter)
    if selection is None:
        return
    tokens = selection.tokens(target)
    assert len(tokens) == selection.num_copied + selection.num_last <= len(drafter)
    assert all(run.stop <= len(target) - selection.num_last for run in selection.runs)
    assert selection.num_last >= 2
    assert tokens[-selection.num_last :] == drafter[-selection.num_last :]
    # The tokens are the drafter's own, in order; some are left out.
    remaining = iter(drafter)
    assert all(token in remaining for token in tokens)


MODELS = {
    "llama": tiny_model("llama", num_hidden_layers=1),
    "qwen2": tiny_model("qwen2", num_hidden_layers=1),
    "qwen3": tiny_model("qwen3", num_hidden_layers=1),
    "yarn": tiny_model(
        "llama",
        num_hidden_layers=1,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 512,
        },
    ),
    "llama3": tiny_model(
        "llama",
        num_hidden_layers=1,
        rope_parameters={
            "rope_type": "llama3",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def one_layer(request: pytest.FixtureRequest) -> CausalModel:
    """A model of one layer: its keys and values depend on nothing but tokens and positions."""
    model = CausalModel(MODELS[request.param])
    assert model.lean
    return model


@torch.inference_mode()
def cache_of(model: CausalModel, tokens: list[int]) -> SequenceKV:
    cache = SequenceKV(len(tokens))
    model.forward([Step(cache, tokens, 0)])
    return cache


@pytest.mark.parametrize("forked", [False, True])
def test_copied_keys_are_those_of_the_tokens_at_their_new_positions(
    one_layer: CausalModel, forked: bool
) -> None:
    source = cache_of(one_layer, TARGET)
    if forked:
        source = source.fork(len(TARGET), len(TARGET) + 10)
        assert source.base is not None
    selection = selected(drafter_prompt((40, 120), (300, 364), (560, 700)))
    copy = copy_selection(source, selection, one_layer.inverse_frequencies, capacity=500)
    read = cache_of(one_layer, selection.tokens(TARGET)[: selection.num_copied])
    assert copy.length == read.length == selection.num_copied
    assert copy.capacity >= 500
    for (_, *copied), (_, *expected) in zip(copy.layers(), read.layers(), strict=True):
        torch.testing.assert_close(copied, expected, atol=2e-5, rtol=1e-4)


def test_with_one_layer_a_copying_drafter_is_a_reading_one(one_layer: CausalModel) -> None:
    """The answers under a rule that the drafter steers equal those with a second object of the same model."""
    drafter_tokens = drafter_prompt((40, 120), (300, 364))
    tokens = selected(drafter_tokens).tokens(TARGET)
    answers = []
    for drafter, prompt in (
        (one_layer, drafter_tokens),
        (CausalModel(one_layer.model, name="a second object"), tokens),
    ):
        engine = Engine(one_layer, drafter)
        request = Request(
            TARGET,
            prompt,
            SamplingParams(max_new_tokens=24, ignore_eos=True),
            SpeculationParams(num_draft_tokens=4, transfer_strength=8.0),
        )
        answer, stats = run(engine, request)
        answers.append(answer)
        copied = stats.reused_drafter_prefix_tokens
        assert copied == (len(tokens) - len(QUESTION) if drafter is one_layer else 0)
        assert stats.drafter_prompt_tokens == len(tokens)
        engine.close()
    assert answers[0] == answers[1]


def test_a_passage_at_the_end_of_the_document_is_copied_up_to_the_question() -> None:
    """Without the separator before the question, the drafter's prompt has more of its end in common."""
    model = CausalModel(tiny_model("llama"))
    engine = Engine(model, model)
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    _, stats = run(engine, Request(TARGET, [*SCAFFOLD, *DOCUMENT[600:], *SEPARATOR, *QUESTION], sampling))
    engine.close()
    assert stats.reused_drafter_prefix_tokens == len(SCAFFOLD) + 100
    assert stats.question_agreement is not None


def test_a_copied_cache_is_not_kept_for_other_requests() -> None:
    """The same tokens, read as a prompt of their own, are computed anew: the copy knows the document."""
    model = CausalModel(tiny_model("llama"))
    drafter_tokens = drafter_prompt((40, 120), (300, 364))
    tokens = selected(drafter_tokens).tokens(TARGET)
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
    plain = SpeculationParams(num_draft_tokens=0)
    fresh = Engine(model, model)
    expected, _ = run(fresh, Request(tokens, None, sampling, plain))
    fresh.close()
    engine = Engine(model, model)
    run(engine, Request(TARGET, drafter_tokens, sampling, SpeculationParams(num_draft_tokens=3)))
    answer, stats = run(engine, Request(tokens, None, sampling, plain))
    engine.close()
    assert answer == expected
    assert stats.reused_prefix_tokens == 0
