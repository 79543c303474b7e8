"""The bound on numbers worked out by hand."""

import pytest

from rapid_integrations.benchmark.bound import SpeedBound, conditional_acceptance, expected_tokens, host_s
from rapid_integrations.engine.stats import RapidStats

# A target step takes 10 ms. 800 rounds of 3 drafted tokens at 1 ms each, 11 ms of verification and 0.5 ms of
# the host; half of the tokens stand that are tried: .5 + .25 + .125 of 3.
PLAIN = RapidStats(completion_tokens=100, rounds=100, verify_s=1.0, decode_s=1.1)
SPECULATIVE = RapidStats(
    completion_tokens=1500,
    rounds=800,
    drafted_tokens=2400,
    accepted_tokens=700,
    draft_s=2.4,
    verify_s=8.8,
    decode_s=11.6,
)


def test_the_bound_of_a_hand_computed_round():
    bound = SpeedBound.of(SPECULATIVE, PLAIN)
    assert bound is not None
    assert bound.acceptance == pytest.approx(0.5)
    assert bound.num_draft_tokens == 3
    assert bound.expected_tokens == pytest.approx(1.875)
    assert bound.target_step_s == pytest.approx(0.010)
    assert bound.draft_cost == pytest.approx(0.1)
    assert bound.host_cost == pytest.approx(0.05)
    assert bound.speed_up == pytest.approx(1.875 / 1.35)
    assert bound.reached == pytest.approx(1500 / 11.6 * 0.010)
    assert bound.share == pytest.approx((1.875 / 1.45) / (1.875 / 1.35))


def test_verification_that_costs_one_target_step_reaches_the_bound():
    ideal = RapidStats(
        completion_tokens=1500,
        rounds=800,
        drafted_tokens=2400,
        accepted_tokens=700,
        draft_s=2.4,
        verify_s=8.0,
        decode_s=10.8,
    )
    bound = SpeedBound.of(ideal, PLAIN)
    assert bound is not None
    assert bound.share == pytest.approx(1)


@pytest.mark.parametrize(
    ("speculative", "plain"),
    [(RapidStats(completion_tokens=5, rounds=5, decode_s=1, verify_s=1), PLAIN), (SPECULATIVE, RapidStats())],
    ids=["nothing drafted", "no plain decoding"],
)
def test_there_is_no_bound_without_both_kinds_of_round(speculative, plain):
    assert SpeedBound.of(speculative, plain) is None


@pytest.mark.parametrize(
    ("acceptance", "drafted", "tokens"), [(0, 4, 1), (0.5, 1, 1.5), (0.9, 2, 2.71), (1, 4, 5), (0.5, 0, 1)]
)
def test_expected_tokens_and_acceptance_are_inverse_functions(acceptance, drafted, tokens):
    assert expected_tokens(acceptance, drafted) == pytest.approx(tokens)
    if drafted:
        assert conditional_acceptance(tokens - 1, drafted) == pytest.approx(acceptance, abs=1e-9)


def test_host_time_is_the_time_without_drafting_and_verification():
    assert host_s(RapidStats(decode_s=1.0, draft_s=0.3, verify_s=0.5)) == pytest.approx(0.2)
    assert host_s(RapidStats(decode_s=1.0, draft_s=0.6, verify_s=0.5)) == 0
