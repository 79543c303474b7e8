"""How far to trust the drafter, position by position.

A fixed eta lets a drafter that read the wrong passages overrule a target that is sure. Here, at the answer's
position t,

    ``eta_t = eta · (1 - max p_t) · A_t⁸``

The target is overruled as far as it is unsure itself, and by a drafter that has agreed with it so far:

    ``A_t = λ^t G + (1 - λ) Σ_{i<t} λ^(t-1-i) b_i``, ``b_i = Σ_x min(p_i(x), q_i(x))``

is a running mean, with λ = 0.9, of the overlaps of p and q: b_i is the chance that a draft token stands in
lossless speculation (Y. Leviathan et al., arXiv:2211.17192, Corollary 3.6). An answer's first words say
little of what was read. The question's say more, and they are known: both prompts end in them. So the mean
begins at

    ``G = 1 - max_s max(0, p_s(x_s) - q_s(x_s))``

over these tokens x_s; p and q are here what the models say, before any processing. A target that has read
of "Trerrura" expects that name when the question has begun it. A drafter that does not has read of something
else.

eta_t depends on nothing but the tokens before t, so that the output is still distributed exactly as
autoregressive sampling, from p̂ with eta_t, whatever the draft lengths.
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

# λ: the weight that an overlap keeps with each position.
DECAY = 0.9
# How steeply trust falls with agreement.
EXPONENT = 8


@dataclass(slots=True)
class AdaptiveTransfer:
    """One request's transfer strengths.

    Attributes:
        strength: eta, the most that any position gets.
        agreement: A at the next position, in [0, 1]: at first G.
    """

    strength: float
    agreement: float = 1.0

    def strengths(
        self, target_probs: Tensor, draft_probs: Tensor, *, behind: Sequence[float] = ()
    ) -> tuple[Tensor, Tensor]:
        """eta_t at the next positions, one behind the other.

        Args:
            target_probs: p, ``[positions, vocab]`` float32.
            draft_probs: q, same shape.
            behind: Overlaps of positions between those that were observed and these.

        Returns:
            eta_t and the overlaps b_t, ``[positions]`` each.
        """
        start = dataclasses.replace(self)
        start.observe(behind)
        overlaps = overlap(target_probs, draft_probs)
        powers, kernel = _decays(len(overlaps), overlaps.device)
        agreements = powers * start.agreement + kernel @ overlaps
        return self._strength_at(target_probs.amax(-1), agreements), overlaps

    def most(self, best_prob: float, *, behind: int) -> float:
        """The most that eta_t can be at the next position while overlaps are unknown.

        Args:
            best_prob: max p there.
            behind: Positions between those that were observed and this one.
        """
        start = dataclasses.replace(self)
        start.observe([1.0] * behind)
        return self._strength_at(best_prob, start.agreement)

    def observe(self, overlaps: Sequence[float]) -> None:
        """Go on behind positions with these overlaps."""
        for one in overlaps:
            self.agreement = self.agreement * DECAY + one * (1 - DECAY)

    def _strength_at(self, best_prob: _Number, agreement: _Number) -> _Number:
        return self.strength * (1 - best_prob) * agreement**EXPONENT


def question_agreement(target_probs: Sequence[float], draft_probs: Sequence[float]) -> float:
    """G: how far the drafter has read what the question is about.

    Args:
        target_probs: What the target gave each of the tokens in which both prompts end, ``[tokens]``, but for
            the first: what stands before that one differs.
        draft_probs: What the drafter gave them.

    Returns:
        In [0, 1]; 1 where there are none, or where they are all as likely to the drafter as to the target.
    """
    return 1 - max([0.0, *(p - q for p, q in zip(target_probs, draft_probs, strict=True))])


def overlap(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """``Σ_x min(p(x), q(x))`` at each position.

    Args:
        target_probs: p, ``[positions, vocab]`` float32.
        draft_probs: q, same shape.

    Returns:
        ``[positions]``. A row that is not finite has 0: it is refused where it decides, and must not spoil
        the others.
    """
    return torch.minimum(target_probs, draft_probs).sum(-1).nan_to_num()


@lru_cache(maxsize=64)
def _decays(positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``λ^k`` for k in [0, positions), and ``(1 - λ) λ^(k-1-i)`` below the diagonal, 0 elsewhere."""
    steps = torch.arange(positions, dtype=torch.float32, device=device)
    kernel = (DECAY ** (steps[:, None] - 1 - steps).clamp_min(0)).tril(-1)
    return DECAY**steps, (1 - DECAY) * kernel
