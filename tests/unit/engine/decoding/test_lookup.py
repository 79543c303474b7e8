"""N-grams of what the drafter reads as guesses at what it drafts."""

from collections.abc import Sequence

import pytest
import torch
from helpers.table_models import TableModel, decode_all, decoding, random_table

from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.decoding.lookup import NGramLookup
from rapid_integrations.engine.decoding.round import SpeculativeDecoder
from rapid_integrations.engine.stats import RapidStats


@pytest.mark.parametrize(
    ("tokens", "draft", "most", "guess"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [], 2, [3, 4]),
        ([1, 2, 3, 4, 5, 1, 2], [], 9, [3, 4, 5, 1, 2]),
        ([1, 2, 3, 4, 5, 9, 1], [2], 1, [3]),  # the ending reaches into the draft
        ([7, 1, 2, 3, 8, 2, 9, 1], [2], 1, [3]),  # two tokens of context rather than the last place of one
        ([2, 5, 2, 6, 2], [], 1, [6]),  # the last place
        ([1, 2, 3], [], 4, []),
        ([1, 2, 1], [], 0, []),
        ([4], [4, 4], 3, []),  # a draft is no evidence
    ],
)
def test_what_followed_the_ending_is_the_guess(tokens, draft, most, guess) -> None:
    assert NGramLookup(tokens).guess(draft, most) == guess


def test_a_sequence_that_grows_is_followed() -> None:
    tokens = [1, 2, 3]
    lookup = NGramLookup(tokens)
    assert lookup.guess([], 3) == []
    tokens += [1, 2]
    assert lookup.guess([], 3) == [3, 1, 2]
    tokens += [9, 1, 2]
    assert lookup.guess([], 1) == [9]


def test_guesses_shrink_to_what_was_right_and_grow_again() -> None:
    lookup = NGramLookup([1, *range(2, 100), 1])
    first = len(lookup.guess([], 99))
    lookup.observe(first, 3)
    assert len(lookup.guess([], 99)) == 4
    lookup.observe(4, 4)
    assert len(lookup.guess([], 99)) == 8
    lookup.observe(8, 0)
    assert 1 <= len(lookup.guess([], 99)) < 4


VOCAB = 6


def chain(seed: int) -> torch.Tensor:
    """Scores of a drafter that walks through the vocabulary and seldom strays."""
    table = random_table(VOCAB, seed=seed, scale=0.5)
    for last in range(VOCAB):
        table[:, last, (last + 1) % VOCAB] += 5
    return table


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_save_passes_and_change_no_token(temperature, monkeypatch) -> None:
    def decode() -> tuple[list[list[int]], int, int]:
        target, drafter = TableModel(chain(1)), TableModel(chain(2))
        sequences = [
            decoding(
                [1],
                list(range(VOCAB)) * 3,
                SamplingParams(temperature=temperature, seed=seed, max_new_tokens=60),
                SpeculationParams("augmented", transfer_strength=2.0, num_draft_tokens=10),
            )
            for seed in range(3)
        ]
        outputs = decode_all(SpeculativeDecoder(target, drafter), sequences)  # type: ignore[arg-type]
        passes = sum(sequence.stats.drafter_passes for sequence in sequences)
        assert passes == sum(len(lengths) for lengths in drafter.passes)
        return outputs, passes, sum(sequence.stats.drafted_tokens for sequence in sequences)

    outputs, passes, drafted = decode()
    assert passes < 0.6 * drafted
    monkeypatch.setattr(NGramLookup, "guess", lambda self, draft, most: [])
    without, passes_without, drafted_without = decode()
    assert (outputs, drafted) == (without, drafted_without)
    assert passes_without >= drafted_without


class Grammar:
    """2 does not follow 1, and nothing but 4 follows 3. Refuses to be asked behind what it does not allow."""

    def __init__(self, eos: int) -> None:
        self.eos = eos

    def allowed(self, tokens: Sequence[int], count: int) -> torch.Tensor:
        for end, token in enumerate(tokens):
            assert self._row(tokens[:end])[token]
            assert self.eos not in tokens[:end]
        return torch.stack([self._row(tokens[: len(tokens) - back]) for back in reversed(range(count))])

    def _row(self, tokens: Sequence[int]) -> torch.Tensor:
        row = torch.ones(VOCAB, dtype=torch.bool)
        if tokens and tokens[-1] == 1:
            row[2] = False
        if tokens and tokens[-1] == 3:
            row[:] = torch.arange(VOCAB) == 4
        return row


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_guesses_under_a_constraint_save_passes_and_leave_every_draft_as_it_is(
    seed: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    eos = 0

    def decode() -> tuple[list[list[int]], list[RapidStats]]:
        sequences = [
            decoding(
                [1],
                list(range(VOCAB)) * 3,
                SamplingParams(temperature=temperature, seed=10 * seed + number, max_new_tokens=40),
                SpeculationParams("augmented", transfer_strength=2.0, num_draft_tokens=4 + number),
                eos=[eos],
            )
            for number in range(6)
        ]
        for sequence in sequences[1:]:  # the first is free company
            sequence.constraint = Grammar(eos)
        # Chains that seldom reach the end of sequence, and go on to 3 where 2 must not be.
        tables = [chain(2 * seed + model) for model in range(2)]
        for table in tables:
            table[:, 5, eos] -= 6
            table[:, 5, 1] += 5
            table[:, 1, 3] += 4
        decoder = SpeculativeDecoder(*(TableModel(table) for table in tables))  # type: ignore[arg-type]
        return decode_all(decoder, sequences), [sequence.stats for sequence in sequences]

    def drafts(stats: Sequence[RapidStats]) -> list[tuple[str, int, int]]:
        return [(one.token_sources, one.drafted_tokens, one.forced_tokens) for one in stats]

    outputs, stats = decode()
    monkeypatch.setattr(NGramLookup, "guess", lambda self, draft, most: [])
    without, stats_without = decode()
    assert (outputs, drafts(stats)) == (without, drafts(stats_without))
    assert sum(one.forced_tokens for one in stats) > 20
    passes, passes_without = (sum(one.drafter_passes for one in some[1:]) for some in (stats, stats_without))
    assert passes < 0.9 * passes_without
