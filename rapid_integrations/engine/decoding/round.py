"""One round of speculative decoding over a batch: draft → verify → emit → rollback.

Where to find the paper (arXiv:2502.20330) in the code:

* p̂, the retrieval-augmented target distribution (Eq. 6, 8):
  :func:`~rapid_integrations.engine.decoding.verification.augmented_target_logits`
* the accept test (Alg. 1): :func:`~rapid_integrations.engine.decoding.accept.accept_sampled`, and its limit
  at temperature 0: :func:`~rapid_integrations.engine.decoding.accept.accept_greedy`
* the correction token (Eq. 10): :func:`~rapid_integrations.engine.decoding.verification.residual_probs`
* the bonus token: ``accept_*`` where it follows p, else
  :func:`~rapid_integrations.engine.decoding.accept.draw_bonus_token`

Self-speculation (the drafter is the target on a shorter prompt), a smaller drafter and a larger drafter are
the same code. Plain decoding is a draft of no tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from rapid_integrations.engine.decoding.accept import VerificationResult, accept_draft, draw_bonus_token
from rapid_integrations.engine.decoding.drafting import DraftProposer
from rapid_integrations.engine.decoding.pass_costs import RoundCosts
from rapid_integrations.engine.decoding.sequence import Draft, SequenceState
from rapid_integrations.engine.decoding.transfer import overlap
from rapid_integrations.engine.model.batch_entry import ReplayedPasses, Step
from rapid_integrations.engine.model.causal_model import CausalModel


class SpeculativeDecoder:
    """Runs rounds over a target and a drafter.

    Args:
        target: Verifies drafts and decides every token.
        drafter: Proposes tokens; may be ``target`` itself; ``None`` for plain decoding.
        replayed: Recorded passes of the drafter, if there are any.

    Attributes:
        costs: Measured times of both models' passes.
        vocab_size: Number of tokens that both models share. Padded embeddings may differ in size.
    """

    def __init__(
        self, target: CausalModel, drafter: CausalModel | None, replayed: ReplayedPasses | None = None
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.costs = RoundCosts()
        self.vocab_size = min(model.vocab_size for model in (target, drafter) if model is not None)
        self.proposer = DraftProposer(
            drafter, vocab_size=self.vocab_size, device=target.device, costs=self.costs, replayed=replayed
        )

    def round(self, batch: Sequence[SequenceState]) -> list[list[int]]:
        """Advance every sequence by one round.

        Args:
            batch: Sequences in their state between rounds.

        Returns:
            The new tokens of each sequence, at least one. An end-of-sequence token is the last of its list.

        Raises:
            Exception: Any error of a model; every sequence is back in its state before the round.
        """
        started = time.perf_counter()
        try:
            drafts = self.proposer.propose(batch)
            results = self.verify(batch, drafts)
            emitted = self.emit(batch, drafts, results)
        except BaseException:
            for sequence in batch:
                sequence.drop_draft()
            raise
        for sequence, draft, result, tokens in zip(batch, drafts, results, emitted, strict=True):
            rollback(sequence, result.num_accepted, tokens)
            record(sequence, draft, result, tokens)
            self._learn_repetition(sequence, draft, result.num_accepted)
        num_tokens, elapsed = sum(map(len, emitted)), time.perf_counter() - started
        for sequence, draft in zip(batch, drafts, strict=True):
            from_drafter = bool(draft.tokens) and draft.repetition is None
            sequence.draft_length.observe_round(num_tokens, elapsed, from_drafter=from_drafter)
        return emitted

    def _learn_repetition(self, sequence: SequenceState, draft: Draft, num_accepted: int) -> None:
        """Note how many of a draft's looked-up tokens were accepted without the drafter."""
        if draft.repetition is None:
            return
        rates = self.proposer.repetition_rates[sequence.bonus_uses_drafter]
        for place in range(num_accepted):
            rates.observe(draft.repetition.num_equal + place, True)
        if num_accepted < draft.max_tokens:
            rates.observe(draft.repetition.num_equal + num_accepted, False)

    def verify(self, batch: Sequence[SequenceState], drafts: Sequence[Draft]) -> list[VerificationResult]:
        """Score every draft in one target pass and accept leading draft tokens."""
        started = time.perf_counter()
        context = sum(sequence.target.cache.length for sequence in batch)
        steps = [
            Step(sequence.target.cache, sequence.target.unread_with(draft.tokens), len(draft.tokens) + 1)
            for sequence, draft in zip(batch, drafts, strict=True)
        ]
        sizes = [step.num_logits for step in steps]
        rows = torch.split(self.target.forward(steps)[:, : self.vocab_size], sizes)
        results = [
            accept_draft(sequence, draft, sequence.process(logits, sequence.target, draft.tokens))
            for sequence, draft, logits in zip(batch, drafts, rows, strict=True)
        ]
        # The results have been copied from the device, so the pass has ended.
        elapsed = time.perf_counter() - started
        self.costs.observe_verify(context, len(batch), sum(sizes), elapsed)
        for sequence in batch:
            sequence.stats.verify_s += elapsed
        return results

    def emit(
        self, batch: Sequence[SequenceState], drafts: Sequence[Draft], results: Sequence[VerificationResult]
    ) -> list[list[int]]:
        """Draw the bonus tokens that need the drafter, and return each sequence's new tokens."""
        waiting = [
            (sequence, draft, result)
            for sequence, draft, result in zip(batch, drafts, results, strict=True)
            if result.bonus_needs_drafter
        ]
        unread = [pair for pair in waiting if not pair[1].knows_bonus_probs]
        started = time.perf_counter()
        if unread:
            self._read_missing_probs(unread)
        for sequence, draft, result in waiting:
            result.next_token = draw_bonus_token(sequence, draft, result)
        elapsed = time.perf_counter() - started
        for sequence, _, _ in unread:
            sequence.stats.draft_s += elapsed
        return [
            draft.tokens[: result.num_accepted] + ([] if result.next_token is None else [result.next_token])
            for draft, result in zip(drafts, results, strict=True)
        ]

    def _read_missing_probs(self, waiting: Sequence[tuple[SequenceState, Draft, VerificationResult]]) -> None:
        """Read q at the bonus positions, and at the tokens before them that came from the prompt."""
        pairs, guesses = [], []
        for sequence, draft, _ in waiting:
            looked_up = draft.repetition is not None
            # The drafter reads the looked-up tokens like guesses, which gives q at each of them.
            pairs.append((sequence, Draft(0) if looked_up else draft))
            guesses.append(draft.tokens if looked_up else [])
        for (sequence, draft, result), probs in zip(
            waiting, self.proposer.read_probs(pairs, guesses), strict=True
        ):
            draft.probs.extend(probs)
            if draft.repetition is not None and sequence.adaptive is not None:
                target_probs = result.target_logits[:-1].softmax(-1)
                result.overlaps = overlap(target_probs, probs[:-1]).tolist()


def rollback(sequence: SequenceState, num_accepted: int, new_tokens: Sequence[int]) -> None:
    """Append a round's tokens to both models' views and remove rejected draft tokens from both caches."""
    for state in (sequence.target, sequence.drafter):
        if state is not None:
            state.cache.rollback(len(state.tokens) + num_accepted)
            state.tokens.extend(new_tokens)
            state.drop_draft()
    sequence.num_emitted += len(new_tokens)


def record(
    sequence: SequenceState, draft: Draft, result: VerificationResult, new_tokens: Sequence[int]
) -> None:
    """Update what later rounds learn from this one, and the statistics."""
    num_new, num_accepted, stats = len(new_tokens), result.num_accepted, sequence.stats
    if sequence.adaptive is not None:
        # Overlaps are observed in the order of positions: those after skipped ones have to wait.
        known = [] if sequence.skipped_logits else result.overlaps[:num_new]
        sequence.adaptive.observe(known)
        stats.agreement = sequence.adaptive.agreement
        sequence.skipped_logits.extend(result.target_logits[len(known) : num_new])
    for position, (confidence, proposal) in draft.proposals.items():
        # Proposals after a rejected token were not verified. A bonus token that is drawn from p alone may
        # differ from a good proposal.
        verified = position < len(draft.tokens) or sequence.sampler.greedy or sequence.bonus_uses_drafter
        if position < num_new and verified:
            sequence.draft_length.observe(confidence, float(proposal == new_tokens[position]))
    forced = set(draft.forced)
    num_forced = sum(position < num_accepted for position in forced)
    stats.rounds += 1
    stats.drafted_tokens += len(draft.tokens) - len(forced)
    stats.looked_up_tokens += len(draft.tokens) if draft.repetition is not None else 0
    stats.accepted_tokens += num_accepted - num_forced
    stats.forced_tokens += num_forced
    stats.completion_tokens += num_new
    sources = "".join("f" if position in forced else "d" for position in range(num_accepted))
    stats.token_sources += sources.ljust(num_new, "t")
