"""A simple constraint for tests: the answer is one of a few token sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class WordConstraint:
    """Allows the tokens of ``words`` only.

    Args:
        words: Whole answers, each with its end-of-sequence token. A word without it ends in a dead end.
        vocab: The size of the engine's vocabulary.
        eos: The end-of-sequence token.
    """

    def __init__(self, words: Sequence[Sequence[int]], vocab: int, eos: int) -> None:
        self.words = [tuple(word) for word in words]
        self.vocab = vocab
        self.eos = eos
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def allowed(self, tokens: Sequence[int], count: int) -> Tensor:
        beginnings = [tuple(tokens[: len(tokens) - i]) for i in reversed(range(count))]
        for beginning in beginnings:
            if beginning not in self._rows:
                self._rows[beginning] = self._row(beginning)
        return torch.stack([self._rows[beginning] for beginning in beginnings])

    def _row(self, tokens: tuple[int, ...]) -> Tensor:
        if tokens and tokens[-1] == self.eos:
            return torch.ones(self.vocab, dtype=torch.bool)
        row = torch.zeros(self.vocab, dtype=torch.bool)
        for word in self.words:
            if word[: len(tokens)] == tokens and len(word) > len(tokens):
                row[word[len(tokens)]] = True
        return row
