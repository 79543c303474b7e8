"""Drafts that are found in the prompt: where, how long, and without a trace in the answer."""

import hypothesis.strategies as st
import pytest
from helpers.table_models import TableModel, random_table
from helpers.tiny_models import run
from hypothesis import given

from rapid_integrations.config import Acceptance, SamplingParams, SpeculationParams
from rapid_integrations.engine.decoding.prompt_lookup import (
    PromptLookup,
    Repetition,
    RepetitionRates,
    best_length,
)
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.requests import Request

LONGEST = 8
texts = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def equal_before(text: list[int], place: int) -> int:
    """The number of equal tokens before a place and at the end, at most 8."""
    count = 0
    while count < min(place, LONGEST) and text[place - 1 - count] == text[len(text) - 1 - count]:
        count += 1
    return count


@given(texts, st.integers(0, 10), st.integers(0, 30))
def test_the_latest_of_the_longest_matches_is_found_while_the_text_grows(
    text: list[int], max_tokens: int, added: int
) -> None:
    tokens = text[: max(1, len(text) - added)]
    lookup = PromptLookup(tokens)
    while True:
        matches = {place: equal_before(tokens, place) for place in range(1, len(tokens))}
        longest = max(matches.values(), default=0)
        found = lookup.find(max_tokens)
        if not longest or not max_tokens:
            assert found is None
        else:
            place = max(place for place, equal in matches.items() if equal == longest)
            assert found == Repetition(tokens[place : place + max_tokens], longest)
        if len(tokens) == len(text):
            break
        tokens.append(text[len(tokens)])


def test_a_repetition_ends_before_a_stop_token() -> None:
    lookup = PromptLookup([5, 1, 2, 9, 3, 5])
    assert lookup.find(5, frozenset([9])) == Repetition([1, 2], 1)
    assert PromptLookup([5, 9, 3, 5]).find(5, frozenset([9])) is None


def test_rates_follow_what_was_seen_for_each_length() -> None:
    rates = RepetitionRates()
    before = rates.probability(2)
    for _ in range(50):
        rates.observe(2, True)
        rates.observe(30, False)
    assert rates.probability(2) > max(before, 0.9)
    assert rates.probability(8) == rates.probability(9) < 0.1
    assert rates.probability(1) == RepetitionRates().probability(1)


@pytest.mark.parametrize(
    ("position_s", "rival", "expected"),
    [
        pytest.param(0.0, 0.0, 6, id="free positions: all of it"),
        pytest.param(2.0, 0.0, 0, id="positions that cost more than they give"),
        pytest.param(0.0, 100.0, 0, id="the drafter is faster"),
    ],
)
def test_a_draft_is_as_long_as_pays(position_s: float, rival: float, expected: int) -> None:
    found = Repetition([1, 2, 3, 4, 5, 6], 3)
    length = best_length(
        found, RepetitionRates(), lambda count: 1.0 + position_s * count, min_tokens_per_s=rival
    )
    assert length == expected


def test_a_dearer_position_gives_a_shorter_draft() -> None:
    found = Repetition(list(range(20)), 1)
    rates = RepetitionRates()
    lengths = [
        best_length(found, rates, lambda count, s=s: 1.0 + s * count, min_tokens_per_s=0.0)  # type: ignore[misc]
        for s in (0.0, 0.02, 0.08, 0.3)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 20 > lengths[-1] == 0


RULES: list[tuple[Acceptance, bool]] = [
    ("lossless", True),
    ("augmented", True),
    ("augmented", False),
    ("mixture", True),
]


@pytest.mark.parametrize(("acceptance", "adaptive"), RULES)
def test_looked_up_drafts_leave_no_trace_in_the_answer(acceptance: Acceptance, adaptive: bool) -> None:
    """The answers equal those with a fixed draft length, for which nothing is looked up."""
    looked_up = 0
    for seed in range(12):
        # Large logits: the target is often sure whatever the drafter says, and sometimes not.
        target = TableModel(random_table(8, seed) * 4)
        drafter = TableModel(random_table(8, seed) * 3 + random_table(8, seed + 100))
        prompt = [(seed + 3 * place * place) % 8 for place in range(40)]
        answers = []
        for length in (None, 0 if acceptance == "lossless" else 3):
            engine = Engine(target, drafter)  # type: ignore[arg-type]
            tokens, stats = run(
                engine,
                Request(
                    prompt,
                    prompt[10:],
                    SamplingParams(max_new_tokens=50),
                    SpeculationParams(
                        acceptance=acceptance,
                        adaptive_transfer=adaptive,
                        num_draft_tokens=length,
                        transfer_strength=2.0,
                        mixture_weight=0.8,
                    ),
                ),
            )
            engine.close()
            answers.append(tokens)
            if length is None:
                looked_up += stats.looked_up_tokens
                assert stats.accepted_tokens <= stats.drafted_tokens
            else:
                assert stats.looked_up_tokens == 0
        assert answers[0] == answers[1]
    assert looked_up > 20


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"acceptance": "paper"}, id="the published rule needs q everywhere"),
        pytest.param({"num_draft_tokens": 4}, id="a fixed length is the drafter's"),
    ],
)
def test_nothing_is_looked_up_where_it_must_not(changes: dict[str, object]) -> None:
    model = TableModel(random_table(4, 0) * 4)
    engine = Engine(model, model)  # type: ignore[arg-type]
    prompt = [0, 1, 2, 3] * 10
    _, stats = run(
        engine,
        Request(prompt, prompt[4:], SamplingParams(max_new_tokens=40), SpeculationParams(**changes)),  # type: ignore[arg-type]
    )
    engine.close()
    assert stats.looked_up_tokens == 0


def test_samples_are_not_looked_up() -> None:
    model = TableModel(random_table(4, 0))
    engine = Engine(model, model)  # type: ignore[arg-type]
    prompt = [0, 1, 2, 3] * 10
    sampling = SamplingParams(max_new_tokens=40, temperature=1.0, seed=1)
    _, stats = run(engine, Request(prompt, prompt[4:], sampling))
    engine.close()
    assert stats.looked_up_tokens == 0
