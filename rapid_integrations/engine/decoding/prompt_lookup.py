"""Drafts without a drafter: tokens that followed the same words earlier in the prompt or in the answer.

Answers repeat their document. Where the last tokens of the answer stand elsewhere, the tokens after that
place are a draft that costs nothing but its verification (A. Saxena, "Prompt Lookup Decoding", 2023). The
target verifies it like any other draft, so a wrong one costs time only.

The longer the text that both places have in common, the more likely it goes on the same way. That probability
is learnt for each length. A draft is as long as gives the most expected tokens per second
(:func:`best_length`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# The probabilities assumed before any observation, for 1, 2, … equal tokens; the last one is for all longer
# texts. They count as so many observations.
_ASSUMED = (0.1, 0.3, 0.45, 0.55, 0.65, 0.7, 0.75, 0.8)
_ASSUMED_WEIGHT = 4.0
# Some 200 tokens are remembered.
_DECAY = 0.995


class RepetitionRates:
    """The probability that a text goes on as before, by the number of equal tokens, learnt by an engine."""

    def __init__(self) -> None:
        self._seen = [0.0] * len(_ASSUMED)
        self._repeated = [0.0] * len(_ASSUMED)

    def observe(self, num_equal: int, repeated: bool) -> None:
        """Add one token.

        Args:
            num_equal: The tokens before it that were equal in both places, at least one.
            repeated: Whether it was equal too.
        """
        index = min(num_equal, len(_ASSUMED)) - 1
        self._seen[index] = self._seen[index] * _DECAY + 1
        self._repeated[index] = self._repeated[index] * _DECAY + repeated

    def probability(self, num_equal: int) -> float:
        """The probability that the token after so many equal tokens is equal too."""
        index = min(num_equal, len(_ASSUMED)) - 1
        repeated = self._repeated[index] + _ASSUMED_WEIGHT * _ASSUMED[index]
        return repeated / (self._seen[index] + _ASSUMED_WEIGHT)


@dataclass(frozen=True, slots=True)
class Repetition:
    """Tokens that followed an earlier occurrence of the last tokens.

    Attributes:
        tokens: The tokens after that place, at least one.
        num_equal: The number of equal tokens before both places, at least one; longer texts count as 8.
    """

    tokens: list[int]
    num_equal: int


class PromptLookup:
    """Finds where the last tokens of a text occurred before.

    Args:
        tokens: The prompt and the answer so far. Between calls it may only grow at its end.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._array = np.asarray(tokens, dtype=np.int64)
        self._size = len(tokens)

    def find(self, max_tokens: int, stop_tokens: frozenset[int] = frozenset()) -> Repetition | None:
        """The latest of the places with the longest text in common with the end.

        Args:
            max_tokens: Upper limit on the tokens that are returned.
            stop_tokens: The repetition ends before these.
        """
        self._update()
        text = self._array[: self._size]
        # Places of tokens that follow an occurrence of the last token.
        places = np.flatnonzero(text[:-1] == text[-1]) + 1
        if max_tokens < 1 or not places.size:
            return None
        num_equal = 1
        while num_equal < len(_ASSUMED):
            earlier = places[places > num_equal]
            earlier = earlier[text[earlier - num_equal - 1] == text[-num_equal - 1]]
            if not earlier.size:
                break
            places, num_equal = earlier, num_equal + 1
        start = int(places[-1])
        tokens: list[int] = text[start : start + max_tokens].tolist()
        end = next((place for place, token in enumerate(tokens) if token in stop_tokens), len(tokens))
        return Repetition(tokens[:end], num_equal) if end else None

    def _update(self) -> None:
        size = len(self._tokens)
        if size > self._array.size:
            grown = np.empty(size + 256, dtype=np.int64)
            grown[: self._size] = self._array[: self._size]
            self._array = grown
        self._array[self._size : size] = self._tokens[self._size :]
        self._size = size


def best_length(
    repetition: Repetition,
    rates: RepetitionRates,
    seconds_of: Callable[[int], float],
    *,
    min_tokens_per_s: float,
) -> int:
    """How many of a repetition's tokens to draft.

    Args:
        repetition: The tokens.
        rates: Their probabilities.
        seconds_of: The time of a round that verifies so many draft tokens; 0 of them in a plain pass.
        min_tokens_per_s: What the round must be better than.

    Returns:
        The length with the most expected tokens per second; 0 if none is better than a plain pass and than
        ``min_tokens_per_s``.
    """
    best, highest = 0, max(min_tokens_per_s, 1 / seconds_of(0))
    expected = all_accepted = 1.0
    for length in range(1, len(repetition.tokens) + 1):
        all_accepted *= rates.probability(repetition.num_equal + length - 1)
        expected += all_accepted
        if (rate := expected / seconds_of(length)) > highest:
            best, highest = length, rate
    return best
