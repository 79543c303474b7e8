"""One round over a batch: draft → verify → emit → rollback.

Self-speculation (the drafter is the target on a shorter prompt), downward speculation (a smaller drafter) and
upward speculation (a larger one) are the same code, and so is plain decoding: a draft of no tokens.

Between rounds every sequence satisfies: each cache holds a prefix of its model's tokens, at least the last
token is still to be read, and nothing of a draft is left. A round that raises leaves that state as it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from rapid_integrations.engine.decoding.accept import VerificationResult, _draw_bonus, _judge
from rapid_integrations.engine.decoding.pass_costs import RoundCosts
from rapid_integrations.engine.decoding.sampling import DRAFT
from rapid_integrations.engine.decoding.sequence import Draft, SequenceState
from rapid_integrations.engine.decoding.verification import (
    sample_tokens,
)
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.model.cuda_graphs import GraphedPasses


class SpeculativeDecoder:
    """Runs rounds over a target and a drafter.

    Args:
        target: Scores and decides.
        drafter: Proposes; may be ``target`` itself; ``None`` decodes plainly.
        graphs: The drafter's passes that are replayed as CUDA graphs.
    """

    def __init__(
        self, target: CausalModel, drafter: CausalModel | None, graphs: GraphedPasses | None = None
    ) -> None:
        self.target = target
        self.drafter = drafter
        self._graphs = graphs
        self.costs = RoundCosts()
        # Padded embedding matrices may differ in size; tokens are what the smaller one knows.
        self.vocab_size = min(m.vocab_size for m in (target, drafter) if m is not None)

    def round(self, batch: Sequence[SequenceState]) -> list[list[int]]:
        """Advance every sequence by one round.

        Args:
            batch: Sequences in their between-rounds state.

        Returns:
            The new tokens of each sequence, at least one. An end-of-sequence token is the last of its list.

        Raises:
            Exception: Whatever a model raised; every sequence is in its state before the round.
        """
        started = time.perf_counter()
        try:
            drafts = self.draft(batch)
            verdicts = self.verify(batch, drafts)
            emitted = self.emit(batch, drafts, verdicts)
        except BaseException:
            for sequence in batch:
                sequence.settle()
            raise
        self.rollback(batch, drafts, verdicts, emitted)
        total, elapsed = sum(len(tokens) for tokens, _ in emitted), time.perf_counter() - started
        for sequence in batch:
            sequence.draft_length.observe_round(total, elapsed)
        return [tokens for tokens, _ in emitted]

    def draft(self, batch: Sequence[SequenceState]) -> list[Draft]:
        """Let the drafter propose, for all sequences together, one position a step."""
        target_context = sum(s.target.cache.length for s in batch)
        drafter_context = sum(s.drafter.cache.length for s in batch if s.drafter is not None)
        drafts = []
        for sequence in batch:
            wanted = 0
            if sequence.drafter is not None:
                wanted = sequence.draft_length.begin(
                    target_context=target_context,
                    drafter_context=drafter_context,
                    sequences=len(batch),
                    # The round adds one token of the target's own.
                    room=sequence.sampling.max_new_tokens - sequence.num_emitted - 1,
                )
            drafts.append(Draft(wanted))
        pairs = [pair for pair in zip(batch, drafts, strict=True) if pair[1].wanted]
        while pairs := [pair for pair in pairs if self._draft_forced(*pair)]:
            pairs = self._propose(pairs)
        return drafts

    def _draft_forced(self, sequence: SequenceState, draft: Draft) -> bool:
        """Append the tokens that the constraint forces; whether the drafter is to be asked then."""
        while (allowed := sequence.allowed(draft.tokens)) is not None:
            if (choices := int(allowed.sum())) != 1:
                return choices > 0
            draft.probs.append(allowed[0].to(self.target.device, torch.float32))
            draft.forced.append(len(draft.tokens))
            draft.tokens.append(int(allowed[0].nonzero()))
            if draft.complete(sequence.eos_token_ids):
                return False
        return True

    def _propose(self, pairs: Sequence[tuple[SequenceState, Draft]]) -> list[tuple[SequenceState, Draft]]:
        """Add to each draft in one drafter pass; those that are still to be added to come back.

        The pass reads a guess at the next tokens too. The drafter's own choices are drafted, up to the first
        that is another one: the draft is what asking token by token would make it.
        """
        started = time.perf_counter()
        context = sum(s.drafter.cache.length for s, _ in pairs if s.drafter is not None)
        guesses = [sequence.guess(draft) for sequence, draft in pairs]
        before = [len(draft.probs) for _, draft in pairs]
        unfinished = [
            pair
            for pair, guess, probs in zip(pairs, guesses, self._ask_drafter(pairs, guesses), strict=True)
            if _extend(*pair, guess, probs)
        ]
        # The draft tokens were read off the device: the time is that of the pass, not of its launch.
        elapsed = time.perf_counter() - started
        self.costs.observe_draft(context, len(pairs), elapsed)
        for (sequence, draft), known in zip(pairs, before, strict=True):
            sequence.draft_length.observe_pass(len(draft.probs) - known)
            sequence.stats.draft_s += elapsed
        return unfinished

    def _ask_drafter(
        self, pairs: Sequence[tuple[SequenceState, Draft]], guesses: Sequence[list[int]]
    ) -> list[Tensor]:
        """Read q behind each draft and each longer part of its guess, ``[guess + 1, vocab]``, in one pass."""
        assert self.drafter is not None
        steps = []
        for (sequence, draft), guess in zip(pairs, guesses, strict=True):
            assert sequence.drafter is not None
            unread = sequence.drafter.unread_with([*draft.tokens, *guess])
            num_logits = len(guess) + 1
            if sequence.skipped:
                # Forced tokens may lie between.
                num_logits += len(sequence.skipped) + len(draft.tokens)
            steps.append(Step(sequence.drafter.cache, unread, num_logits))
        # Models that override the pass need not know of graphs.
        graphs = () if self._graphs is None else (self._graphs,)
        logits = self.drafter.forward(steps, *graphs)[:, : self.vocab_size].to(self.target.device)
        rows = torch.split(logits, [step.num_logits for step in steps])
        probs = []
        for (sequence, draft), guess, own in zip(pairs, guesses, rows, strict=True):
            assert sequence.drafter is not None
            sequence.stats.drafter_passes += 1
            q = sequence.process(own, sequence.drafter, [*draft.tokens, *guess]).softmax(-1)
            sequence.catch_up(q[: len(sequence.skipped)])
            probs.append(q[-len(guess) - 1 :])
        return probs

    def verify(self, batch: Sequence[SequenceState], drafts: Sequence[Draft]) -> list[VerificationResult]:
        """Score every draft in one target pass, and see how much of each stands."""
        started = time.perf_counter()
        context = sum(sequence.target.cache.length for sequence in batch)
        steps = [
            Step(sequence.target.cache, sequence.target.unread_with(draft.tokens), len(draft.tokens) + 1)
            for sequence, draft in zip(batch, drafts, strict=True)
        ]
        sizes = [step.num_logits for step in steps]
        rows = torch.split(self.target.forward(steps)[:, : self.vocab_size], sizes)
        verdicts = [
            _judge(sequence, draft, sequence.process(logits, sequence.target, draft.tokens))
            for sequence, draft, logits in zip(batch, drafts, rows, strict=True)
        ]
        # The verdicts were read off the device: the time is that of the pass, not of its launch.
        elapsed = time.perf_counter() - started
        self.costs.observe_verify(context, len(batch), sum(sizes), elapsed)
        for sequence in batch:
            sequence.stats.verify_s += elapsed
        return verdicts

    def emit(
        self, batch: Sequence[SequenceState], drafts: Sequence[Draft], verdicts: Sequence[VerificationResult]
    ) -> list[tuple[list[int], int]]:
        """Draw the bonus tokens that need the drafter, and put the answer's new tokens together.

        Returns:
            For each sequence its new tokens (cut behind an end-of-sequence token) and how many draft tokens
            stood.
        """
        open_bonus = [
            (sequence, draft, verdict)
            for sequence, draft, verdict in zip(batch, drafts, verdicts, strict=True)
            if verdict.next_token is None
        ]
        unread = [(s, draft) for s, draft, _ in open_bonus if len(draft.probs) == len(draft.tokens)]
        started = time.perf_counter()
        if unread:
            for (_, draft), probs in zip(unread, self._ask_drafter(unread, [[]] * len(unread)), strict=True):
                draft.probs.append(probs[0])
        for sequence, draft, verdict in open_bonus:
            verdict.next_token = _draw_bonus(sequence, draft, verdict)
        elapsed = time.perf_counter() - started
        for sequence, _ in unread:
            sequence.stats.draft_s += elapsed
        emitted = []
        for draft, verdict in zip(drafts, verdicts, strict=True):
            tokens = draft.tokens[: verdict.num_accepted]
            if verdict.next_token is not None and verdict.next_token >= 0:
                tokens.append(verdict.next_token)
            emitted.append((tokens, verdict.num_accepted))
        return emitted

    def rollback(
        self,
        batch: Sequence[SequenceState],
        drafts: Sequence[Draft],
        verdicts: Sequence[VerificationResult],
        emitted: Sequence[tuple[list[int], int]],
    ) -> None:
        """Append what was emitted, drop rejected draft tokens from both caches, keep the counts."""
        for sequence, draft, verdict, (tokens, num_accepted) in zip(
            batch, drafts, verdicts, emitted, strict=True
        ):
            for track in (sequence.target, sequence.drafter):
                if track is not None:
                    # The caches may hold the whole draft: only what stood is the sequence's.
                    track.cache.rollback(len(track.tokens) + num_accepted)
                    track.tokens.extend(tokens)
                    track.settle()
            sequence.num_emitted += len(tokens)
            if sequence.adaptive is not None:
                # Positions count in their order: those that were forced behind skipped ones wait, too.
                known = [] if sequence.skipped else verdict.overlaps[: len(tokens)]
                sequence.adaptive.observe(known)
                sequence.stats.agreement = sequence.adaptive.agreement
                sequence.skipped.extend(verdict.logits[len(known) : len(tokens)])
            for position, (confidence, proposal) in draft.proposed.items():
                # What stood behind a rejected token was never looked at, and a token that is drawn on its own
                # need not be the proposal, however good that was.
                drafted = position < len(draft.tokens) or sequence.sampler.greedy or sequence.reads_bonus
                if position < len(tokens) and drafted:
                    sequence.draft_length.observe(confidence, float(proposal == tokens[position]))
            num_forced = sum(position < num_accepted for position in draft.forced)
            sequence.stats.rounds += 1
            sequence.stats.drafted_tokens += len(draft.tokens) - len(draft.forced)
            sequence.stats.accepted_tokens += num_accepted - num_forced
            sequence.stats.forced_tokens += num_forced
            sequence.stats.completion_tokens += len(tokens)
            sequence.stats.token_sources += _sources(draft, len(tokens), num_accepted)


def _sources(draft: Draft, num_emitted: int, num_accepted: int) -> str:
    """Where each token that a round emitted comes from, as :attr:`RapidStats.token_sources` has it."""
    forced = set(draft.forced)
    stood = "".join("f" if position in forced else "d" for position in range(num_accepted))
    return stood.ljust(num_emitted, "t")


def _extend(sequence: SequenceState, draft: Draft, guess: Sequence[int], probs: Tensor) -> bool:
    """Draft the drafter's choices along a guess that it has read; false when the draft is complete.

    Args:
        sequence: Whose draft.
        draft: Extended by at least one token, unless the drafter is unsure at once.
        guess: The tokens that were read behind the draft.
        probs: q, ``[guess + 1, vocab]``.
    """
    track = sequence.drafter
    assert track is not None
    confidences, likeliest = probs.max(-1)
    if sequence.sampler.greedy:
        choices = likeliest
    else:
        position = sequence.num_emitted + len(draft.tokens)
        choices = sample_tokens(probs, sequence.sampler.uniforms(position, len(probs), DRAFT))
    # One read off the device; token ids are exact in float64.
    known = torch.stack([confidences.double(), choices.double()], dim=1).tolist()
    finished = False
    for row, guessed, (confidence, choice) in zip(probs, [*guess, None], known, strict=True):
        token = int(choice)
        draft.proposed[len(draft.probs)] = (confidence, token)
        draft.probs.append(row)
        finished = draft.complete(sequence.eos_token_ids) or not sequence.draft_length.keeps(confidence)
        if finished:
            break
        draft.tokens.append(token)
        if token != guessed:
            break
    if guess and sequence.lookup is not None:
        right = next((at for at, guessed in enumerate(guess) if known[at][1] != guessed), len(guess))
        sequence.lookup.observe(len(guess), right)
    # What follows a wrong guess was never drafted; the last draft token is still to be read.
    track.cache.rollback(len(track.tokens) + len(draft.tokens) - (0 if finished else 1))
    if finished or draft.complete(sequence.eos_token_ids):
        return False
    return sequence.draft_length.goes_on()
