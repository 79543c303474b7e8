"""From answers to figures: exact match, and how sure a share of right answers, or a difference, is.

Questions about one document are not independent: what is resampled is documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rapid_integrations.errors import ConfigurationError

_RESAMPLES = 10_000
_AT_ONCE = 1_000_000
# Rounding leaves a resampled mean of equal scores this far from them, at most.
_NO_WIDTH = 1e-12


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


@dataclass(frozen=True, slots=True)
class Difference:
    """One method's mean score less another's on the same questions, with its confidence interval.

    Attributes:
        value: The difference, in [-1, 1].
        low: The interval's lower end.
        high: Its upper end.
    """

    value: float
    low: float
    high: float


def score_interval(
    scores: Sequence[float], documents: Sequence[int], *, confidence: float = 0.95, seed: int = 0
) -> Proportion:
    """Percentile bootstrap interval of a mean score, by documents.

    Whole documents are drawn with replacement, with all of their questions: the cluster bootstrap
    (A. Davison, D. Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). Few documents can
    look more alike than their questions do; questions of one document do not vary less than others. So the
    interval holds that of single questions, resampled in the same way, too. Where neither has a width, since
    all answers are right, or all wrong, it is :func:`wilson_interval`'s. It still says little of documents
    unlike the ones that were asked about, above all where there are fewer than ten.

    Args:
        scores: One a question, in [0, 1]; at least one.
        documents: For each question which document it is about.
        confidence: In (0, 1).
        seed: Of the resampling: same scores, same interval.

    Raises:
        ConfigurationError: There is no score, one is out of range, or a document is missing.
    """
    _check_scores(scores, documents)
    total = math.fsum(scores)
    bounds = _bootstrap(scores, documents, confidence, seed)
    if bounds is None:
        return wilson_interval(_whole(total), len(scores), confidence=confidence)
    return Proportion(_whole(total), len(scores), *bounds)


def score_difference(
    scores: Sequence[float],
    others: Sequence[float],
    documents: Sequence[int],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """How much better one method did than another on the same questions, with its bootstrap interval.

    The difference of each question is resampled, by documents, as in :func:`score_interval`: what makes a
    question hard for both takes nothing from how sure the difference is. Where that has no width, the
    interval comes from Wilson's for the share of questions on which the two differ: with none of n, it is
    minus to plus the upper end for 0 of n.

    Args:
        scores: One a question, in [0, 1]; at least one.
        others: The other method's, of the same questions.
        documents: For each question which document it is about.
        confidence: In (0, 1).
        seed: Of the resampling.

    Raises:
        ConfigurationError: The numbers of scores differ, there is none, one is out of range, or a document is
            missing.
    """
    if len(scores) != len(others):
        raise ConfigurationError(
            f"{len(scores)} and {len(others)} scores: both methods must have answered the same questions."
        )
    _check_scores(scores, documents)
    _check_scores(others, documents)
    differences = [score - other for score, other in zip(scores, others, strict=True)]
    value = math.fsum(differences) / len(differences)
    bounds = _bootstrap(differences, documents, confidence, seed)
    if bounds is not None:
        return Difference(value, *bounds)
    changed = wilson_interval(
        _whole(math.fsum(map(abs, differences))), len(differences), confidence=confidence
    )
    low = changed.low if value > 0 else -changed.high
    high = -changed.low if value < 0 else changed.high
    return Difference(value, low, high)


def _bootstrap(
    scores: Sequence[float], documents: Sequence[int], confidence: float, seed: int
) -> tuple[float, float] | None:
    """The percentiles of means, documents resampled and questions; ``None`` where all are the same."""
    if not 0 < confidence < 1:
        raise ConfigurationError(f"confidence={confidence} is not allowed: it must be in (0, 1).")
    by_document = _percentiles(scores, documents, confidence, seed)
    by_question = _percentiles(scores, range(len(scores)), confidence, seed)
    low, high = min(by_document[0], by_question[0]), max(by_document[1], by_question[1])
    return None if high - low < _NO_WIDTH else (low, high)


def _percentiles(
    scores: Sequence[float], clusters: Sequence[int], confidence: float, seed: int
) -> tuple[float, float]:
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sizes = np.bincount(index)
    sums = np.bincount(index, weights=np.asarray(scores, dtype=np.float64))
    rng = np.random.default_rng(seed)
    means = []
    most = max(1, _AT_ONCE // len(sizes))
    for start in range(0, _RESAMPLES, most):
        number = min(most, _RESAMPLES - start)
        drawn = rng.integers(len(sizes), size=(number, len(sizes)))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def _check_scores(scores: Sequence[float], documents: Sequence[int]) -> None:
    if not scores or len(scores) != len(documents):
        raise ConfigurationError(
            f"{len(scores)} scores of {len(documents)} questions: at least one is needed, and a document for "
            "each."
        )
    if bad := [score for score in scores if not 0 <= score <= 1]:
        raise ConfigurationError(f"the score {bad[0]} is not allowed: scores are in [0, 1].")


def _whole(total: float) -> float:
    """A sum of scores, as a whole number where it is one."""
    return int(total) if total.is_integer() else total
