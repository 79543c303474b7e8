"""."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.cache.model_state import ModelState
from rapid_integrations.engine.decoding.constraint import TokenConstraint
from rapid_integrations.engine.decoding.draft_length import DraftLength
from rapid_integrations.engine.decoding.lookup import NGramLookup
from rapid_integrations.engine.decoding.sampling import Sampler
from rapid_integrations.engine.decoding.transfer import AdaptiveTransfer, overlap
from rapid_integrations.engine.decoding.verification import (
    TargetMargin,
    augmented_target_logits,
    mixture_logits,
)
from rapid_integrations.engine.stats import RapidStats

# Positions of which the logits are kept until the drafter is asked: megabytes, at 150,000 tokens.
_MOST_SKIPPED = 32


@dataclass(slots=True)
class SequenceState:
    """A request that is being decoded.

    Attributes:
        target: The target's view.
        drafter: The drafter's view; ``None`` decodes plainly.
        sampler: Logits processors and random numbers.
        sampling: Sampling parameters.
        speculation: Speculation parameters.
        draft_length: Ends drafts.
        eos_token_ids: Tokens that end the answer.
        stats: Counts and times, kept up to date.
        question_agreement: How far the drafter's context covers the question, in [0, 1]; the transfer
            strength starts from it (:func:`~rapid_integrations.engine.decoding.transfer.question_agreement`).
        num_emitted: Tokens of the answer so far.
        constraint: Limits the answer's tokens; ``None`` does not.
        lookup: Guesses at what the drafter proposes; ``None`` without one.
        adaptive: Lowers the transfer strength; ``None`` keeps it fixed.
        skipped: The target's processed logits, ``[vocab]`` each, at the last positions of the answer, where
            the drafter was not asked as it could not change the choice, and at those that were forced behind
            them. How far it agreed there is found out when it is asked next.
    """

    target: ModelState
    drafter: ModelState | None
    sampler: Sampler
    sampling: SamplingParams
    speculation: SpeculationParams
    draft_length: DraftLength
    eos_token_ids: frozenset[int]
    stats: RapidStats
    question_agreement: float = 1.0
    num_emitted: int = 0
    constraint: TokenConstraint | None = None
    lookup: NGramLookup | None = field(init=False, default=None)
    adaptive: AdaptiveTransfer | None = field(init=False, default=None)
    skipped: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.drafter is not None:
            if self.speculation.adapts:
                self.adaptive = AdaptiveTransfer(self.transfer_strength, self.question_agreement)
            self.lookup = NGramLookup(self.drafter.tokens)

    def guess(self, draft: Draft) -> list[int]:
        """Tokens that the drafter may propose next: at most what the draft lacks."""
        if self.lookup is None:
            return []
        guess = self.lookup.guess(draft.tokens, draft.wanted - len(draft.tokens))
        return guess[: self._num_free(draft.tokens, guess)]

    def _num_free(self, draft_tokens: Sequence[int], guess: Sequence[int]) -> int:
        """How many leading tokens of a guess the constraint allows before it leaves fewer than two choices.

        There it forces what follows, or ends the draft: the drafter need not read on.
        """
        allowed = self.allowed(draft_tokens)
        if allowed is None:
            return len(guess)
        for end, token in enumerate(guess):
            # Nothing follows an end of sequence.
            if not allowed[0, token] or token in self.eos_token_ids:
                return end
            allowed = self.allowed([*draft_tokens, *guess[: end + 1]])
            assert allowed is not None
            if int(allowed.sum()) < 2:
                return end
        return len(guess)

    @property
    def transfer_strength(self) -> float:
        """The transfer strength in force: none without a drafter."""
        return self.speculation.effective_strength if self.drafter is not None else 0.0

    @property
    def reads_bonus(self) -> bool:
        """Whether a bonus token is drawn like every other one, from q first.

        ``"augmented"`` needs q to form p̂ there, and ``"mixture"`` to mix it in. A seeded sample is drawn that
        way too, so that its tokens do not depend on where drafts end.
        """
        if self.drafter is None or self.speculation.acceptance == "paper":
            return False
        seeded = not self.sampling.greedy and self.sampling.seed is not None
        return self.speculation.drafter_steers or seeded

    def allowed(self, draft_tokens: Sequence[int], count: int = 1) -> Tensor | None:
        """What may follow the draft and the ``count - 1`` shorter ones; ``None`` is anything."""
        if self.constraint is None:
            return None
        tokens = self.target.tokens
        return self.constraint.allowed([*tokens[len(tokens) - self.num_emitted :], *draft_tokens], count)

    def process(self, logits: Tensor, track: ModelState, draft_tokens: Sequence[int]) -> Tensor:
        """A model's logits at the last positions of a draft, as p, q and p̂ are formed from them."""
        allowed = self.allowed(draft_tokens, logits.shape[0])
        return self.sampler.process(logits, track.tokens, draft_tokens, allowed)

    def augment(
        self, logits: Tensor, draft_probs: Tensor, *, behind: Sequence[float] = ()
    ) -> tuple[Tensor, Tensor]:
        """What draft tokens are accepted against.

        Args:
            logits: The target's processed logits at the next positions, ``[positions, vocab]``.
            draft_probs: q, same shape.
            behind: Overlaps of the draft's positions before these.

        Returns:
            Logits of p̂, or of the mixture under ``"mixture"``, same shape, and the overlaps of p and q,
            ``[positions]``: none where the transfer strength is fixed.
        """
        if self.speculation.acceptance == "mixture":
            weight = self.speculation.mixture_weight
            return mixture_logits(logits, draft_probs, target_weight=weight), logits.new_empty(0)
        strength: float | Tensor = self.transfer_strength
        overlaps, target_probs = logits.new_empty(0), None
        if self.adaptive is not None:
            target_probs = logits.softmax(-1)
            strength, overlaps = self.adaptive.strengths(target_probs, draft_probs, behind=behind)
        augmented = augmented_target_logits(
            logits,
            draft_probs,
            transfer_strength=strength,
            tail_rule=self.speculation.tail_rule,
            target_probs=target_probs,
        )
        return augmented, overlaps

    def decided(self, lead: TargetMargin, count: int) -> bool:
        """Whether the next token is the same whatever the drafter says.

        Sampling, that is so where p has one token only, and never under ``"mixture"``, where q may have
        others. A token is drawn from q first, and what q proposes stands for sure where it finds it no
        likelier than the distribution that it is accepted against does: as long as there are two tokens,
        another q brings another one out of the same random numbers. (A mixture can be drawn from p with the
        chance w, and from q else, which asks q less often. But at a drafted position q's proposal is there,
        and to accept it so would accept fewer; and drawing the two kinds of positions in two ways, a seeded
        answer would depend on where drafts end.)

        Args:
            lead: The target's, behind a draft.
            count: Tokens of that draft.
        """
        mixes = self.speculation.acceptance == "mixture"
        if len(self.skipped) >= _MOST_SKIPPED or (mixes and not self.sampler.greedy):
            return False
        if not self.sampler.greedy:
            return lead.is_only_choice
        if mixes:
            return lead.outlasts_mixing(self.speculation.mixture_weight)
        strength = self.transfer_strength
        if self.adaptive is not None:
            strength = self.adaptive.most(lead.best_prob, behind=len(self.skipped) + count)
        return lead.outlasts(strength, self.speculation.tail_rule)

    def catch_up(self, draft_probs: Tensor) -> None:
        """Take in q at the skipped positions, ``[skipped, vocab]``."""
        if not self.skipped:
            return
        assert self.adaptive is not None
        target_probs = torch.stack(self.skipped).softmax(-1)
        overlaps = overlap(target_probs, draft_probs)
        confidences, choices = draft_probs.max(-1)
        known, *seen = torch.stack([overlaps, confidences, choices.float()]).tolist()
        self.adaptive.observe(known)
        self.stats.agreement = self.adaptive.agreement
        tokens = self.target.tokens[-len(self.skipped) :]
        allowed = self.allowed([], len(tokens) + 1)
        forced = [False] * len(tokens) if allowed is None else (allowed[:-1].sum(-1) == 1).tolist()
        for same, confidence, choice, token, no_proposal in zip(known, *seen, tokens, forced, strict=True):
            if not no_proposal:
                # What is drawn without the drafter is p's only token: q proposes it with this chance.
                stood = float(choice == token) if self.sampler.greedy else same
                self.draft_length.observe(confidence, stood)
        self.skipped.clear()

    def settle(self) -> None:
        """Restore the between-rounds state of both caches."""
        self.target.settle()
        if self.drafter is not None:
            self.drafter.settle()


@dataclass(slots=True)
class Draft:
    """A sequence's proposal in one round.

    Attributes:
        wanted: How many tokens to propose at most.
        tokens: The draft tokens.
        probs: q at every position that was asked for, ``[vocab]`` each: one per draft token, and perhaps one
            more, at the position behind them.
        forced: The positions in ``tokens`` where the constraint left no choice: no proposals of the drafter.
        proposed: The drafter's confidence and its proposal at the positions in ``probs`` that are not forced.
    """

    wanted: int
    tokens: list[int] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    proposed: dict[int, tuple[float, int]] = field(default_factory=dict)

    def complete(self, eos_token_ids: frozenset[int]) -> bool:
        """Whether nothing is to be added."""
        return len(self.tokens) >= self.wanted or (bool(self.tokens) and self.tokens[-1] in eos_token_ids)
