"""Acceptance: which draft tokens are kept, and the correction or bonus token that follows them.

Greedy and sampled decoding have a function each, :func:`accept_greedy` and :func:`accept_sampled`. Both
compare the draft with the *verification distribution*: p (``"lossless"``), p̂ (``"augmented"``, ``"paper"``)
or the mixture. The formulas are in :mod:`rapid_integrations.engine.decoding.verification`.
``README.md`` in this folder describes how to add an acceptance rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from operator import eq

import torch
from torch import Tensor

from rapid_integrations.engine.cache.model_state import ModelState
from rapid_integrations.engine.decoding.sampling import ACCEPT, CORRECT, DRAFT
from rapid_integrations.engine.decoding.sequence import Draft, SequenceState
from rapid_integrations.engine.decoding.skipping import TargetMargin, is_decided
from rapid_integrations.engine.decoding.verification import (
    augmented_target_logits,
    correction_probs,
    count_accepted,
    mixture_logits,
    sample_tokens,
)
from rapid_integrations.errors import GenerationError


@dataclass(slots=True)
class VerificationResult:
    """The outcome of verifying one draft.

    Attributes:
        target_logits: The target's processed logits z, ``[draft tokens + 1, vocab]``.
        num_accepted: Number of leading draft tokens that are accepted.
        next_token: The correction or bonus token. ``None`` where none follows, because the draft ends the
            answer, or where the bonus token still has to be drawn.
        overlaps: ``Σ min(p, q)`` at the draft's positions; empty where the transfer strength is fixed.
        bonus_needs_drafter: Whether the bonus token has to be drawn with q at its position.
    """

    target_logits: Tensor
    num_accepted: int
    next_token: int | None
    overlaps: list[float]
    bonus_needs_drafter: bool = False


def verification_logits(
    sequence: SequenceState,
    target_logits: Tensor,
    draft_probs: Tensor,
    *,
    pending_overlaps: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """The distribution that draft tokens are accepted against, as logits.

    Args:
        sequence: The request; its acceptance rule and transfer strength apply.
        target_logits: z, the target's processed logits at the next positions, ``[positions, vocab]``.
        draft_probs: q, same shape.
        pending_overlaps: Overlaps at draft positions before these that are not observed yet.

    Returns:
        Logits of p, p̂ or the mixture, same shape; and the overlaps of p and q, ``[positions]``, empty where
        the transfer strength is fixed.
    """
    no_overlaps = target_logits.new_empty(0)
    speculation = sequence.speculation
    if speculation.acceptance == "mixture":
        mixed = mixture_logits(target_logits, draft_probs, target_weight=speculation.mixture_weight)
        return mixed, no_overlaps
    strength: float | Tensor = sequence.transfer_strength
    overlaps, target_probs = no_overlaps, None
    if sequence.adaptive is not None:
        target_probs = target_logits.softmax(-1)
        strength, overlaps = sequence.adaptive.strengths(
            target_probs, draft_probs, pending_overlaps=pending_overlaps
        )
    augmented = augmented_target_logits(
        target_logits,
        draft_probs,
        transfer_strength=strength,
        tail_rule=speculation.tail_rule,
        target_probs=target_probs,
    )
    return augmented, overlaps


def accept_draft(sequence: SequenceState, draft: Draft, target_logits: Tensor) -> VerificationResult:
    """Accept leading draft tokens and choose the token after them.

    Args:
        sequence: The request.
        draft: Its draft of any length, also none.
        target_logits: z, the target's processed logits, ``[draft tokens + 1, vocab]``.

    Raises:
        GenerationError: A distribution that decides a token is not finite, or the constraint allows no token.
    """
    if draft.repetition is not None:
        return accept_looked_up(sequence, draft, target_logits)
    draft_probs = draft.token_probs(like=target_logits)
    if draft.tokens:
        check_draft_probs(sequence, draft_probs)
    accept = accept_greedy if sequence.sampler.greedy else accept_sampled
    result = accept(sequence, draft, target_logits, draft_probs)
    if result.num_accepted == len(draft.tokens):
        if draft.ends_with(sequence.eos_token_ids):
            result.next_token = None
        elif sequence.bonus_uses_drafter and (
            draft.knows_bonus_probs
            or not is_decided(sequence, TargetMargin.of(target_logits[-1]), len(draft.tokens))
        ):
            result.next_token, result.bonus_needs_drafter = None, True
    return result


def accept_greedy(
    sequence: SequenceState, draft: Draft, target_logits: Tensor, draft_probs: Tensor
) -> VerificationResult:
    """Accept draft tokens while each is the most likely token of the verification distribution.

    This is the limit of :func:`accept_sampled` for temperature 0. The first other choice is the correction
    token; after the whole draft the target's most likely token is the bonus token.
    """
    count = len(draft.tokens)
    verify_logits, overlaps = verification_logits(sequence, target_logits[:count], draft_probs)
    best = torch.cat([verify_logits, target_logits[count:]]).max(-1)
    max_logits, choices, known_overlaps = _to_lists(best.values, best.indices, overlaps)
    num_accepted = sum(1 for _ in takewhile(bool, map(eq, choices, draft.tokens)))
    _check_finite(sequence, draft, max_logits, num_accepted)
    return VerificationResult(target_logits, num_accepted, int(choices[num_accepted]), known_overlaps)


def accept_looked_up(sequence: SequenceState, draft: Draft, target_logits: Tensor) -> VerificationResult:
    """Accept tokens from the prompt, for which q is unknown, while each is the target's choice for any q.

    At the first position where q could change the choice, the draft ends, and the token there is drawn like a
    bonus token.
    """
    count = len(draft.tokens)
    best = target_logits.max(-1)
    max_logits, choices = _to_lists(best.values, best.indices)
    num_accepted = sum(1 for _ in takewhile(bool, map(eq, choices, draft.tokens)))
    if sequence.bonus_uses_drafter:
        for position in range(num_accepted + 1):
            if not is_decided(sequence, TargetMargin.of(target_logits[position]), position):
                _check_finite(sequence, draft, max_logits, position)
                del draft.tokens[position:]
                return VerificationResult(target_logits[: position + 1], position, None, [], True)
    _check_finite(sequence, draft, max_logits, num_accepted)
    return VerificationResult(target_logits[: count + 1], num_accepted, int(choices[num_accepted]), [])


def accept_sampled(
    sequence: SequenceState, draft: Draft, target_logits: Tensor, draft_probs: Tensor
) -> VerificationResult:
    """Accept draft tokens by rejection sampling: ``u <= min(1, p̂(x) / q(x))`` (arXiv:2502.20330 Alg. 1).

    The first rejected token is replaced by a correction token drawn from the residual distribution; after the
    whole draft the bonus token is drawn from p.
    """
    count, position = len(draft.tokens), sequence.num_emitted
    verify_logits, overlaps = verification_logits(sequence, target_logits[:count], draft_probs)
    verify_probs, num_accepted = verify_logits.softmax(-1), 0
    if count:
        draft_tokens = torch.tensor(draft.tokens, device=target_logits.device)
        uniforms = sequence.sampler.uniforms(position, count, ACCEPT)
        num_accepted = int(count_accepted(draft_tokens, draft_probs, verify_probs, uniforms))
    _check_finite(sequence, draft, target_logits.amax(-1).tolist(), num_accepted)
    target_probs = target_logits[num_accepted].softmax(-1)[None]
    if num_accepted < count:
        row = slice(num_accepted, num_accepted + 1)
        next_probs = correction_probs(
            sequence.speculation.acceptance, target_probs, verify_probs[row], draft_probs[row]
        )
    else:
        next_probs = target_probs
    uniforms = sequence.sampler.uniforms(position + num_accepted, 1, CORRECT)
    next_token = int(sample_tokens(next_probs, uniforms))
    return VerificationResult(target_logits, num_accepted, next_token, overlaps.tolist())


def draw_bonus_token(sequence: SequenceState, draft: Draft, result: VerificationResult) -> int:
    """Draw the bonus token with q at its position, as if one more token had been drafted and verified.

    Rounds therefore leave no trace in the output. The draft's proposals and the result's overlaps are
    extended by the bonus position.

    Args:
        sequence: The request.
        draft: Its draft, with q at the bonus position.
        result: The whole draft is accepted.

    Raises:
        GenerationError: q is not finite.
    """
    target_logits = result.target_logits[result.num_accepted :]
    draft_probs = draft.probs[-1][None]
    check_draft_probs(sequence, draft_probs)
    verify_logits, overlaps = verification_logits(
        sequence, target_logits, draft_probs, pending_overlaps=result.overlaps
    )
    confidence, proposal = draft_probs.max(-1)
    if sequence.sampler.greedy:
        choice = verify_logits.argmax(-1)
    else:
        position = sequence.num_emitted + result.num_accepted
        draft_u, accept_u, correct_u = (
            sequence.sampler.uniforms(position, 1, purpose) for purpose in (DRAFT, ACCEPT, CORRECT)
        )
        verify_probs = verify_logits.softmax(-1)
        choice = proposal = sample_tokens(draft_probs, draft_u)
        if not int(count_accepted(proposal, draft_probs, verify_probs, accept_u)):
            residual = correction_probs(
                sequence.speculation.acceptance, target_logits.softmax(-1), verify_probs, draft_probs
            )
            choice = sample_tokens(residual, correct_u)
    (token,), (sure,), (proposed,), known_overlaps = _to_lists(choice, confidence, proposal, overlaps)
    draft.proposals[result.num_accepted] = (sure, int(proposed))
    result.overlaps += known_overlaps
    return int(token)


def check_draft_probs(sequence: SequenceState, draft_probs: Tensor) -> None:
    """Refuse a drafter that is not finite, if it influences the output.

    Where draft tokens are only accepted or rejected by p, a broken drafter costs speed and nothing more.

    Raises:
        GenerationError: q, ``[positions, vocab]``, is not finite and the drafter steers.
    """
    if sequence.speculation.drafter_steers and not bool(draft_probs[:, 0].isfinite().all()):
        assert sequence.drafter is not None
        raise _not_finite("drafter", sequence.drafter)


def _to_lists(*tensors: Tensor) -> list[list[float]]:
    """One-dimensional tensors as lists, in one transfer from the device.

    Token ids are exact in float64.
    """
    values = iter(torch.cat([tensor.double() for tensor in tensors]).tolist())
    return [list(islice(values, len(tensor))) for tensor in tensors]


def _check_finite(
    sequence: SequenceState, draft: Draft, max_logits: Sequence[float], num_accepted: int
) -> None:
    """Raise if a row of logits that decides a token has no finite maximum."""
    num_finite = sum(1 for _ in takewhile(math.isfinite, max_logits))
    if num_finite > num_accepted:
        return
    draft_tokens = draft.tokens[:num_finite]
    allowed = sequence.allowed(draft_tokens)
    if allowed is None or bool(allowed.any()):
        raise _not_finite("target", sequence.target)
    raise GenerationError(
        f"the output format allows no token after the first {sequence.num_emitted + num_finite:,} of the "
        "answer: the vocabulary cannot spell the text that it asks for, or its grammar grew too complex. "
        "Simplify it, or ask for other text."
    )


def _not_finite(model: str, state: ModelState) -> GenerationError:
    return GenerationError(
        f"the {model}'s logits after {len(state.tokens):,} tokens are not finite: the model overflowed. Load "
        "it in another dtype, or store keys and values in one (dtype or kv_dtype 'bfloat16' or 'float32')."
    )
