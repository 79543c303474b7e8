"""A token constraint for tests: the answer is one of a few token sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class WordConstraint:
    """Allows the token sequences ``words``.

    Args:
        words: Complete answers, each with its end-of-sequence token. A word without it ends in a dead end.
        vocab: The size of the engine's vocabulary.
        eos: The end-of-sequence token.
    """

    def __init__(self, words: Sequence[Sequence[int]], vocab: int, eos: int) -> None:
        self.words = [tuple(word) for word in words]
        self.vocab = vocab
        self.eos = eos
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def allowed(self, tokens: Sequence[int], count: int) -> Tensor:
        prefixes = [tuple(tokens[: len(tokens) - i]) for i in reversed(range(count))]
        for prefix in prefixes:
            if prefix not in self._rows:
                self._rows[prefix] = self._row(prefix)
        return torch.stack([self._rows[prefix] for prefix in prefixes])

    def _row(self, tokens: tuple[int, ...]) -> Tensor:
        if tokens and tokens[-1] == self.eos:
            return torch.ones(self.vocab, dtype=torch.bool)
        row = torch.zeros(self.vocab, dtype=torch.bool)
        for word in self.words:
            if word[: len(tokens)] == tokens and len(word) > len(tokens):
                row[word[len(tokens)]] = True
        return row
