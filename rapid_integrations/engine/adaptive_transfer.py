"""How far to trust the drafter, position by position.

A fixed eta lets a drafter that read the wrong passages overrule a target that is sure. Here, at the answer's
position t,

    ``eta_t = eta · (1 - max p_t) · A_t⁴ · G``

The target is overruled as far as it is unsure itself, and by a drafter that has agreed with it so far, and
that has read what the question is about:

    ``A_t = (λ^t + Σ_{i<t} λ^(t-1-i) b_i) / (λ^t + Σ_{i<t} λ^(t-1-i))``, ``b_i = Σ_x min(p_i(x), q_i(x))``

is a running mean, from 1 on and with λ = 0.9, of the overlaps of p and q: b_i is the chance that a draft
token stands in lossless speculation (Y. Leviathan et al., arXiv:2211.17192, Corollary 3.6). Until an answer
says something, agreement tells little; the question does more. Its tokens x_s are known, and both prompts end
in them:

    ``G = 1 - max_s max(0, p_s(x_s) - q_s(x_s))``

A target that has read of "Trerrura" goes on with that name when the question has begun it. A drafter that
has not does not expect it: what it read is about something else.

eta_t depends on nothing but the tokens before t, so that the output is still distributed exactly as
autoregressive sampling, from p̂ with eta_t, whatever the draft lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# λ: the weight that an overlap keeps with each position.
DECAY = 0.9
# How steeply trust falls with agreement.
EXPONENT = 4


@dataclass(slots=True)
class AdaptiveTransfer:
    """One request's transfer strengths.

    Attributes:
        strength: eta, the most that any position gets.
        grounding: G, see :func:`grounding`.
        agreed: Numerator of A at the next position.
        weight: Its denominator.
    """

    strength: float
    grounding: float = 1.0
    agreed: float = 1.0
    weight: float = 1.0

    @property
    def agreement(self) -> float:
        """A at the next position, in [0, 1]."""
        return self.agreed / self.weight

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
        agreed = powers * start.agreed + kernel @ overlaps
        weight = powers * start.weight + kernel.sum(-1)
        return self._strength_at(target_probs, agreed / weight), overlaps

    def most(self, target_probs: Tensor, *, behind: int) -> Tensor:
        """The most that eta_t can be at the next position, ``[1]``, while overlaps are unknown.

        Args:
            target_probs: p, ``[1, vocab]`` float32.
            behind: Positions between those that were observed and this one.
        """
        start = dataclasses.replace(self)
        start.observe([1.0] * behind)
        return self._strength_at(target_probs, start.agreement)

    def observe(self, overlaps: Sequence[float]) -> None:
        """Go on behind positions with these overlaps."""
        for one in overlaps:
            self.agreed = self.agreed * DECAY + one
            self.weight = self.weight * DECAY + 1

    def _strength_at(self, target_probs: Tensor, agreement: float | Tensor) -> Tensor:
        most = self.strength * self.grounding
        return most * (1 - target_probs.amax(-1)) * agreement**EXPONENT


def grounding(target_probs: Sequence[float], draft_probs: Sequence[float]) -> float:
    """G: how far the drafter has read what the question is about.

    Args:
        target_probs: What the target gave each of the tokens in which both prompts end, ``[tokens]``.
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
    """``λ^k`` for k in [0, positions), and ``λ^(k-1-i)`` below the diagonal, 0 elsewhere."""
    steps = torch.arange(positions, dtype=torch.float32, device=device)
    kernel = (DECAY ** (steps[:, None] - 1 - steps).clamp_min(0)).tril(-1)
    return DECAY**steps, kernel
