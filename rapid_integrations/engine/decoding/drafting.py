"""Drafting: the drafter proposes tokens for all sequences together, one drafter pass at a time.

Two mechanisms save drafter passes. Where a constraint allows a single token, that token is drafted without
asking the drafter. And a pass reads a *guess* at the next tokens too: an n-gram of the drafter's own context
(:mod:`~rapid_integrations.engine.decoding.lookup`). The drafter's own choices are drafted along the guess, up
to the first that differs, so the draft is the same as without guesses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from rapid_integrations.engine.decoding.pass_costs import RoundCosts
from rapid_integrations.engine.decoding.prompt_lookup import RepetitionRates, best_length
from rapid_integrations.engine.decoding.sampling import DRAFT
from rapid_integrations.engine.decoding.sequence import Draft, SequenceState
from rapid_integrations.engine.decoding.skipping import MAX_SKIPPED, catch_up
from rapid_integrations.engine.decoding.verification import sample_tokens
from rapid_integrations.engine.model.batch_entry import ReplayedPasses, Step
from rapid_integrations.engine.model.causal_model import CausalModel

# The length of drafts from the prompt before the cost of verifying them is known.
_FIRST_LOOKED_UP = 4

SequenceDraft = tuple[SequenceState, Draft]


class DraftProposer:
    """Proposes tokens with a drafter.

    Args:
        drafter: The drafter; ``None`` proposes nothing.
        vocab_size: Number of tokens that target and drafter share.
        device: The target's device, where q is needed.
        costs: Measured times of passes; drafter passes are added.
        replayed: Recorded passes of the drafter; ``None`` runs every pass directly.

    Attributes:
        repetition_rates: How often drafts from the prompt were right, by whether the drafter can change the
            token: where it can, a token counts as right only if the drafter need not be asked.
    """

    def __init__(
        self,
        drafter: CausalModel | None,
        *,
        vocab_size: int,
        device: torch.device,
        costs: RoundCosts,
        replayed: ReplayedPasses | None = None,
    ) -> None:
        self._drafter = drafter
        self._vocab_size = vocab_size
        self._device = device
        self._costs = costs
        self._replayed = replayed
        self.repetition_rates = {steered: RepetitionRates() for steered in (False, True)}

    def propose(self, batch: Sequence[SequenceState]) -> list[Draft]:
        """A draft for each sequence; empty where drafting is not expected to pay."""
        target_context = sum(sequence.target.cache.length for sequence in batch)
        drafter_context = sum(s.drafter.cache.length for s in batch if s.drafter is not None)
        drafts = []
        for sequence in batch:
            if (looked_up := self._look_up(sequence, len(batch), target_context)) is not None:
                drafts.append(looked_up)
                continue
            max_tokens = 0
            if sequence.drafter is not None:
                max_tokens = sequence.draft_length.begin(
                    target_context=target_context,
                    drafter_context=drafter_context,
                    sequences=len(batch),
                    # The round adds one token of the target's own.
                    room=sequence.sampling.max_new_tokens - sequence.num_emitted - 1,
                )
            drafts.append(Draft(max_tokens))
        pairs = zip(batch, drafts, strict=True)
        unfinished = [pair for pair in pairs if pair[1].max_tokens and pair[1].repetition is None]
        while unfinished := [pair for pair in unfinished if self._add_forced_tokens(*pair)]:
            unfinished = self._extend(unfinished)
        return drafts

    def _look_up(self, sequence: SequenceState, sequences: int, target_context: int) -> Draft | None:
        """A draft from the prompt, where it is expected to give more tokens per second than the drafter."""
        if sequence.prompt_lookup is None:
            return None
        draft_length = sequence.draft_length
        room = sequence.sampling.max_new_tokens - sequence.num_emitted - 1
        max_tokens = min(
            sequence.speculation.max_draft_tokens, MAX_SKIPPED - len(sequence.skipped_logits), room
        )
        found = sequence.prompt_lookup.find(max_tokens, sequence.eos_token_ids)
        if found is None:
            return None
        plain_s = self._costs.plain_s(target_context, sequences)
        verify_s = self._costs.verify_s(target_context, 2 * sequences)
        if plain_s is None or verify_s is None:
            # Costs are not known yet: learn them from texts that probably go on the same way.
            length = min(_FIRST_LOOKED_UP, len(found.tokens)) if found.num_equal > 1 else 0
        else:
            length = best_length(
                found,
                self.repetition_rates[sequence.bonus_uses_drafter],
                lambda count: (
                    self._costs.verify_s(target_context, sequences * (count + 1)) or verify_s
                    if count
                    else plain_s
                ),
                min_tokens_per_s=draft_length.drafter_tokens_per_s,
            )
        return Draft(length, found.tokens[:length], repetition=found) if length else None

    def read_probs(self, pairs: Sequence[SequenceDraft], guesses: Sequence[Sequence[int]]) -> list[Tensor]:
        """Q after each draft, and after each longer part of its guess, in one drafter pass.

        Args:
            pairs: Sequences with their drafts.
            guesses: Tokens that may follow each draft; the drafter reads them too.

        Returns:
            For each pair ``[guess + 1, vocab]``, on the target's device.
        """
        assert self._drafter is not None
        steps = []
        for (sequence, draft), guess in zip(pairs, guesses, strict=True):
            assert sequence.drafter is not None
            num_logits = len(guess) + 1
            if sequence.skipped_logits:
                # Forced tokens of the draft may lie between the skipped positions and the guess.
                num_logits += len(sequence.skipped_logits) + len(draft.tokens)
            unread = sequence.drafter.unread_with([*draft.tokens, *guess])
            steps.append(Step(sequence.drafter.cache, unread, num_logits))
        # Tests replace forward by functions without the second argument.
        replayed = () if self._replayed is None else (self._replayed,)
        logits = self._drafter.forward(steps, *replayed)[:, : self._vocab_size].to(self._device)
        rows = torch.split(logits, [step.num_logits for step in steps])
        probs = []
        for (sequence, draft), guess, own_rows in zip(pairs, guesses, rows, strict=True):
            assert sequence.drafter is not None
            sequence.stats.drafter_passes += 1
            q = sequence.process(own_rows, sequence.drafter, [*draft.tokens, *guess]).softmax(-1)
            catch_up(sequence, q[: len(sequence.skipped_logits)])
            probs.append(q[-len(guess) - 1 :])
        return probs

    def _add_forced_tokens(self, sequence: SequenceState, draft: Draft) -> bool:
        """Append tokens while the constraint allows a single one; whether the drafter is asked next."""
        while (allowed := sequence.allowed(draft.tokens)) is not None:
            if (num_allowed := int(allowed.sum())) != 1:
                return num_allowed > 0
            draft.probs.append(allowed[0].to(self._device, torch.float32))
            draft.forced.append(len(draft.tokens))
            draft.tokens.append(int(allowed[0].nonzero()))
            if draft.is_complete(sequence.eos_token_ids):
                return False
        return True

    def _extend(self, pairs: Sequence[SequenceDraft]) -> list[SequenceDraft]:
        """Extend each draft by one drafter pass; returns the pairs whose drafts are not finished."""
        started = time.perf_counter()
        context = sum(s.drafter.cache.length for s, _ in pairs if s.drafter is not None)
        num_known = [len(draft.probs) for _, draft in pairs]
        guesses = [_guess(*pair) for pair in pairs]
        unfinished = [
            pair
            for pair, guess, probs in zip(pairs, guesses, self.read_probs(pairs, guesses), strict=True)
            if _append_choices(*pair, guess, probs)
        ]
        # The tokens have been copied from the device, so the pass has ended.
        elapsed = time.perf_counter() - started
        self._costs.observe_draft(context, len(pairs), elapsed)
        for (sequence, draft), known in zip(pairs, num_known, strict=True):
            sequence.draft_length.observe_pass(len(draft.probs) - known)
            sequence.stats.draft_s += elapsed
        return unfinished


def _append_choices(sequence: SequenceState, draft: Draft, guess: Sequence[int], probs: Tensor) -> bool:
    """Append the drafter's choices along a guess; returns whether the draft should grow further.

    Args:
        sequence: The request.
        draft: Extended by at least one token, unless the drafter is too unsure.
        guess: The tokens that were read after the draft.
        probs: q, ``[guess + 1, vocab]``.
    """
    state = sequence.drafter
    assert state is not None
    confidences, choices = probs.max(-1)
    if not sequence.sampler.greedy:
        position = sequence.num_emitted + len(draft.tokens)
        choices = sample_tokens(probs, sequence.sampler.uniforms(position, len(probs), DRAFT))
    # One transfer from the device; token ids are exact in float64.
    proposals = torch.stack([confidences.double(), choices.double()], dim=1).tolist()
    finished = False
    for row, guessed, (confidence, choice) in zip(probs, [*guess, None], proposals, strict=True):
        token = int(choice)
        draft.proposals[len(draft.probs)] = (confidence, token)
        draft.probs.append(row)
        finished = draft.is_complete(sequence.eos_token_ids) or not sequence.draft_length.keeps(confidence)
        if finished:
            break
        draft.tokens.append(token)
        if token != guessed:
            break
    if guess and sequence.lookup is not None:
        wrong = (i for i, guessed in enumerate(guess) if proposals[i][1] != guessed)
        sequence.lookup.observe(len(guess), next(wrong, len(guess)))
    # Remove a wrong guess from the cache. The last draft token is still to be read.
    state.cache.rollback(len(state.tokens) + len(draft.tokens) - (0 if finished else 1))
    if finished or draft.is_complete(sequence.eos_token_ids):
        return False
    return sequence.draft_length.goes_on()


def _guess(sequence: SequenceState, draft: Draft) -> list[int]:
    """Tokens that the drafter is likely to propose next, within the draft's limit and the constraint."""
    if sequence.lookup is None:
        return []
    guess = sequence.lookup.guess(draft.tokens, draft.max_tokens - len(draft.tokens))
    return guess[: _num_free(sequence, draft.tokens, guess)]


def _num_free(sequence: SequenceState, draft_tokens: Sequence[int], guess: Sequence[int]) -> int:
    """The number of leading tokens of a guess before the constraint leaves fewer than two choices.

    At that position the constraint forces a token or ends the draft, so the drafter need not read on.
    """
    allowed = sequence.allowed(draft_tokens)
    if allowed is None:
        return len(guess)
    for end, token in enumerate(guess):
        if not allowed[0, token] or token in sequence.eos_token_ids:
            return end
        allowed = sequence.allowed([*draft_tokens, *guess[: end + 1]])
        assert allowed is not None
        if int(allowed.sum()) < 2:
            return end
    return len(guess)
