"""."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from operator import eq

import torch
from torch import Tensor

from rapid_integrations.engine.cache.model_state import ModelState
from rapid_integrations.engine.decoding.sampling import ACCEPT, CORRECT, DRAFT
from rapid_integrations.engine.decoding.sequence import Draft, SequenceState
from rapid_integrations.engine.decoding.verification import (
    TargetMargin,
    correction_probs,
    count_accepted,
    leading_matches,
    sample_tokens,
)
from rapid_integrations.errors import GenerationError


@dataclass(slots=True)
class VerificationResult:
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


# Stands for "nothing follows": the draft ended with an accepted end-of-sequence token.
_NOTHING = -1


def _judge(sequence: SequenceState, draft: Draft, logits: Tensor) -> VerificationResult:
    """Accept draft tokens and draw the correction token; a bonus that needs q stays open."""
    count = len(draft.tokens)
    verify_logits, draft_probs, overlaps = logits[:count], logits[:0], logits.new_empty(0)
    if count:
        draft_probs = torch.stack(draft.probs[:count])
        _check_draft_probs(sequence, draft_probs)
        verify_logits, overlaps = sequence.augment(verify_logits, draft_probs)
    # Where q is there already it is used: skipping it would save nothing.
    asks = sequence.reads_bonus and len(draft.probs) == count
    lead = TargetMargin.of(logits[count:]) if asks else logits.new_empty(0)
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
            return VerificationResult(logits, num_accepted, choices[num_accepted], known)
        if count and draft.tokens[-1] in sequence.eos_token_ids:
            return VerificationResult(logits, count, _NOTHING, known)
        if sequence.reads_bonus and not (asks and sequence.decided(TargetMargin(*read[-3:]), count)):
            return VerificationResult(logits, count, None, known)
        return VerificationResult(logits, count, choices[count], known)
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
            return VerificationResult(logits, num_accepted, int(sample_tokens(residual, uniforms)), known)
        if draft.tokens[-1] in sequence.eos_token_ids:
            return VerificationResult(logits, count, _NOTHING, known)
    if sequence.reads_bonus and not (asks and sequence.decided(TargetMargin(*lead.tolist()), count)):
        return VerificationResult(logits, count, None, known)
    uniforms = sequence.sampler.uniforms(position + count, 1, CORRECT)
    return VerificationResult(logits, count, int(sample_tokens(logits[count:].softmax(-1), uniforms)), known)


def _leading(matches: Iterable[bool]) -> int:
    """The length of the leading run of true values."""
    return sum(1 for _ in takewhile(bool, matches))


def _draw_bonus(sequence: SequenceState, draft: Draft, verdict: VerificationResult) -> int:
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


def _check_draft_probs(sequence: SequenceState, probs: Tensor) -> None:
    """Refuse to be steered by a broken drafter; one that is only accepted from does no harm."""
    if sequence.speculation.drafter_steers and not bool(probs[:, 0].isfinite().all()):
        assert sequence.drafter is not None
        raise _not_finite("drafter", sequence.drafter)


def _no_choice(sequence: SequenceState, draft_tokens: list[int]) -> GenerationError:
    """Why the target could choose nothing behind these draft tokens."""
    allowed = sequence.allowed(draft_tokens)
    if allowed is None or bool(allowed.any()):
        return _not_finite("target", sequence.target)
    return GenerationError(
        f"the output format allows no token behind the {sequence.num_emitted + len(draft_tokens):,} of the "
        "answer: it asks for text that this vocabulary cannot spell, or its grammar grew too complex. "
        "Simplify it, or ask for other text."
    )


def _not_finite(who: str, track: ModelState) -> GenerationError:
    return GenerationError(
        f"the {who}'s logits after {len(track.tokens):,} tokens are not finite: the model overflowed. Load "
        "it in another dtype, or hold keys and values in one (dtype or kv_dtype 'bfloat16' or 'float32')."
    )
