"""How many tokens to draft: as many as are expected to pay for their time.

A draft token is worth the chance that it stands, and all before it do. It costs a drafter step, or its share
of one that told several tokens by a guess; a position of the target's pass; and the first of a draft what
passes over several positions cost more than plain ones. Time is worth what it yields on average: R tokens a
second, this request's going rate, and never less than plain decoding's. So the drafter is asked on while the
next token's expected worth is at least R times its costs, and what it proposes is kept while its chance is at
least R times what verifying it costs; the first token has to pay for the beginning too, with what is expected
to follow. Adding what pays at the going rate raises the rate, which raises the bar: the fixed point is the
most tokens per second (W. Dinkelbach, "On nonlinear fractional programming", 1967).

The chance that a token stands is learnt, for each confidence: the largest probability of the drafter's
distribution. It depends on nothing that is drawn, so that where drafts end leaves no trace in a sample.
"""

from __future__ import annotations

from bisect import bisect

from rapid_integrations.engine.decoding.pass_costs import RoundCosts

# Weight that a round keeps when the next one arrives.
DECAY = 0.9
# Rounds without a look at the drafter after which it is asked again.
PROBE_EVERY = 32
# Bounds between confidences that are learnt apart, and what each is worth before anything is known: itself.
_BOUNDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.998)
_NOMINAL = tuple((low + high) / 2 for low, high in zip((0.0, *_BOUNDS), (*_BOUNDS, 1.0), strict=True))
# What an engine remembers, and one request, of their tokens: some 200 and 20.
_ENGINE_DECAY, _REQUEST_DECAY = 0.995, 0.95
# As so many tokens counts what is known beforehand: of a confidence, itself; of a request, what the engine
# has learnt. The less, the sooner a request whose chunks are of no use leaves its drafter alone.
_ENGINE_PRIOR, _REQUEST_PRIOR = 4.0, 2.0


class AcceptanceByConfidence:
    """The chance that a draft token stands, for each confidence of the drafter: learnt by an engine.

    Attributes:
        rounds_without: Rounds since the drafter was last asked.
    """

    def __init__(self) -> None:
        self.rounds_without = 0
        self._seen = [0.0] * len(_NOMINAL)
        self._accepted = [0.0] * len(_NOMINAL)

    def observe(self, confidence: float, accepted: float) -> None:
        """Take in one token.

        Args:
            confidence: The largest probability of the drafter's distribution at its position.
            accepted: Whether the token stood, or the chance of it, in [0, 1].
        """
        for values in (self._seen, self._accepted):
            values[:] = [value * _ENGINE_DECAY for value in values]
        place = bisect(_BOUNDS, confidence)
        self._seen[place] += 1
        self._accepted[place] += accepted

    def chance(self, place: int) -> float:
        """The chance at the confidences of a place, counted from the lowest."""
        prior = _ENGINE_PRIOR * _NOMINAL[place]
        return (self._accepted[place] + prior) / (self._seen[place] + _ENGINE_PRIOR)

    def shares(self) -> list[float]:
        """How often each confidence comes, from the lowest; they sum to 1."""
        # Before anything was seen: a drafter that is sure.
        seen = [
            value + (_ENGINE_PRIOR if place == len(_NOMINAL) - 2 else 0)
            for place, value in enumerate(self._seen)
        ]
        return [value / sum(seen) for value in seen]


class DraftLength:
    """Ends one request's drafts, token by token.

    A request's own tokens tell how often its drafter is sure, and how much better or worse it is than others
    of its confidence: the engine's chances are scaled by what stood of them here.

    Args:
        fixed: A draft length to keep to, or ``None`` to choose.
        most: The longest draft when choosing.
        costs: The engine's measured costs.
        acceptance: What the engine has learnt, and goes on learning from this request.
    """

    # Before any cost is known: long enough to learn from.
    FIRST = 6

    def __init__(
        self, fixed: int | None, most: int, costs: RoundCosts, acceptance: AcceptanceByConfidence
    ) -> None:
        self._fixed = fixed
        self._most = most
        self._costs = costs
        self._acceptance = acceptance
        self._shares = [share * _REQUEST_PRIOR for share in acceptance.shares()]
        self._accepted = self._expected = _REQUEST_PRIOR
        self._tokens = self._seconds = 0.0
        # Of this request's drafter passes: how many positions they told, one each without guesses.
        self._told = self._passes = 1.0
        # Answers may be shorter than it takes until the drafter is asked again.
        self._rounds_without = acceptance.rounds_without
        # Of the draft at hand: what its time is worth in tokens, the chance that all of it stands, and that
        # the next token does.
        self._step_worth = self._position_worth = self._begin_worth = 0.0
        self._chances: list[float] = []
        self._stands = self._mean_chance = 1.0

    def begin(self, *, target_context: int, drafter_context: int, sequences: int, room: int) -> int:
        """The most tokens of the next draft; 0 does not ask the drafter.

        Args:
            target_context: Cached tokens of all sequences the round verifies together.
            drafter_context: The same for the drafter.
            sequences: How many sequences that is.
            room: The most tokens that are of use, the end of the answer being near.
        """
        self._stands, self._step_worth, self._position_worth, self._begin_worth = 1.0, 0.0, 0.0, 0.0
        if self._fixed is not None:
            return min(self._fixed, room)
        most = min(self._most, room)
        drafting = self._costs.verify_s(target_context, 2 * sequences)
        step = self._costs.draft_s(drafter_context, sequences)
        if drafting is None or step is None:
            return min(self.FIRST, most)
        plain = self._costs.plain_s(target_context, sequences)
        if plain is None:
            plain = self._costs.verify_s(target_context, sequences) or drafting
        rate = max(sequences / plain, self._tokens / self._seconds if self._seconds else 0.0)
        further = (self._costs.verify_s(target_context, 2 * sequences + 8) or drafting) - drafting
        # Passes are shared by those who draft: company drafts about as long.
        step *= self._passes / self._told
        self._step_worth, self._position_worth = rate * step / sequences, rate * further / 8
        self._begin_worth = max(rate * (drafting - plain) / sequences - self._position_worth, 0.0)
        scale = self._accepted / self._expected
        self._chances = [min(self._acceptance.chance(k) * scale, 0.995) for k in range(len(_NOMINAL))]
        likely = zip(self._shares, self._chances, strict=True)
        self._mean_chance = sum(share * chance for share, chance in likely) / sum(self._shares)
        if self.goes_on():
            self._rounds_without = self._acceptance.rounds_without = 0
            return most
        self._rounds_without += 1
        if self._rounds_without <= PROBE_EVERY:
            self._acceptance.rounds_without = self._rounds_without
            return 0
        # One token whatever it is worth, and verified, so that all of its costs are known again.
        self._rounds_without = self._acceptance.rounds_without = 0
        self._step_worth = 0.0
        return min(1, most)

    def goes_on(self) -> bool:
        """Whether it pays to ask the drafter for one more token."""
        if not self._step_worth:
            return True
        gains = (
            share * max(0.0, self._gain(chance))
            for share, chance in zip(self._shares, self._chances, strict=True)
        )
        return sum(gains) >= self._step_worth * sum(self._shares)

    def keeps(self, confidence: float) -> bool:
        """Whether it pays to verify the token that the drafter proposes next; the draft ends where not.

        Args:
            confidence: The largest probability of the drafter's distribution.
        """
        if not self._step_worth:
            return True
        chance = self._chances[bisect(_BOUNDS, confidence)]
        if self._gain(chance) < 0:
            return False
        self._stands *= chance
        self._begin_worth = 0.0
        return True

    def _gain(self, chance: float) -> float:
        """Tokens won by verifying one more that stands with this chance."""
        stands = self._stands * chance
        gain = stands - self._position_worth
        if self._begin_worth:
            # Beginning pays by what follows too.
            gain -= self._begin_worth
            costs = self._step_worth + self._position_worth
            for _ in range(self._most - 1):
                stands *= self._mean_chance
                if stands <= costs:
                    break
                gain += stands - costs
        return gain

    def observe(self, confidence: float, accepted: float) -> None:
        """Take in what became of one token; arguments as of :meth:`AcceptanceByConfidence.observe`."""
        place = bisect(_BOUNDS, confidence)
        expected = self._acceptance.chance(place)
        self._shares = [share * _REQUEST_DECAY for share in self._shares]
        self._shares[place] += 1
        self._accepted = self._accepted * _REQUEST_DECAY + accepted
        self._expected = self._expected * _REQUEST_DECAY + expected
        self._acceptance.observe(confidence, accepted)

    def observe_pass(self, positions: int) -> None:
        """Take in for how many positions a drafter pass told the distribution, at least one."""
        self._told = self._told * DECAY + positions
        self._passes = self._passes * DECAY + 1

    def observe_round(self, tokens: int, seconds: float) -> None:
        """Take in what a round yielded to all of its sequences."""
        self._tokens = self._tokens * DECAY + tokens
        self._seconds = self._seconds * DECAY + seconds
