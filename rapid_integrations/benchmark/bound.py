"""How fast speculation could be at most, from what the run itself measured, and how near it came."""

from __future__ import annotations

from dataclasses import dataclass

from rapid_integrations.engine.stats import RapidStats

_BISECTIONS = 60


@dataclass(frozen=True, slots=True)
class SpeedBound:
    """The bound on the speed-up over plain decoding, and what was reached.

    A round that drafts gamma tokens, each of which stands with chance alpha given that those before it did,
    yields in expectation ``E = (1 - alpha^(gamma+1)) / (1 - alpha)`` tokens (arXiv:2211.17192 Eq. 1). Its
    target pass costs at least as much as that of plain decoding, a target step. With c the cost of a drafted
    token and o what the host adds to a round, both in target steps, speculation is at most
    ``E / (1 + gamma*c + o)`` times as fast as one token per target step (arXiv:2211.17192 Theorem 3.8, with
    the host's overhead added).

    Attributes:
        acceptance: alpha.
        num_draft_tokens: gamma, the mean draft length.
        expected_tokens: E.
        target_step_s: Seconds of a plain target pass over the same context.
        draft_cost: c. Drafter passes that only read a token for the bonus position are counted in.
        host_cost: o, all of a round that is neither drafting nor verification.
        speed_up: The bound.
        reached: Tokens per target step that came out.
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
        """Reached over bound."""
        return self.reached / self.speed_up

    @classmethod
    def of(cls, stats: RapidStats, plain: RapidStats) -> SpeedBound | None:
        """The bound of requests that were decoded one at a time.

        Args:
            stats: Of speculative decoding.
            plain: Of the same engine's plain decoding over the same documents.

        Returns:
            ``None`` where nothing was drafted or nothing decoded plainly.
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
    """Tokens a round yields in expectation; draft length and acceptance as in :class:`SpeedBound`.

    Args:
        acceptance: alpha in [0, 1].
        num_draft_tokens: gamma >= 0, any mean.
    """
    if acceptance >= 1:
        return num_draft_tokens + 1
    return float((1 - acceptance ** (num_draft_tokens + 1)) / (1 - acceptance))


def conditional_acceptance(accepted_per_round: float, num_draft_tokens: float) -> float:
    """alpha, from how many of gamma drafted tokens stood on average.

    Accepted over drafted tokens would understate it: tokens behind a rejected one were never tried. It solves
    ``expected_tokens(alpha, gamma) - 1 = accepted_per_round``, whose left side grows with alpha.

    Args:
        accepted_per_round: In [0, num_draft_tokens].
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
