"""The state of one request while it is decoded, and of its draft within a round."""

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
from rapid_integrations.engine.decoding.prompt_lookup import PromptLookup, Repetition
from rapid_integrations.engine.decoding.sampling import Sampler
from rapid_integrations.engine.decoding.transfer import AdaptiveTransfer
from rapid_integrations.engine.stats import RapidStats


@dataclass(slots=True)
class SequenceState:
    """A request that is being decoded.

    Between rounds each cache holds a prefix of its model's tokens, at least the last token has not been
    read, and nothing of a draft is left.

    Attributes:
        target: The target's tokens and cache.
        drafter: The drafter's tokens and cache; ``None`` for plain decoding.
        sampler: Logits processors and random numbers.
        sampling: Sampling parameters.
        speculation: Speculation parameters.
        draft_length: Decides when a draft ends.
        eos_token_ids: Tokens that end the answer.
        stats: Counts and times, updated every round.
        question_agreement: How far the drafter's context covers the question, in [0, 1]; the adaptive
            transfer strength starts from it.
        num_emitted: Tokens of the answer so far.
        constraint: Limits the answer's tokens; ``None`` for free text.
        lookup: Guesses tokens that the drafter is likely to propose; ``None`` without a drafter.
        prompt_lookup: Finds drafts in the prompt, without the drafter; ``None`` where they may not be used.
        adaptive: Lowers the transfer strength position by position; ``None`` where it is fixed.
        skipped_logits: The target's processed logits, ``[vocab]`` each, at the last positions of the answer
            for which q is still unknown: see :mod:`~rapid_integrations.engine.decoding.skipping`.
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
    prompt_lookup: PromptLookup | None = field(init=False, default=None)
    adaptive: AdaptiveTransfer | None = field(init=False, default=None)
    skipped_logits: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.drafter is not None:
            if self.speculation.adapts:
                self.adaptive = AdaptiveTransfer(self.transfer_strength, self.question_agreement)
            self.lookup = NGramLookup(self.drafter.tokens)
            if self.drafts_may_be_looked_up:
                self.prompt_lookup = PromptLookup(self.target.tokens)

    @property
    def transfer_strength(self) -> float:
        """eta, before it is adapted; 0 without a drafter."""
        return self.speculation.effective_strength if self.drafter is not None else 0.0

    @property
    def bonus_uses_drafter(self) -> bool:
        """Whether a bonus token is drawn like a drafted one, from q first.

        ``"augmented"`` needs q at the bonus position to form p̂, ``"mixture"`` to mix it in. A seeded sample
        is drawn the same way, so that its tokens do not depend on where drafts end.
        """
        if self.drafter is None or self.speculation.acceptance == "paper":
            return False
        seeded = not self.sampling.greedy and self.sampling.seed is not None
        return self.speculation.drafter_steers or seeded

    @property
    def drafts_may_be_looked_up(self) -> bool:
        """Whether a draft may come from the prompt instead of the drafter.

        Not when sampling: the same random numbers would give other tokens. ``"paper"`` needs q for every
        draft token, and a fixed draft length is the drafter's.
        """
        speculation = self.speculation
        return (
            self.sampler.greedy
            and self.constraint is None
            and speculation.num_draft_tokens is None
            and speculation.acceptance != "paper"
        )

    def allowed(self, draft_tokens: Sequence[int], count: int = 1) -> Tensor | None:
        """The tokens that the constraint allows after the answer and a draft.

        Args:
            draft_tokens: Tokens that follow the answer.
            count: Number of positions. The last one follows all draft tokens, the one before it follows all
                but the last, and so on.

        Returns:
            ``[count, vocab]`` bool, or ``None`` where every token is allowed.
        """
        if self.constraint is None:
            return None
        tokens = self.target.tokens
        return self.constraint.allowed([*tokens[len(tokens) - self.num_emitted :], *draft_tokens], count)

    def process(self, logits: Tensor, state: ModelState, draft_tokens: Sequence[int]) -> Tensor:
        """Apply the request's logits processors and constraint.

        Args:
            logits: A model's logits at the last positions of a draft, ``[positions, vocab]``.
            state: That model's tokens.
            draft_tokens: The draft that the last row follows.

        Returns:
            ``[positions, vocab]``: the logits that p, q and p̂ are formed from.
        """
        allowed = self.allowed(draft_tokens, logits.shape[0])
        return self.sampler.process(logits, state.tokens, draft_tokens, allowed)

    def drop_draft(self) -> None:
        """Restore the state between rounds: remove draft tokens from both caches."""
        self.target.drop_draft()
        if self.drafter is not None:
            self.drafter.drop_draft()


@dataclass(slots=True)
class Draft:
    """The tokens proposed for one sequence in one round.

    Attributes:
        max_tokens: Upper limit on the number of tokens.
        tokens: The draft tokens.
        probs: q at each position the drafter was asked for, ``[vocab]`` each: one per draft token, and
            possibly one more at the bonus position.
        forced: Positions in ``tokens`` where the constraint allows a single token. The drafter is not asked
            there.
        proposals: The drafter's confidence (its largest probability) and proposed token, by position. Forced
            positions have none.
        repetition: Where the tokens were looked up; ``None`` if the drafter proposed them.
    """

    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    proposals: dict[int, tuple[float, int]] = field(default_factory=dict)
    repetition: Repetition | None = None

    def is_complete(self, eos_token_ids: frozenset[int]) -> bool:
        """Whether no further token may be added."""
        return len(self.tokens) >= self.max_tokens or self.ends_with(eos_token_ids)

    def ends_with(self, eos_token_ids: frozenset[int]) -> bool:
        """Whether the last draft token is an end-of-sequence token."""
        return bool(self.tokens) and self.tokens[-1] in eos_token_ids

    @property
    def knows_bonus_probs(self) -> bool:
        """Whether q is known at the position after the last draft token."""
        return len(self.probs) > len(self.tokens)

    def token_probs(self, like: Tensor) -> Tensor:
        """Q at the positions of the draft tokens, ``[draft tokens, vocab]``.

        Args:
            like: A tensor ``[…, vocab]`` that gives device and dtype of an empty result.
        """
        return torch.stack(self.probs[: len(self.tokens)]) if self.tokens else like[:0]
