"""The mathematics of speculative verification: pure functions of tensors.

Glossary (arXiv:2502.20330 in brackets):

* *draft token*: proposed by the drafter from its distribution q.
* *target distribution* p: the target's own, ``softmax(z)``.
* *augmented target distribution* p̂: p shifted towards q [Eq. 6, 8].
* *mixture*: ``w·p + (1 - w)·q``.
* *verification distribution*: the one that draft tokens are accepted against: p, p̂ or the mixture.
* *accepted*: the leading draft tokens that become part of the answer.
* *correction token*: replaces the first rejected draft token. *Bonus token*: follows when all are accepted.

Four acceptance rules share these functions:

* ``"lossless"``: ordinary speculative sampling (arXiv:2211.17192); outputs are distributed as p.
* ``"augmented"``: the same procedure with p̂ in the place of p, at the bonus position too; outputs are
  distributed exactly as autoregressive sampling from p̂, whatever the draft lengths. eta may differ from
  position to position: see :mod:`rapid_integrations.engine.decoding.transfer`.
* ``"mixture"``: the same procedure with the mixture in the place of p̂; outputs are distributed exactly as
  autoregressive sampling from it.
* ``"paper"``: Alg. 1 with the residual of Eq. 10 and the bonus token from p. For eta > 0 its outputs follow
  neither p nor p̂: on toy vocabularies the total variation distance from p is 0.18-0.23 for eta = 5-50.

Every function takes ``[positions, vocab]`` float32 tensors. Random numbers are arguments: uniforms in [0, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rapid_integrations.config import Acceptance, TailRule
from rapid_integrations.errors import ShapeMismatchError

# A token is in the tail if its probability is below this share of the largest one (arXiv:2502.20330 Eq. 9).
TAIL_SHARE = 0.1


def _check_same_shape(**tensors: Tensor) -> None:
    if len({tuple(tensor.shape) for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ShapeMismatchError(f"shapes differ: {shapes}; all must be [positions, vocab] of one size.")


def augmented_target_logits(
    target_logits: Tensor,
    draft_probs: Tensor,
    *,
    transfer_strength: float | Tensor,
    tail_rule: TailRule = "none",
    target_probs: Tensor | None = None,
) -> Tensor:
    """Shift the target's logits towards the drafter's distribution.

    ``z' = z + eta * (q - p)`` with ``p = softmax(z)``, arXiv:2502.20330 Eq. 6 and 8; its softmax is p̂.
    Tokens that a logits processor removed (``-inf``) stay removed.

    Args:
        target_logits: z, ``[positions, vocab]`` float32, after logits processors (temperature included).
        draft_probs: q, same shape and device.
        transfer_strength: eta >= 0, one number for all positions or a tensor ``[positions]``. The number 0
            returns ``target_logits`` itself.
        tail_rule: ``"none"``; ``"target"`` (Eq. 9): tokens with p̂ below a tenth of the largest p̂ get p's
            weight back, and p̂ is renormalised; ``"drafter"``: only tokens with q of at least a tenth of the
            largest q are shifted.
        target_probs: p, same shape, if it has been computed already.

    Returns:
        Logits of p̂, same shape. Under ``"target"`` they are log-probabilities.

    Raises:
        ShapeMismatchError: The shapes differ.
    """
    _check_same_shape(target_logits=target_logits, draft_probs=draft_probs)
    if not isinstance(transfer_strength, Tensor):
        if transfer_strength == 0:
            return target_logits
        transfer_strength = target_logits.new_tensor([transfer_strength])
    shift = draft_probs - (target_logits.softmax(-1) if target_probs is None else target_probs)
    if tail_rule == "drafter":
        likely = draft_probs >= TAIL_SHARE * draft_probs.amax(-1, keepdim=True)
        shift = shift.where(likely, shift.new_zeros(()))
    shifted = target_logits + transfer_strength[:, None] * shift
    if tail_rule != "target":
        return shifted
    augmented = shifted.log_softmax(-1)
    unlikely = augmented < augmented.amax(-1, keepdim=True) + torch.tensor(TAIL_SHARE).log()
    return target_logits.log_softmax(-1).where(unlikely, augmented).log_softmax(-1)


def mixture_logits(target_logits: Tensor, draft_probs: Tensor, *, target_weight: float) -> Tensor:
    """Mix the two distributions, each with a fixed share.

    The softmax of the result is ``w·p + (1 - w)·q`` with ``p = softmax(z)``: the static alternative to
    :func:`augmented_target_logits`. A token drawn from q is accepted with probability ``1 - w·TV(p, q)``,
    since ``Σ min(q, w·p + (1 - w)·q) = 1 - w·Σ max(q - p, 0)``. TV is the total variation distance.

    Args:
        target_logits: z, ``[positions, vocab]`` float32, after logits processors (temperature included).
        draft_probs: q, same shape and device.
        target_weight: w in [0, 1]; 1 returns ``target_logits`` itself.

    Returns:
        Log-probabilities, same shape; ``-inf`` for tokens that neither model allows.

    Raises:
        ShapeMismatchError: The shapes differ.
    """
    _check_same_shape(target_logits=target_logits, draft_probs=draft_probs)
    if target_weight == 1:
        return target_logits
    return (target_weight * target_logits.softmax(-1) + (1 - target_weight) * draft_probs).log()


def residual_probs(
    target_probs: Tensor, draft_probs: Tensor, *, augmented_probs: Tensor | None = None
) -> Tensor:
    """The distribution that the correction token is drawn from: what q leaves of the target distribution.

    ``norm(max(p - q, 0))``; with ``augmented_probs`` the published ``norm(max(p - p̂, p - q, 0))``
    (arXiv:2502.20330 Eq. 10). For the ``"augmented"`` rule pass p̂ as ``target_probs``, for ``"mixture"`` the
    mixture.

    Args:
        target_probs: ``[positions, vocab]`` float32.
        draft_probs: q, same shape.
        augmented_probs: p̂ for the ``"paper"`` rule, same shape.

    Returns:
        ``[positions, vocab]``, each row summing to 1. Where nothing is left (p = q up to rounding) the row is
        ``target_probs``, which is the limit for equal distributions.

    Raises:
        ShapeMismatchError: The shapes differ.
    """
    _check_same_shape(target_probs=target_probs, draft_probs=draft_probs)
    residual = target_probs - draft_probs
    if augmented_probs is not None:
        _check_same_shape(target_probs=target_probs, augmented_probs=augmented_probs)
        residual = torch.maximum(residual, target_probs - augmented_probs)
    residual = residual.clamp_min(0)
    total = residual.sum(-1, keepdim=True)
    return torch.where(total > 0, residual / total, target_probs)


def sample_tokens(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution. Tokens of weight 0 are never drawn.

    Args:
        probs: ``[positions, vocab]``, non-negative, rows summing to about 1.
        uniforms: ``[positions]`` float64 in [0, 1).

    Returns:
        ``[positions]`` int64.
    """
    # float64: over a vocabulary of 150,000 a float32 running sum loses the small probabilities.
    cumulative = probs.double().cumsum(-1)
    point = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp_max(probs.shape[-1] - 1)


def count_accepted(
    draft_tokens: Tensor, draft_probs: Tensor, verify_probs: Tensor, uniforms: Tensor
) -> Tensor:
    """The number of leading draft tokens that are accepted: ``u <= min(1, p̂(x) / q(x))`` (Alg. 1).

    Args:
        draft_tokens: ``[positions]`` int64, drawn from ``draft_probs``.
        draft_probs: q, ``[positions, vocab]``.
        verify_probs: The verification distribution, same shape.
        uniforms: ``[positions]`` in [0, 1).

    Returns:
        A scalar int64 tensor in [0, positions].
    """
    _check_same_shape(draft_probs=draft_probs, verify_probs=verify_probs)
    proposed = draft_probs.gather(-1, draft_tokens[:, None])[:, 0]
    allowed = verify_probs.gather(-1, draft_tokens[:, None])[:, 0]
    return leading_matches(uniforms.to(proposed) * proposed < allowed)


def leading_matches(matches: Tensor) -> Tensor:
    """The length of the leading run of true values in ``[positions]``, a scalar int64 tensor."""
    return matches.long().cumprod(-1).sum(-1)


def correction_probs(
    acceptance: Acceptance, target_probs: Tensor, verify_probs: Tensor, draft_probs: Tensor
) -> Tensor:
    """The residual distribution under a named rule.

    Args:
        acceptance: The rule.
        target_probs: p, ``[positions, vocab]``.
        verify_probs: The verification distribution, same shape.
        draft_probs: q, same shape.

    Returns:
        ``[positions, vocab]``, rows summing to 1.
    """
    if acceptance == "paper":
        return residual_probs(target_probs, draft_probs, augmented_probs=verify_probs)
    return residual_probs(verify_probs, draft_probs)
