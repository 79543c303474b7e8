"""The input of a forward pass: one sequence's new tokens, and the interface of replayed passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rapid_integrations.engine.cache.sequence_kv import SequenceKV


@dataclass(frozen=True, slots=True)
class Step:
    """One sequence's part in a forward pass.

    Attributes:
        cache: The sequence's KV; the pass writes to it and advances its length.
        tokens: The new tokens, at least one.
        num_logits: The number of last new tokens whose logits are needed.
    """

    cache: SequenceKV
    tokens: Sequence[int]
    num_logits: int = 1


class ReplayedPasses(Protocol):
    """Recorded forward passes of a model: ``GraphedPasses``."""

    def supports(self, steps: Sequence[Step]) -> bool:
        """Whether a pass over these sequences can be replayed."""

    def __call__(self, steps: Sequence[Step]) -> Tensor:
        """Run a supported pass without advancing the caches; ``[sum of num_logits, vocab]``."""
