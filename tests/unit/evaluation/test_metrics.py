"""Exact match and Wilson's interval."""

import pytest
from scipy.stats import binomtest

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.metrics import exact_match, wilson_interval


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [
        ("The fee is 12 crowns.", ["The fee is 12 crowns."], True),
        ("  The fee\nis 12  crowns. ", ["The fee is 12 crowns."], True),
        ("The fee is 12 crowns", ["The fee is 12 crowns."], False),
        ("The fee is 12 crowns. More.", ["The fee is 12 crowns."], False),
        ("the fee is 12 crowns.", ["The fee is 12 crowns."], False),
        ("b", ["a", "b"], True),
        ("", ["a"], False),
        ("a", [], False),
    ],
)
def test_exact_match_compares_the_whole_answer(answer, references, right):
    assert exact_match(answer, references) is right


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
def test_wilson_interval_refuses_what_makes_no_sense(successes, total, confidence):
    with pytest.raises(ConfigurationError, match=rf"successes={successes}, total={total}"):
        wilson_interval(successes, total, confidence=confidence)


def _ends(successes, total):
    interval = wilson_interval(successes, total)
    return interval.low, interval.high
