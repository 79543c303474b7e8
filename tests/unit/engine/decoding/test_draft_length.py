"""Draft lengths against brute force over their yield, and the learning of costs and acceptance."""

import random

import pytest

from rapid_integrations.engine.decoding.draft_length import PROBE_EVERY, AcceptanceByConfidence, DraftLength
from rapid_integrations.engine.decoding.pass_costs import RobustLine, RoundCosts


def line_through(*observations: tuple[float, float]) -> RobustLine:
    line = RobustLine()
    for x, y in observations:
        line.observe(x, y)
    return line


def test_a_line_is_recovered_though_some_observations_are_far_off() -> None:
    assert RobustLine().at(3) is None
    line = line_through(*((x, 2 + 0.5 * x) for x in (1, 5, 2, 9, 4, 7, 3)))
    for x, y in ((6, 100.0), (2, 50.0)):
        line.observe(x, y)
    for x in (0.0, 1.0, 20.0):
        assert line.at(x) == pytest.approx(2 + 0.5 * x, rel=0.05)


def test_a_line_forgets() -> None:
    line = line_through(*[(3, 10.0)] * 20)
    for _ in range(12):
        line.observe(3, 1)
    assert line.at(3) == 1


def test_one_slow_first_pass_does_not_count() -> None:
    line = line_through((1, 90.0), (2, 1.1))
    assert line.at(1) is None
    line.observe(1, 1.0)
    assert line.at(1) == pytest.approx(1.0, abs=0.15)


def test_a_line_through_one_place_is_level() -> None:
    line = line_through(*[(4, 7.0)] * 3)
    assert line.at(1) == line.at(4) == line.at(100) == 7


def test_the_slope_is_neither_falling_nor_more_than_proportional() -> None:
    falling = line_through((1, 3.0), (2, 2.0), (3, 1.0))
    steep = line_through((2, 1.0), (3, 5.0), (4, 9.0))
    assert falling.at(0) == falling.at(50)
    assert steep.at(0) == pytest.approx(0)
    assert steep.at(1) > 0


def test_the_probability_of_a_confidence_is_its_accepted_share() -> None:
    acceptance = AcceptanceByConfidence()
    for trial in range(400):
        acceptance.observe(0.95, trial % 4 != 0)
        acceptance.observe(0.4, 0.25)
    places = {confidence: place for place, confidence in enumerate(CONFIDENCES)}
    assert acceptance.probability(places[0.96]) == pytest.approx(0.75, abs=0.05)
    assert acceptance.probability(places[0.4]) == pytest.approx(0.25, abs=0.05)
    shares = acceptance.shares()
    assert sum(shares) == pytest.approx(1)
    assert shares[places[0.96]] == pytest.approx(0.5, abs=0.05)


def test_before_anything_is_known_a_confidence_is_worth_itself() -> None:
    acceptance = AcceptanceByConfidence()
    for place, confidence in enumerate(CONFIDENCES):
        assert acceptance.probability(place) == pytest.approx(confidence, abs=0.16)


# One for each confidence class.
CONFIDENCES = (0.15, 0.4, 0.6, 0.75, 0.85, 0.93, 0.96, 0.985, 0.995, 0.9995)


class Drafting:
    """Rounds with fixed costs of passes and known probabilities of acceptance."""

    def __init__(
        self, chances: dict[float, float], *, further: float, step: float, begin: float = 0.0
    ) -> None:
        self.chances, self.further, self.step, self.begin = chances, further, step, begin
        self.rng = random.Random(1)
        self.costs = RoundCosts()
        for positions in (2, 5, 9):
            self.costs.observe_verify(100, 1, 1, 1.0)
            self.costs.observe_verify(100, 1, positions, 1.0 + begin + further * (positions - 1))
            self.costs.observe_draft(20, 1, step)
        self.tokens = self.seconds = 0.0

    def chooser(self, acceptance: AcceptanceByConfidence | None = None, most: int = 16) -> DraftLength:
        return DraftLength(None, most, self.costs, acceptance or AcceptanceByConfidence())

    def round(self, lengths: DraftLength) -> int:
        """One round; the length of its draft."""
        wanted = begin(lengths)
        proposed: list[float] = []
        kept = steps = 0
        while kept < wanted:
            proposed.append(self.rng.choice(list(self.chances)))
            steps += 1
            if not lengths.keeps(proposed[-1]):
                break
            kept += 1
            if kept < wanted and not lengths.goes_on():
                break
        return self._verify(lengths, proposed, kept, steps)

    def fixed(self, length: int) -> None:
        """One round of that length."""
        proposed = [self.rng.choice(list(self.chances)) for _ in range(length)]
        self._verify(None, proposed, length, length)

    def _verify(self, lengths: DraftLength | None, proposed: list[float], kept: int, steps: int) -> int:
        accepted = 0
        for place, confidence in enumerate(proposed):
            stands = self.rng.random() < self.chances[confidence]
            if lengths is not None:
                lengths.observe(confidence, stands)
            if place < kept and stands:
                accepted += 1
            else:
                break
        seconds = 1.0 + (self.begin if kept else 0.0) + self.further * kept + self.step * steps
        self.tokens += accepted + 1
        self.seconds += seconds
        if lengths is not None:
            lengths.observe_round(accepted + 1, seconds)
        return kept

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def begin(lengths: DraftLength, room: int = 1000) -> int:
    return lengths.begin(target_context=100, drafter_context=20, sequences=1, room=room)


@pytest.mark.parametrize(
    ("chances", "further", "step", "beginning"),
    [
        ({0.9995: 0.99}, 0.02, 0.1, 0.0),
        ({0.9995: 0.99}, 0.02, 0.1, 0.5),
        ({0.96: 0.8}, 0.1, 0.1, 0.0),
        ({0.96: 0.8}, 0.1, 0.1, 0.4),
        ({0.96: 0.7}, 0.1, 0.2, 0.5),
        ({0.6: 0.5}, 0.05, 0.05, 0.0),
        ({0.6: 0.3}, 0.1, 0.4, 0.0),
        ({0.9995: 0.05}, 0.1, 0.2, 0.2),
    ],
)
def test_the_speed_is_near_that_of_the_best_fixed_length(
    chances: dict[float, float], further: float, step: float, beginning: float
) -> None:
    """If all tokens are alike, a fixed length is optimal."""
    ours = Drafting(chances, further=further, step=step, begin=beginning)
    lengths = ours.chooser()
    for _ in range(2000):
        ours.round(lengths)
    speeds = []
    for length in range(17):
        fixed = Drafting(chances, further=further, step=step, begin=beginning)
        for _ in range(2000):
            fixed.fixed(length)
        speeds.append(fixed.speed)
    assert ours.speed > 0.92 * max(speeds)


def test_with_informative_confidence_it_beats_every_fixed_length() -> None:
    """Three tokens in four are nearly always accepted, the others nearly never."""
    chances = {0.9995: 0.98, 0.985: 0.98, 0.96: 0.98, 0.6: 0.05}
    ours = Drafting(chances, further=0.1, step=0.05)
    lengths = ours.chooser()
    for _ in range(2000):
        ours.round(lengths)
    for length in range(1, 17):
        fixed = Drafting(chances, further=0.1, step=0.05)
        for _ in range(2000):
            fixed.fixed(length)
        assert ours.speed > 1.02 * fixed.speed


def test_a_request_learns_that_its_drafter_is_worse_than_its_confidence() -> None:
    acceptance = AcceptanceByConfidence()
    good = Drafting({0.9995: 0.98}, further=0.1, step=0.2)
    for _ in range(50):
        good.round(good.chooser(acceptance))
    bad = Drafting({0.9995: 0.2}, further=0.1, step=0.2)
    lengths = bad.chooser(acceptance)
    drafted = [bad.round(lengths) for _ in range(60)]
    assert drafted[0] > 2
    assert sum(drafted[6:30]) <= 4, "a few tokens that fall tell enough"
    assert sum(drafted[30:]) <= 3
    assert bad.round(bad.chooser(acceptance)) > 0, "the next request's drafter may be as good as most"


@pytest.mark.parametrize("room", [0, 1, 3])
def test_no_draft_reaches_beyond_the_answer_s_end(room: int) -> None:
    known = Drafting({0.9995: 0.98}, further=0.01, step=0.01)
    assert begin(known.chooser(), room) == room
    assert begin(known.chooser(most=2), room) == min(2, room)
    assert begin(DraftLength(9, 16, known.costs, AcceptanceByConfidence()), room) == room
    assert begin(DraftLength(None, 16, RoundCosts(), AcceptanceByConfidence()), room) == room


def test_a_fixed_length_is_kept_however_unsure_the_drafter_is() -> None:
    dear = Drafting({0.6: 0.1}, further=1.0, step=9.0)
    lengths = DraftLength(7, 16, dear.costs, AcceptanceByConfidence())
    for _ in range(5):
        assert dear.round(lengths) == 7
    assert begin(DraftLength(0, 16, dear.costs, AcceptanceByConfidence())) == 0


def test_before_any_cost_is_known_a_few_tokens_are_tried() -> None:
    unknown = DraftLength(None, 16, RoundCosts(), AcceptanceByConfidence())
    assert begin(unknown) == DraftLength.FIRST
    assert unknown.goes_on()
    assert unknown.keeps(0.01)
    assert begin(DraftLength(None, 3, RoundCosts(), AcceptanceByConfidence())) == 3


def test_where_drafting_does_not_pay_the_drafter_is_asked_now_and_then() -> None:
    dear = Drafting({0.6: 0.1}, further=0.1, step=0.5)
    lengths = dear.chooser()
    for _ in range(100):
        dear.round(lengths)
    asked = []
    for _ in range(3 * (PROBE_EVERY + 1)):
        wanted = begin(lengths)
        asked.append(wanted > 0)
        lengths.observe_round(1, 1.0)
    assert sum(asked) == 3
    assert all(sum(asked[i : i + PROBE_EVERY + 1]) == 1 for i in range(2 * PROBE_EVERY))


def test_drafting_resumes_when_it_pays_again() -> None:
    changing = Drafting({0.9995: 0.02}, further=0.05, step=0.1)
    lengths = changing.chooser()
    for _ in range(60):
        changing.round(lengths)
    assert begin(lengths) == 0
    changing.chances = {0.9995: 1.0}
    lengths_of_drafts = [changing.round(lengths) for _ in range(30 * PROBE_EVERY)]
    assert sum(lengths_of_drafts[-10:]) > 40


def test_the_costs_of_a_pass_are_shared_by_its_sequences() -> None:
    """A pass shared by four sequences is worth four times the draft."""
    costs = RoundCosts()
    for positions in (4, 4, 4, 8, 12, 20):
        costs.observe_verify(400, 4, positions, 1.0 + 0.04 * (positions - 4))
        costs.observe_draft(80, 4, 0.2)
    kept = []
    for tokens in (4, 8):
        lengths = DraftLength(None, 32, costs, AcceptanceByConfidence())
        for _ in range(20):
            lengths.observe_round(tokens, 1.0)
        lengths.begin(target_context=400, drafter_context=80, sequences=4, room=1000)
        kept.append(0)
        while kept[-1] < 32 and lengths.goes_on() and lengths.keeps(0.985):
            kept[-1] += 1
    # A fast batch does not draft tokens that are hardly ever accepted.
    assert 0 < kept[1] < kept[0]


def test_correct_guesses_lengthen_the_drafts_of_their_own_request() -> None:
    """A pass too expensive for one token pays for several; guesses of another request do not count."""
    drafting = Drafting({0.9: 0.9}, further=0.05, step=1.2)
    guessing, alone = drafting.chooser(), drafting.chooser()
    for _ in range(20):
        guessing.observe_pass(6)
        alone.observe_pass(1)
    assert begin(guessing) > 0
    assert begin(alone) == 0


def test_a_line_follows_when_what_it_measures_changes() -> None:
    line = RobustLine()
    for seconds in (1.0, 3.0):
        for _ in range(40):
            line.observe(1, seconds)
            line.at(1)
        assert line.at(1) == seconds


def test_one_undelayed_pass_corrects_a_line() -> None:
    line = line_through(*((x, 5 * (2 + 0.5 * x)) for x in (1, 5, 2, 9, 4, 7, 3, 8, 6)))
    line.observe(6, 5.0)
    for x in (1, 6, 9):
        assert line.at(x) == pytest.approx(2 + 0.5 * x, rel=0.25)


def test_a_pass_over_fewer_positions_does_not_correct_passes_over_more() -> None:
    line = line_through(*[(8, 10.0)] * 16)
    line.observe(1, 1.0)
    assert line.at(8) == 10


@pytest.mark.parametrize("rounds", [5, 1000])
def test_drafting_resumes_when_a_busy_machine_is_free_again(rounds) -> None:
    """Even if answers are short, and target and drafter were slowed down by different factors."""
    free = Drafting({0.9995: 1.0}, further=0.05, step=0.1)
    costs = free.costs
    for positions in [2, 5, 9] * 8:
        costs.observe_verify(100, 1, 1, 4.0)
        costs.observe_verify(100, 1, positions, 20.0)
        costs.observe_draft(20, 1, 8.0)
    acceptance, drafts = AcceptanceByConfidence(), []
    lengths = free.chooser(acceptance)
    for number in range(4 * PROBE_EVERY):
        if number % rounds == 0:
            lengths = free.chooser(acceptance)
        wanted = begin(lengths)
        if wanted:
            costs.observe_draft(20, 1, free.step)
            for _ in range(wanted):
                lengths.keeps(0.9995)
                lengths.observe(0.9995, 1.0)
        costs.observe_verify(100, 1, 1 + wanted, 1.0 + free.further * wanted)
        lengths.observe_round(1 + wanted, 1.0 + free.further * wanted + free.step * wanted)
        drafts.append(wanted)
    assert drafts[:PROBE_EVERY] == [0] * PROBE_EVERY
    assert sum(drafts[-PROBE_EVERY:]) > 8 * PROBE_EVERY


def test_costs_are_kept_by_the_size_of_what_is_read() -> None:
    costs = RoundCosts()
    for _ in range(3):
        costs.observe_verify(1000, 1, 3, 2.0)
        costs.observe_verify(9000, 1, 3, 8.0)
        costs.observe_verify(9000, 2, 2, 5.0)
    assert costs.verify_s(900, 3) == 2.0
    assert costs.verify_s(9001, 3) == 8.0
    assert costs.verify_s(100, 3) is None
    assert costs.plain_s(9001, 2) == 5.0, "a pass that scores no draft is measured apart"
    assert costs.plain_s(900, 1) is None
    assert costs.draft_s(1000, 1) is None
