"""The adaptive transfer strength: how far the drafter is trusted, position by position.

A fixed eta lets a drafter that read the wrong passages overrule a target that is sure. Instead, at the
answer's position t,

    ``eta_t = eta · (1 - max p_t) · A_t⁸``

The drafter may overrule the target as far as the target is unsure, and as far as both have agreed so far:

    ``A_t = λ^t G + (1 - λ) Σ_{i<t} λ^(t-1-i) b_i``, ``b_i = Σ_x min(p_i(x), q_i(x))``

is a running mean, with λ = 0.9, of the overlaps of p and q. b_i is the probability that a draft token is
accepted in lossless speculation (Y. Leviathan et al., arXiv:2211.17192, Corollary 3.6). The first words of an
answer say little about the drafter's context. The question says more: both prompts end with it. So the mean
starts from the *question agreement*

    ``G = 1 - max_s max(0, p_s(x_s) - q_s(x_s))``

over the question's tokens x_s, where p and q are the models' unprocessed distributions. A target that has
read about "Trerrura" expects that name once the question has begun it. If the drafter gives the name a low
probability, its context probably omits it.

eta_t depends on nothing but the tokens before t. The output is therefore distributed exactly as
autoregressive sampling from p̂ with eta_t, whatever the draft lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

_Number = TypeVar("_Number", float, Tensor)

DECAY = 0.9
"""λ: the share of its weight that an overlap keeps with each further position."""
EXPONENT = 8
"""How steeply the strength falls with the agreement."""


@dataclass(slots=True)
class AdaptiveTransfer:
    """The transfer strengths of one request.

    Attributes:
        strength: eta, the upper limit at every position.
        agreement: A at the next position, in [0, 1]; G at first.
    """

    strength: float
    agreement: float = 1.0

    def strengths(
        self, target_probs: Tensor, draft_probs: Tensor, *, pending_overlaps: Sequence[float] = ()
    ) -> tuple[Tensor, Tensor]:
        """eta_t at the next consecutive positions. Nothing is observed.

        Args:
            target_probs: p, ``[positions, vocab]`` float32.
            draft_probs: q, same shape.
            pending_overlaps: Overlaps of positions between the observed ones and these.

        Returns:
            eta_t and the overlaps b_t, ``[positions]`` each.
        """
        start = dataclasses.replace(self)
        start.observe(pending_overlaps)
        overlaps = overlap(target_probs, draft_probs)
        powers, kernel = _decays(len(overlaps), overlaps.device)
        agreements = powers * start.agreement + kernel @ overlaps
        return self._strength(target_probs.amax(-1), agreements), overlaps

    def max_strength(self, best_prob: float, *, num_unknown: int) -> float:
        """Upper limit on eta_t at the next position while some overlaps before it are unknown.

        Args:
            best_prob: max p at that position.
            num_unknown: Positions between the observed ones and that position; their overlap is at most 1.
        """
        start = dataclasses.replace(self)
        start.observe([1.0] * num_unknown)
        return self._strength(best_prob, start.agreement)

    def observe(self, overlaps: Sequence[float]) -> None:
        """Advance past positions with these overlaps."""
        for value in overlaps:
            self.agreement = self.agreement * DECAY + value * (1 - DECAY)

    def _strength(self, best_prob: _Number, agreement: _Number) -> _Number:
        return self.strength * (1 - best_prob) * agreement**EXPONENT


def question_agreement(target_probs: Sequence[float], draft_probs: Sequence[float]) -> float:
    """G: how far the drafter's context covers the question.

    Args:
        target_probs: The target's probability of each token that both prompts end with, ``[tokens]``, without
            the first of them: the token before that one differs between the prompts.
        draft_probs: The drafter's probabilities of the same tokens.

    Returns:
        In [0, 1]; 1 where there are no tokens, or where the drafter finds all of them as likely as the
        target.
    """
    return 1 - max([0.0, *(p - q for p, q in zip(target_probs, draft_probs, strict=True))])


def overlap(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """``Σ_x min(p(x), q(x))`` at each position.

    Args:
        target_probs: p, ``[positions, vocab]`` float32.
        draft_probs: q, same shape.

    Returns:
        ``[positions]``. A row that is not finite gets 0: it is refused where it decides a token, and must not
        affect other rows.
    """
    return torch.minimum(target_probs, draft_probs).sum(-1).nan_to_num()


@lru_cache(maxsize=64)
def _decays(positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``λ^k`` for k in [0, positions), and ``(1 - λ) λ^(k-1-i)`` below the diagonal, 0 elsewhere."""
    steps = torch.arange(positions, dtype=torch.float32, device=device)
    kernel = (DECAY ** (steps[:, None] - 1 - steps).clamp_min(0)).tril(-1)
    return DECAY**steps, (1 - DECAY) * kernel
