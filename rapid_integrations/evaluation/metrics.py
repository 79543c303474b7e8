"""From answers to figures: exact match, and how sure a share of right answers is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from rapid_integrations.errors import ConfigurationError


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether the whole answer is one of the references, runs of whitespace counting as one space."""
    normalised = " ".join(answer.split())
    return any(normalised == " ".join(reference.split()) for reference in references)


@dataclass(frozen=True, slots=True)
class Proportion:
    """A share of successes with its confidence interval.

    Attributes:
        successes: How many; where answers are graded, the sum of their scores.
        total: Of how many, at least one.
        low: The interval's lower end, in [0, 1].
        high: Its upper end.
    """

    successes: float
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """``successes / total``."""
        return self.successes / self.total


def wilson_interval(successes: float, total: int, *, confidence: float = 0.95) -> Proportion:
    """Wilson's score interval for a binomial share.

    It stays inside [0, 1] and keeps its coverage for few questions and for shares near 0 and 1, where the
    normal approximation does not (E. B. Wilson, JASA 22, 1927). Scores between 0 and 1 vary at most as
    much as zeros and ones of the same mean do: for their sum the interval is on the safe side.

    Args:
        successes: 0 to ``total``; not whole where it sums scores.
        total: At least 1.
        confidence: In (0, 1).

    Raises:
        ConfigurationError: A number is out of range.
    """
    if not (total >= 1 and 0 <= successes <= total and 0 < confidence < 1):
        raise ConfigurationError(
            f"successes={successes}, total={total}, confidence={confidence}: allowed are total >= 1, "
            "successes from 0 to total, and a confidence in (0, 1)."
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / total
    scale = 1 + z**2 / total
    centre = (share + z**2 / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    # At the ends rounding could leave 1e-17 instead of the exact 0 or 1.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == total else centre + half
    return Proportion(successes, total, low, high)
