"""Wilson's interval and the bootstrap's."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.scoring.intervals import (
    Difference,
    score_difference,
    score_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "total", "confidence"),
    [(0, 1, 0.95), (1, 1, 0.95), (7, 20, 0.95), (0, 50, 0.95), (199, 200, 0.99), (50, 50, 0.9)],
)
def test_wilson_interval_is_scipys(successes, total, confidence):
    ours = wilson_interval(successes, total, confidence=confidence)
    theirs = binomtest(successes, total).proportion_ci(confidence, method="wilson")
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)
    assert ours.value == successes / total


def test_wilson_interval_of_a_published_example():
    # Newcombe, Statistics in Medicine 17 (1998), Table I: 81/263 and 15/148 by the score method.
    assert [round(x, 4) for x in _ends(81, 263)] == [0.2553, 0.3662]
    assert [round(x, 4) for x in _ends(15, 148)] == [0.0624, 0.1605]


def test_wilson_interval_stays_inside_0_and_1_exactly():
    assert wilson_interval(0, 3).low == 0.0
    assert wilson_interval(3, 3).high == 1.0


@pytest.mark.parametrize(
    ("successes", "total", "confidence"), [(0, 0, 0.95), (-1, 3, 0.95), (4, 3, 0.95), (1, 3, 1.0), (1, 3, 0)]
)
def test_wilson_interval_checks_its_arguments(successes, total, confidence):
    with pytest.raises(ConfigurationError, match=rf"successes={successes}, total={total}"):
        wilson_interval(successes, total, confidence=confidence)


def _ends(successes, total):
    interval = wilson_interval(successes, total)
    return interval.low, interval.high


def test_an_interval_of_scores_lies_between_those_of_whole_numbers():
    low, middle, high = (wilson_interval(successes, 10) for successes in (4, 4.5, 5))
    assert low.low < middle.low < high.low
    assert low.high < middle.high < high.high
    assert middle.value == 0.45


def test_the_interval_of_single_questions_is_scipys():
    scores = np.random.default_rng(1).random(80) ** 2
    ours = score_interval(scores.tolist(), range(80))
    theirs = bootstrap(
        (scores,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == pytest.approx(scores.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.004)
    assert ours.high == pytest.approx(theirs.high, abs=0.004)


def test_documents_are_resampled_not_their_questions():
    # Ten questions per document with equal scores carry as much information as one.
    documents = [number for number in range(12) for _ in range(10)]
    scores = [float(document % 3 > 0) for document in documents]
    together = score_interval(scores, documents)
    once = score_interval(scores[::10], range(12))
    assert (together.low, together.high) == (once.low, once.high)
    apart = score_interval(scores, range(120))
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_intervals_have_their_nominal_coverage():
    # 40 documents of 1 to 5 questions, whose difficulty is the document's.
    rng = np.random.default_rng(5)
    held, naive = [], []
    for _ in range(80):
        sizes = rng.integers(1, 6, 40)
        documents = np.repeat(np.arange(40), sizes)
        scores = (rng.random(len(documents)) < rng.beta(0.7, 0.7, 40)[documents]).astype(float)
        by_document = score_interval(scores.tolist(), documents.tolist())
        by_question = score_interval(scores.tolist(), range(len(scores)))
        held.append(by_document.low <= 0.5 <= by_document.high)
        naive.append(by_question.low <= 0.5 <= by_question.high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.04)
    assert np.mean(naive) < np.mean(held) - 0.05


@pytest.mark.parametrize(
    ("scores", "documents"),
    [
        ([1.0] * 9, range(9)),
        ([0.0] * 9, range(9)),
        ([1.0] * 4, [3] * 4),
        ([0.0], [0]),
    ],
)
def test_where_resampling_has_no_width_the_interval_is_wilsons(scores, documents):
    assert score_interval(scores, documents) == wilson_interval(int(sum(scores)), len(scores))


@pytest.mark.parametrize("documents", [[3] * 20, [0, 1] * 10, [0, 1, 2, 3] * 5])
def test_few_documents_that_look_alike_do_not_narrow_the_interval(documents):
    scores = [1.0, 1.0, 0.0, 0.0] * 5  # half of the questions about each document
    scores[0], scores[2] = scores[2], scores[0]
    single = score_interval(scores, range(20))
    assert single.high - single.low > 0.35
    few = score_interval(scores, documents)
    assert few.low <= single.low < single.high <= few.high


def test_an_interval_is_repeatable_and_counts_whole_successes():
    scores, documents = [1.0, 0.0, 1.0, 1.0, 0.0], [0, 0, 1, 2, 3]
    interval = score_interval(scores, documents)
    assert interval == score_interval(scores, documents)
    assert interval.successes == 3
    assert isinstance(interval.successes, int)
    assert score_interval([0.25, 0.5], [0, 1]).successes == 0.75
    wider = score_interval(scores, documents, confidence=0.99)
    assert wider.low <= interval.low < interval.high <= wider.high


def test_differences_are_paired():
    # Both fail on the same half; one gets 3 of 60 more.
    others = [1.0, 0.0] * 30
    scores = [1.0 if i in (1, 21, 41) else other for i, other in enumerate(others)]
    difference = score_difference(scores, others, range(60))
    assert difference.value == pytest.approx(0.05)
    assert 0 <= difference.low < 0.05 < difference.high < 0.12
    alone = score_interval(scores, range(60))
    assert alone.high - alone.low > 2 * (difference.high - difference.low)
    back = score_difference(others, scores, range(60))
    assert (back.low, back.high) == pytest.approx((-difference.high, -difference.low), abs=0.01)


def test_equal_answers_leave_the_difference_a_width():
    end = wilson_interval(0, 20).high
    assert score_difference([1.0, 0.0] * 10, [1.0, 0.0] * 10, range(20)) == Difference(0, -end, end)
    low = wilson_interval(20, 20).low
    assert score_difference([1.0] * 20, [0.0] * 20, range(20)) == Difference(1, low, 1)
    assert score_difference([0.0] * 20, [1.0] * 20, range(20)) == Difference(-1, -1, -low)


@pytest.mark.parametrize(
    ("scores", "documents", "message"),
    [
        ([], [], "0 scores of 0 questions"),
        ([1.0], [], "1 scores of 0 questions"),
        ([0.5, 1.5], [0, 1], "the score 1.5 is not allowed"),
        ([math.nan], [0], "the score nan is not allowed"),
    ],
)
def test_invalid_scores_are_errors(scores, documents, message):
    with pytest.raises(ConfigurationError, match=message):
        score_interval(scores, documents)
    with pytest.raises(ConfigurationError, match=message):
        score_difference(scores, scores, documents)


def test_differences_need_the_same_questions_and_a_confidence():
    with pytest.raises(ConfigurationError, match="2 and 1 scores"):
        score_difference([1.0, 0.0], [1.0], [0, 1])
    with pytest.raises(ConfigurationError, match=r"confidence=1.0 is not allowed: it must be in \(0, 1\)"):
        score_interval([1.0, 0.0], [0, 1], confidence=1.0)
