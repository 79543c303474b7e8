"""The bound on the speed of speculative decoding, computed from costs that the run itself measured."""

from __future__ import annotations

from dataclasses import dataclass

from rapid_integrations.engine.stats import RapidStats

_BISECTIONS = 60


@dataclass(frozen=True, slots=True)
class SpeedBound:
    """The bound on the speed-up over plain decoding, and the speed-up that was reached.

    A round that drafts gamma tokens, each accepted with probability alpha if those before it were, yields in
    expectation ``E = (1 - alpha^(gamma+1)) / (1 - alpha)`` tokens (arXiv:2211.17192 Eq. 1). Its
    target pass takes at least as long as a pass of plain decoding, called a target step. With c the cost of a
    drafted token and o the host's overhead per round, both in target steps, speculation is at most
    ``E / (1 + gamma*c + o)`` times as fast as one token per target step (arXiv:2211.17192 Theorem 3.8, with
    the host's overhead added).

    Attributes:
        acceptance: alpha.
        num_draft_tokens: gamma, the mean draft length.
        expected_tokens: E.
        target_step_s: Seconds of a plain target pass over the same context.
        draft_cost: c. It includes drafter passes that only read the token before the bonus position.
        host_cost: o, the part of a round that is neither drafting nor verification.
        speed_up: The bound.
        reached: The measured number of tokens per target step.
    """

    acceptance: float
    num_draft_tokens: float
    expected_tokens: float
    target_step_s: float
    draft_cost: float
    host_cost: float
    speed_up: float
    reached: float

    @property
    def share(self) -> float:
        """The reached fraction of the bound."""
        return self.reached / self.speed_up

    @classmethod
    def of(cls, stats: RapidStats, plain: RapidStats) -> SpeedBound | None:
        """The bound of requests that were decoded one at a time.

        Args:
            stats: Statistics of speculative decoding.
            plain: Statistics of the same engine's plain decoding over the same documents.

        Returns:
            ``None`` if nothing was drafted, or if plain decoding was not measured.
        """
        if not (stats.drafted_tokens and stats.rounds and stats.decode_s and plain.rounds and plain.verify_s):
            return None
        step = plain.verify_s / plain.rounds
        gamma = stats.drafted_tokens / stats.rounds
        alpha = conditional_acceptance(stats.accepted_tokens / stats.rounds, gamma)
        expected = expected_tokens(alpha, gamma)
        draft_cost = stats.draft_s / stats.drafted_tokens / step
        host_cost = host_s(stats) / stats.rounds / step
        return cls(
            acceptance=alpha,
            num_draft_tokens=gamma,
            expected_tokens=expected,
            target_step_s=step,
            draft_cost=draft_cost,
            host_cost=host_cost,
            speed_up=expected / (1 + gamma * draft_cost + host_cost),
            reached=stats.completion_tokens / stats.decode_s * step,
        )


def host_s(stats: RapidStats) -> float:
    """Seconds of decoding that are neither drafting nor verification."""
    return max(0.0, stats.decode_s - stats.draft_s - stats.verify_s)


def expected_tokens(acceptance: float, num_draft_tokens: float) -> float:
    """The expected number of tokens of a round, E of :class:`SpeedBound`.

    Args:
        acceptance: alpha in [0, 1].
        num_draft_tokens: gamma >= 0, a mean that need not be whole.
    """
    if acceptance >= 1:
        return num_draft_tokens + 1
    return float((1 - acceptance ** (num_draft_tokens + 1)) / (1 - acceptance))


def conditional_acceptance(accepted_per_round: float, num_draft_tokens: float) -> float:
    """The probability alpha that a drafted token is accepted if those before it were.

    The ratio of accepted to drafted tokens would understate it, because tokens after a rejected one are not
    verified. alpha solves ``expected_tokens(alpha, gamma) - 1 = accepted_per_round``. The left side grows
    with alpha.

    Args:
        accepted_per_round: The mean number of accepted tokens, in [0, num_draft_tokens].
        num_draft_tokens: gamma > 0.

    Returns:
        alpha in [0, 1].
    """
    low, high = 0.0, 1.0
    if accepted_per_round >= num_draft_tokens:
        return 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if expected_tokens(middle, num_draft_tokens) - 1 < accepted_per_round:
            low = middle
        else:
            high = middle
    return (low + high) / 2
