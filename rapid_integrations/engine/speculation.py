"""One round over a batch: draft → verify → emit → rollback.

Self-speculation (the drafter is the target on a shorter prompt), downward speculation (a smaller drafter) and
upward speculation (a larger one) are the same code, and so is plain decoding: a draft of no tokens.

Between rounds every sequence satisfies: each cache holds a prefix of its model's tokens, at least the last
token is still to be read, and nothing of a draft is left. A round that raises leaves that state as it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from operator import eq

import torch
from torch import Tensor

from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.adaptive_transfer import AdaptiveTransfer, overlap
from rapid_integrations.engine.constraint import TokenConstraint
from rapid_integrations.engine.draft_length import DraftLength, RoundCosts
from rapid_integrations.engine.graphs import GraphedPasses
from rapid_integrations.engine.kv import SequenceKV
from rapid_integrations.engine.lookup import NGramLookup
from rapid_integrations.engine.model import CausalModel, Step
from rapid_integrations.engine.sampling import ACCEPT, CORRECT, DRAFT, Sampler
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.engine.verification import (
    Lead,
    augmented_target_logits,
    correction_probs,
    count_accepted,
    leading_matches,
    mixture_logits,
    sample_tokens,
)
from rapid_integrations.errors import GenerationError

# Positions of which the logits are kept until the drafter is asked: megabytes, at 150,000 tokens.
_MOST_SKIPPED = 32


@dataclass(slots=True)
class Track:
    """One model's view of a sequence.

    Attributes:
        tokens: Prompt and answer so far.
        cache: Holds a prefix of them.
    """

    tokens: list[int]
    cache: SequenceKV

    @property
    def unread(self) -> list[int]:
        """The tokens that are not in the cache yet."""
        return self.tokens[self.cache.length :]

    def unread_with(self, draft_tokens: list[int]) -> list[int]:
        """The tokens that are not in the cache yet, a draft behind them included."""
        beyond = self.cache.length - len(self.tokens)
        return draft_tokens[beyond:] if beyond >= 0 else self.unread + draft_tokens

    def settle(self) -> None:
        """Drop what a draft left in the cache, and keep the last token to be read."""
        self.cache.rollback(len(self.tokens) - 1)


@dataclass(slots=True)
class Decoding:
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
        grounding: How far the drafter has read what the question is about, the first agreement that the
            transfer strength is lowered by: :func:`rapid_integrations.engine.adaptive_transfer.grounding`.
        num_emitted: Tokens of the answer so far.
        constraint: Limits the answer's tokens; ``None`` does not.
        lookup: Guesses at what the drafter proposes; ``None`` without one.
        adaptive: Lowers the transfer strength; ``None`` keeps it fixed.
        skipped: The target's processed logits, ``[vocab]`` each, at the last positions of the answer, where
            the drafter was not asked as it could not change the choice, and at those that were forced behind
            them. How far it agreed there is found out when it is asked next.
    """

    target: Track
    drafter: Track | None
    sampler: Sampler
    sampling: SamplingParams
    speculation: SpeculationParams
    draft_length: DraftLength
    eos_token_ids: frozenset[int]
    stats: RapidStats
    grounding: float = 1.0
    num_emitted: int = 0
    constraint: TokenConstraint | None = None
    lookup: NGramLookup | None = field(init=False, default=None)
    adaptive: AdaptiveTransfer | None = field(init=False, default=None)
    skipped: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.drafter is not None:
            if self.speculation.adapts:
                self.adaptive = AdaptiveTransfer(self.transfer_strength, self.grounding)
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

    def process(self, logits: Tensor, track: Track, draft_tokens: Sequence[int]) -> Tensor:
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

    def decided(self, lead: Lead, count: int) -> bool:
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


@dataclass(slots=True)
class Verdict:
    """What verification made of a draft.

    Attributes:
        logits: The target's processed logits, ``[draft tokens + 1, vocab]``.
        num_accepted: Leading draft tokens that stand.
        next_token: The correction or bonus token; ``None`` while the bonus needs the drafter's distribution.
        overlaps: Of p and q at the positions where both are known; empty where the transfer strength is
            fixed.
    """

    logits: Tensor
    num_accepted: int
    next_token: int | None
    overlaps: list[float]


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

    def round(self, batch: Sequence[Decoding]) -> list[list[int]]:
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

    def draft(self, batch: Sequence[Decoding]) -> list[Draft]:
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

    def _draft_forced(self, sequence: Decoding, draft: Draft) -> bool:
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

    def _propose(self, pairs: Sequence[tuple[Decoding, Draft]]) -> list[tuple[Decoding, Draft]]:
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
        self, pairs: Sequence[tuple[Decoding, Draft]], guesses: Sequence[list[int]]
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

    def verify(self, batch: Sequence[Decoding], drafts: Sequence[Draft]) -> list[Verdict]:
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
        self, batch: Sequence[Decoding], drafts: Sequence[Draft], verdicts: Sequence[Verdict]
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
        batch: Sequence[Decoding],
        drafts: Sequence[Draft],
        verdicts: Sequence[Verdict],
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


def _extend(sequence: Decoding, draft: Draft, guess: Sequence[int], probs: Tensor) -> bool:
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


# Stands for "nothing follows": the draft ended with an accepted end-of-sequence token.
_NOTHING = -1


def _judge(sequence: Decoding, draft: Draft, logits: Tensor) -> Verdict:
    """Accept draft tokens and draw the correction token; a bonus that needs q stays open."""
    count = len(draft.tokens)
    verify_logits, draft_probs, overlaps = logits[:count], logits[:0], logits.new_empty(0)
    if count:
        draft_probs = torch.stack(draft.probs[:count])
        _check_draft_probs(sequence, draft_probs)
        verify_logits, overlaps = sequence.augment(verify_logits, draft_probs)
    # Where q is there already it is used: skipping it would save nothing.
    asks = sequence.reads_bonus and len(draft.probs) == count
    lead = Lead.of(logits[count:]) if asks else logits.new_empty(0)
    if sequence.sampler.greedy:
        # Rows behind the draft tokens hold the target's own choice at the bonus position.
        heights, best = torch.cat([verify_logits, logits[count:]]).max(-1)
        # One read off the device; token ids are exact in float32 up to 2**24.
        read = torch.cat([overlaps, heights, best, lead]).tolist()
        known, read = read[: len(overlaps)], read[len(overlaps) :]
        choices = [int(choice) for choice in read[count + 1 : 2 * (count + 1)]]
        # A row that is not finite has no choice: every row that decided counts.
        num_finite = _leading(math.isfinite(height) for height in read[: count + 1])
        num_accepted = _leading(map(eq, choices, draft.tokens))
        if num_finite <= num_accepted:
            raise _no_choice(sequence, draft.tokens[:num_finite])
        if num_accepted < count:
            return Verdict(logits, num_accepted, choices[num_accepted], known)
        if count and draft.tokens[-1] in sequence.eos_token_ids:
            return Verdict(logits, count, _NOTHING, known)
        if sequence.reads_bonus and not (asks and sequence.decided(Lead(*read[-3:]), count)):
            return Verdict(logits, count, None, known)
        return Verdict(logits, count, choices[count], known)
    known, position = overlaps.tolist(), sequence.num_emitted
    num_accepted, num_finite = 0, int(leading_matches(logits.amax(-1).isfinite()))
    if count:
        verify_probs = verify_logits.softmax(-1)
        draft_tokens = torch.tensor(draft.tokens, device=logits.device)
        uniforms = sequence.sampler.uniforms(position, count, ACCEPT)
        num_accepted = int(count_accepted(draft_tokens, draft_probs, verify_probs, uniforms))
    if num_finite <= num_accepted:
        raise _no_choice(sequence, draft.tokens[:num_finite])
    if count:
        if num_accepted < count:
            row = slice(num_accepted, num_accepted + 1)
            residual = correction_probs(
                sequence.speculation.acceptance,
                logits[row].softmax(-1),
                verify_probs[row],
                draft_probs[row],
            )
            uniforms = sequence.sampler.uniforms(position + num_accepted, 1, CORRECT)
            return Verdict(logits, num_accepted, int(sample_tokens(residual, uniforms)), known)
        if draft.tokens[-1] in sequence.eos_token_ids:
            return Verdict(logits, count, _NOTHING, known)
    if sequence.reads_bonus and not (asks and sequence.decided(Lead(*lead.tolist()), count)):
        return Verdict(logits, count, None, known)
    uniforms = sequence.sampler.uniforms(position + count, 1, CORRECT)
    return Verdict(logits, count, int(sample_tokens(logits[count:].softmax(-1), uniforms)), known)


def _leading(matches: Iterable[bool]) -> int:
    """The length of the leading run of true values."""
    return sum(1 for _ in takewhile(bool, matches))


def _draw_bonus(sequence: Decoding, draft: Draft, verdict: Verdict) -> int:
    """The bonus token where q is known: drawn as if it had been drafted, so that rounds leave no trace."""
    logits = verdict.logits[verdict.num_accepted :]
    probs = draft.probs[-1][None]
    _check_draft_probs(sequence, probs)
    verify_logits, overlaps = sequence.augment(logits, probs, behind=verdict.overlaps)
    confidences, likeliest = probs.max(-1)
    if sequence.sampler.greedy:
        *known, best, confidence, proposal = torch.cat(
            [overlaps.double(), verify_logits.argmax(-1), confidences, likeliest]
        ).tolist()
        verdict.overlaps += known
        draft.proposed[verdict.num_accepted] = (confidence, int(proposal))
        return int(best)
    verdict.overlaps += overlaps.tolist()
    position = sequence.num_emitted + verdict.num_accepted
    uniforms = [sequence.sampler.uniforms(position, 1, purpose) for purpose in (DRAFT, ACCEPT, CORRECT)]
    verify_probs = verify_logits.softmax(-1)
    proposed = sample_tokens(probs, uniforms[DRAFT])
    draft.proposed[verdict.num_accepted] = (float(confidences), int(proposed))
    if int(count_accepted(proposed, probs, verify_probs, uniforms[ACCEPT])):
        return int(proposed)
    residual = correction_probs(sequence.speculation.acceptance, logits.softmax(-1), verify_probs, probs)
    return int(sample_tokens(residual, uniforms[CORRECT]))


def _check_draft_probs(sequence: Decoding, probs: Tensor) -> None:
    """Refuse to be steered by a broken drafter; one that is only accepted from does no harm."""
    if sequence.speculation.drafter_steers and not bool(probs[:, 0].isfinite().all()):
        assert sequence.drafter is not None
        raise _not_finite("drafter", sequence.drafter)


def _no_choice(sequence: Decoding, draft_tokens: list[int]) -> GenerationError:
    """Why the target could choose nothing behind these draft tokens."""
    allowed = sequence.allowed(draft_tokens)
    if allowed is None or bool(allowed.any()):
        return _not_finite("target", sequence.target)
    return GenerationError(
        f"the output format allows no token behind the {sequence.num_emitted + len(draft_tokens):,} of the "
        "answer: it asks for text that this vocabulary cannot spell, or its grammar grew too complex. "
        "Simplify it, or ask for other text."
    )


def _not_finite(who: str, track: Track) -> GenerationError:
    return GenerationError(
        f"the {who}'s logits after {len(track.tokens):,} tokens are not finite: the model overflowed. Load "
        "it in another dtype, or hold keys and values in one (dtype or kv_dtype 'bfloat16' or 'float32')."
    )
