"""How many tokens to draft: the formulas against sums and brute force, and the choices they lead to."""

import itertools

import pytest

from rapid_integrations.engine.draft_length import (
    PROBE_EVERY,
    PROBE_TOKENS,
    Acceptance,
    DecayingLine,
    DraftLength,
    RoundCosts,
    best_draft_length,
    expected_tokens,
)


@pytest.mark.parametrize("acceptance", [0.01, 0.3, 0.8, 0.995])
@pytest.mark.parametrize("length", [0, 1, 2, 7, 16])
def test_expected_tokens_is_the_sum_over_how_many_stand(acceptance: float, length: int) -> None:
    # k draft tokens stand and the next does not, for k < length; or all stand. One token more follows.
    ends = sum((k + 1) * acceptance**k * (1 - acceptance) for k in range(length))
    assert expected_tokens(acceptance, length) == pytest.approx(ends + (length + 1) * acceptance**length)


@pytest.mark.parametrize("reads_bonus", [False, True])
def test_the_best_length_has_the_most_tokens_per_second(reads_bonus: bool) -> None:
    seen = set()
    for rate, further, step in itertools.product(
        (0.05, 0.5, 0.8, 0.95, 0.99), (0.0, 0.02, 0.3), (0.01, 0.1, 0.5)
    ):

        def speed(length: int, rate=rate, further=further, step=step) -> float:
            tokens = sum(rate**k for k in range(length + 1))
            bonus = rate**length if reads_bonus else 0
            return tokens / (1.0 + further * length + step * (length + bonus))

        found = best_draft_length(
            rate, verify_s=(1.0, further), draft_s=step, most=12, reads_bonus=reads_bonus
        )
        assert speed(found) == pytest.approx(max(speed(length) for length in range(13)))
        seen.add(found)
    assert {0, 12} < seen, "the cases reach from nothing to everything"


def test_nothing_is_drafted_where_drafting_cannot_pay() -> None:
    assert best_draft_length(0.99, verify_s=(1.0, 0.0), draft_s=1.0, most=16) == 0
    assert best_draft_length(0.01, verify_s=(1.0, 0.0), draft_s=0.2, most=16) == 0
    assert best_draft_length(0.9, verify_s=(1.0, 0.0), draft_s=0.01, most=0) == 0


def test_a_decaying_line_recovers_a_line() -> None:
    line = DecayingLine()
    assert line.at(3) == 0
    for x in (1, 5, 2, 9, 4):
        line.observe(x, 2 + 0.5 * x)
    for x in (0.0, 1.0, 20.0):
        assert line.at(x) == pytest.approx(2 + 0.5 * x)


def test_a_decaying_line_forgets() -> None:
    line = DecayingLine()
    for _ in range(20):
        line.observe(3, 10)
    for _ in range(100):
        line.observe(3, 1)
    assert line.at(3) == pytest.approx(1, rel=0.01)


def test_a_line_through_one_place_is_level() -> None:
    line = DecayingLine()
    line.observe(4, 7)
    assert line.at(1) == line.at(4) == line.at(100) == 7


def test_the_slope_is_neither_falling_nor_more_than_proportional() -> None:
    falling, steep = DecayingLine(), DecayingLine()
    for x, y in ((1, 3.0), (2, 2.0), (3, 1.0)):
        falling.observe(x, y)
    for x, y in ((2, 1.0), (4, 9.0)):
        steep.observe(x, y)
    assert falling.at(0) == pytest.approx(falling.at(50))
    assert steep.at(0) == pytest.approx(0)
    assert steep.at(1) > 0


def test_acceptance_counts_only_tokens_that_were_reached() -> None:
    acceptance = Acceptance(0.0, 0.0)
    acceptance.observe(drafted=5, accepted=2)  # the third was rejected, the rest never looked at
    assert (acceptance.accepted, acceptance.tried) == (2, 3)
    acceptance = Acceptance(0.0, 0.0)
    acceptance.observe(drafted=5, accepted=5)
    assert (acceptance.accepted, acceptance.tried) == (5, 5)
    acceptance.observe(drafted=0, accepted=0)
    assert (acceptance.accepted, acceptance.tried) == (5, 5)


def test_the_rate_follows_what_happens_and_keeps_off_the_ends() -> None:
    acceptance = Acceptance()
    for _ in range(200):
        acceptance.observe(4, 4)
    assert acceptance.rate == 0.995
    for _ in range(200):
        acceptance.observe(4, 0)
    assert acceptance.rate == 0.01
    forked = acceptance.fork()
    assert forked.rate == pytest.approx(0.01)
    forked.observe(4, 4)
    assert forked.rate > 0.3
    assert acceptance.rate == 0.01


def chooser(
    *, rate: float = 0.9, verify: float = 1.0, draft: float = 0.05, fixed: int | None = None, most: int = 16
) -> DraftLength:
    costs = RoundCosts()
    for positions in (1, 5, 9):
        costs.observe_verify(100, positions, verify)
    costs.observe_draft(20, 1, draft)
    return DraftLength(fixed, most, costs, Acceptance(rate * 100, 100), reads_bonus=False)


def choose(lengths: DraftLength, room: int = 1000) -> int:
    return lengths.next(target_context=100, drafter_context=20, sequences=1, room=room)


def test_the_choice_is_the_best_length_for_the_measured_costs() -> None:
    best = best_draft_length(0.9, verify_s=(1.0, 0.0), draft_s=0.05, most=16)
    assert 2 < best < 16
    assert choose(chooser()) == best
    assert choose(chooser(most=2)) == 2


@pytest.mark.parametrize("room", [0, 1, 3])
def test_no_draft_reaches_beyond_the_answer_s_end(room: int) -> None:
    assert choose(chooser(rate=0.99), room) == room
    assert choose(chooser(fixed=9), room) == room
    unknown = DraftLength(None, 16, RoundCosts(), Acceptance(), reads_bonus=False)
    assert choose(unknown, room) == room


def test_a_fixed_length_is_kept() -> None:
    assert choose(chooser(rate=0.02, draft=9.0, fixed=7)) == 7
    assert choose(chooser(fixed=0)) == 0


def test_before_any_cost_is_known_a_few_tokens_are_tried() -> None:
    unknown = DraftLength(None, 16, RoundCosts(), Acceptance(), reads_bonus=False)
    assert choose(unknown) == DraftLength.FIRST
    assert choose(DraftLength(None, 3, RoundCosts(), Acceptance(), reads_bonus=False)) == 3


def test_where_drafting_does_not_pay_it_is_probed_now_and_then() -> None:
    lengths = chooser(rate=0.05, draft=0.5)
    chosen = [choose(lengths) for _ in range(3 * (PROBE_EVERY + 1))]
    assert chosen == ([0] * PROBE_EVERY + [PROBE_TOKENS]) * 3


def test_drafting_resumes_when_it_pays_again() -> None:
    lengths = chooser(rate=0.05, draft=0.3)
    for _ in range(12 * (PROBE_EVERY + 1)):
        length = choose(lengths)
        lengths.acceptance.observe(length, length)  # from now on everything stands
    assert choose(lengths) > PROBE_TOKENS


def test_costs_are_kept_by_the_size_of_what_is_read() -> None:
    costs = RoundCosts()
    costs.observe_verify(1000, 1, 2.0)
    costs.observe_verify(9000, 1, 8.0)
    assert costs.verify_s(900, 1) == 2.0
    assert costs.verify_s(9001, 1) == 8.0
    assert costs.verify_s(100, 1) is None
    assert costs.draft_s(1000, 1) is None
