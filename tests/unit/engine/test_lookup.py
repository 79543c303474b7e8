"""N-grams of what the drafter reads as guesses at what it drafts."""

import pytest
import torch
from table_models import TableModel, decode_all, decoding, random_table

from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.lookup import NGramLookup
from rapid_integrations.engine.speculation import SpeculativeDecoder


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
