"""Guessing a draft from the text that the drafter reads, before the drafter is asked.

Answers repeat what was retrieved. Where the last few tokens stood before, what followed them there is a guess
at the drafter's next tokens that costs nothing (A. Saxena, "Prompt Lookup Decoding", 2023). The drafter reads
the guess in one pass and keeps to its own choices: a right guess saves passes, a wrong one changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

# Lengths of the endings that are looked up, the longest that is found counting.
_SIZES = (3, 2, 1)
# The longest guess at first, and the shortest that the limit falls to: reading a wrong one takes time.
_FIRST_LIMIT = 8
_LEAST_LIMIT = 2


class NGramLookup:
    """Finds what followed the last tokens of a sequence where they last stood.

    A guess is no longer than about what was right of the one before: twice as long if all of it was.

    Args:
        tokens: The sequence, which may grow between calls, at its end only.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        # By n-gram: the position behind its last place.
        self._behind: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self._limit = _FIRST_LIMIT

    def guess(self, draft_tokens: Sequence[int], most: int) -> list[int]:
        """What may follow the sequence and a draft behind it.

        Args:
            draft_tokens: The draft.
            most: How many tokens are of use.

        Returns:
            At most ``most`` tokens; none where the ending was not seen before.
        """
        self._index()
        longest = _SIZES[0]
        ending = (*self._tokens[-longest:], *draft_tokens[-longest:])[-longest:]
        for size in _SIZES:
            start = self._behind.get(ending[-size:])
            if start is not None and len(ending) >= size:
                return list(self._tokens[start : start + min(most, self._limit)])
        return []

    def observe(self, guessed: int, right: int) -> None:
        """Learn how many leading tokens of a guess, of at least one, were the drafter's choices."""
        self._limit = max(self._limit, 2 * guessed) if right == guessed else max(right + 1, _LEAST_LIMIT)

    def _index(self) -> None:
        for end in range(max(self._indexed, 1), len(self._tokens)):
            for size in _SIZES:
                if size <= end:
                    self._behind[tuple(self._tokens[end - size : end])] = end
        self._indexed = len(self._tokens)
