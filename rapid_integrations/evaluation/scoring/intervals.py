"""Confidence intervals of mean scores and of differences between two methods.

Questions about one document are not independent. The bootstrap therefore resamples documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rapid_integrations.errors import ConfigurationError

_RESAMPLES = 10_000
# Resampled scores held in memory at a time.
_MAX_DRAWN = 1_000_000
# An interval narrower than this has no width: resampled means of equal scores differ only by rounding.
_MIN_WIDTH = 1e-12


@dataclass(frozen=True, slots=True)
class Proportion:
    """A share of successes with its confidence interval.

    Attributes:
        successes: Number of successes, or the sum of graded scores.
        total: Number of trials, at least one.
        low: The interval's lower end, in [0, 1].
        high: The interval's upper end, in [0, 1].
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
    much as zeros and ones with the same mean, so the interval of a sum of scores is conservative.

    Args:
        successes: Number of successes or sum of scores, from 0 to ``total``.
        total: Number of trials, at least 1.
        confidence: The confidence level, in (0, 1).

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
    # Rounding could give 1e-17 instead of exactly 0, or slightly less than 1.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == total else centre + half
    return Proportion(successes, total, low, high)


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of two methods' mean scores on the same questions, with its confidence interval.

    Attributes:
        value: The difference, in [-1, 1].
        low: The interval's lower end.
        high: The interval's upper end.
    """

    value: float
    low: float
    high: float


def score_interval(
    scores: Sequence[float], documents: Sequence[int], *, confidence: float = 0.95, seed: int = 0
) -> Proportion:
    """Compute a percentile bootstrap interval of a mean score.

    The cluster bootstrap (A. Davison, D. Hinkley, Bootstrap Methods and their Application, 1997, section 3.8)
    draws whole documents with replacement, with all of their questions. If there are few documents, their
    means can be closer together than the scores of their questions, and the interval is too narrow. The
    result therefore also covers the interval that resamples single questions. If neither has a width, because
    all answers are correct or all are wrong, the result is :func:`wilson_interval`. With fewer than ten
    documents, the interval says little about other documents.

    Args:
        scores: The scores of the questions, in [0, 1]; at least one.
        documents: The number of each question's document.
        confidence: The confidence level, in (0, 1).
        seed: Seed of the resampling.

    Raises:
        ConfigurationError: There is no score, a score is out of range, or a document is missing.
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
    """Compute the difference of two methods' mean scores on the same questions, with a bootstrap interval.

    The differences of single questions are resampled by documents as in :func:`score_interval`, so the
    difficulty of questions does not widen the interval. If it has no width, it is derived from Wilson's
    interval of the share of questions on which the methods differ. For example, if they differ on 0 of n
    questions, the interval is symmetric, and its upper end is that of 0 successes in n trials.

    Args:
        scores: The scores of one method, in [0, 1]; at least one.
        others: The scores of the other method on the same questions.
        documents: The number of each question's document.
        confidence: The confidence level, in (0, 1).
        seed: Seed of the resampling.

    Raises:
        ConfigurationError: The numbers of scores differ, there is no score, a score is out of range, or a
            document is missing.
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
    """The union of the intervals by documents and by questions; ``None`` if it has no width."""
    if not 0 < confidence < 1:
        raise ConfigurationError(f"confidence={confidence} is not allowed: it must be in (0, 1).")
    by_document = _percentiles(scores, documents, confidence, seed)
    by_question = _percentiles(scores, range(len(scores)), confidence, seed)
    low, high = min(by_document[0], by_question[0]), max(by_document[1], by_question[1])
    return None if high - low < _MIN_WIDTH else (low, high)


def _percentiles(
    scores: Sequence[float], clusters: Sequence[int], confidence: float, seed: int
) -> tuple[float, float]:
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sizes = np.bincount(index)
    sums = np.bincount(index, weights=np.asarray(scores, dtype=np.float64))
    rng = np.random.default_rng(seed)
    means = []
    max_resamples = max(1, _MAX_DRAWN // len(sizes))
    for start in range(0, _RESAMPLES, max_resamples):
        number = min(max_resamples, _RESAMPLES - start)
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
    """A sum of scores, as an ``int`` if it is a whole number."""
    return int(total) if total.is_integer() else total
