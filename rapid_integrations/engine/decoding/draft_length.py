"""How many tokens to draft: as many as are expected to pay for their time.

The value of a draft token is the probability that it and all tokens before it are accepted. Its cost is a
drafter pass (or a share of a pass that confirmed several guessed tokens), one more position in the target's
pass, and, for the first token of a draft, the difference between a pass over several positions and a plain
one. Time is converted into tokens at the rate R, the tokens per second of this request so far, and at least
that of plain decoding. So the drafter is asked again while the next token's expected value is at least R
times its cost, and its proposal is kept while its probability of acceptance is at least R times the cost of
verifying it. The first token also has to pay for starting a draft, together with the tokens expected after
it. Adding whatever pays at the current rate raises the rate, which raises the bar; the fixed point is the
maximum of tokens per second (W. Dinkelbach, "On nonlinear fractional programming", 1967).

The probability of acceptance is learnt per confidence, which is the largest probability of the drafter's
distribution. It does not depend on random draws, so the length of drafts leaves no trace in a sample.
"""

from __future__ import annotations

from bisect import bisect

from rapid_integrations.engine.decoding.pass_costs import RoundCosts

DECAY = 0.9
"""Share of its weight that a round keeps when the next one is observed."""
PROBE_EVERY = 32
"""Rounds without drafting after which the drafter is asked again."""
# Bounds of the confidence classes, and the acceptance assumed for each class before any observation: its
# middle.
_BOUNDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.998)
_NOMINAL = tuple((low + high) / 2 for low, high in zip((0.0, *_BOUNDS), (*_BOUNDS, 1.0), strict=True))
# An engine remembers some 200 tokens, a request some 20.
_ENGINE_DECAY, _REQUEST_DECAY = 0.995, 0.95
# Prior knowledge counts as so many tokens: of the engine, the confidence itself; of a request, the engine's
# experience. With a small prior a request stops asking a useless drafter sooner.
_ENGINE_PRIOR, _REQUEST_PRIOR = 4.0, 2.0


class AcceptanceByConfidence:
    """The probability that a draft token is accepted, per confidence of the drafter, learnt by an engine.

    Attributes:
        rounds_without: Rounds since the drafter was last asked.
    """

    def __init__(self) -> None:
        self.rounds_without = 0
        self._seen = [0.0] * len(_NOMINAL)
        self._accepted = [0.0] * len(_NOMINAL)
        self._tokens = self._seconds = 0.0

    def observe_round(self, tokens: int, seconds: float) -> None:
        """Add a round with a draft: its tokens and its time."""
        self._tokens = self._tokens * DECAY + tokens
        self._seconds = self._seconds * DECAY + seconds

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of rounds with a draft; 0 before the first one."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def observe(self, confidence: float, accepted: float) -> None:
        """Add one token.

        Args:
            confidence: The largest probability of the drafter's distribution at its position.
            accepted: 1 or 0 for accepted or not, or the probability of it.
        """
        for values in (self._seen, self._accepted):
            values[:] = [value * _ENGINE_DECAY for value in values]
        index = bisect(_BOUNDS, confidence)
        self._seen[index] += 1
        self._accepted[index] += accepted

    def probability(self, index: int) -> float:
        """The probability of acceptance in a confidence class, counted from the lowest."""
        prior = _ENGINE_PRIOR * _NOMINAL[index]
        return (self._accepted[index] + prior) / (self._seen[index] + _ENGINE_PRIOR)

    def shares(self) -> list[float]:
        """The frequency of each confidence class, from the lowest; they sum to 1."""
        # Before any observation the drafter is assumed to be confident.
        seen = [
            value + (_ENGINE_PRIOR if index == len(_NOMINAL) - 2 else 0)
            for index, value in enumerate(self._seen)
        ]
        return [value / sum(seen) for value in seen]


class DraftLength:
    """Decides token by token when a draft of one request ends.

    The request's own tokens show how often its drafter is confident, and how much better or worse it is than
    other requests' drafters of the same confidence: the engine's probabilities are scaled by the acceptance
    seen here.

    Args:
        fixed: A fixed draft length, or ``None`` to choose.
        max_tokens: The longest draft when choosing.
        costs: The engine's measured costs.
        acceptance: The engine's experience, which this request adds to.
    """

    # Before any cost is known: long enough to learn from.
    FIRST = 6

    def __init__(
        self, fixed: int | None, max_tokens: int, costs: RoundCosts, acceptance: AcceptanceByConfidence
    ) -> None:
        self._fixed = fixed
        self._max_tokens = max_tokens
        self._costs = costs
        self._acceptance = acceptance
        self._shares = [share * _REQUEST_PRIOR for share in acceptance.shares()]
        self._accepted = self._expected = _REQUEST_PRIOR
        self._tokens = self._seconds = 0.0
        # Positions and passes of the drafter in this request: without guesses, one position per pass.
        self._positions = self._passes = 1.0
        # Kept by the engine, because an answer may be shorter than PROBE_EVERY rounds.
        self._rounds_without = acceptance.rounds_without
        # State of the current draft. Costs in tokens: of a drafter pass, of one more position to verify, and
        # of starting a draft. Probabilities: of acceptance per confidence class, that all tokens so far are
        # accepted, and that a further token is.
        self._pass_cost = self._position_cost = self._start_cost = 0.0
        self._probabilities: list[float] = []
        self._all_accepted = self._mean_probability = 1.0

    def begin(self, *, target_context: int, drafter_context: int, sequences: int, room: int) -> int:
        """The maximum length of the next draft; 0 for a plain round.

        Args:
            target_context: Cached tokens of all sequences that the round verifies together.
            drafter_context: The same for the drafter.
            sequences: The number of these sequences.
            room: Upper limit on useful tokens, near the end of the answer.
        """
        self._all_accepted, self._pass_cost, self._position_cost, self._start_cost = 1.0, 0.0, 0.0, 0.0
        if self._fixed is not None:
            return min(self._fixed, room)
        max_tokens = min(self._max_tokens, room)
        verify_s = self._costs.verify_s(target_context, 2 * sequences)
        pass_s = self._costs.draft_s(drafter_context, sequences)
        if verify_s is None or pass_s is None:
            return min(self.FIRST, max_tokens)
        plain_s = self._costs.plain_s(target_context, sequences)
        if plain_s is None:
            plain_s = self._costs.verify_s(target_context, sequences) or verify_s
        rate = max(sequences / plain_s, self._tokens / self._seconds if self._seconds else 0.0)
        eight_more_s = (self._costs.verify_s(target_context, 2 * sequences + 8) or verify_s) - verify_s
        # Sequences share a pass; the others are assumed to draft about as long.
        pass_s *= self._passes / self._positions
        self._pass_cost, self._position_cost = rate * pass_s / sequences, rate * eight_more_s / 8
        self._start_cost = max(rate * (verify_s - plain_s) / sequences - self._position_cost, 0.0)
        scale = self._accepted / self._expected
        self._probabilities = [
            min(self._acceptance.probability(index) * scale, 0.995) for index in range(len(_NOMINAL))
        ]
        weighted = zip(self._shares, self._probabilities, strict=True)
        self._mean_probability = sum(share * value for share, value in weighted) / sum(self._shares)
        if self.goes_on():
            self._rounds_without = self._acceptance.rounds_without = 0
            return max_tokens
        self._rounds_without += 1
        if self._rounds_without <= PROBE_EVERY:
            self._acceptance.rounds_without = self._rounds_without
            return 0
        # Draft and verify one token regardless of its value, so that all costs are measured again.
        self._rounds_without = self._acceptance.rounds_without = 0
        self._pass_cost = 0.0
        return min(1, max_tokens)

    def goes_on(self) -> bool:
        """Whether it pays to ask the drafter for one more token."""
        if not self._pass_cost:
            return True
        gains = (
            share * max(0.0, self._gain(probability))
            for share, probability in zip(self._shares, self._probabilities, strict=True)
        )
        return sum(gains) >= self._pass_cost * sum(self._shares)

    def keeps(self, confidence: float) -> bool:
        """Whether it pays to verify the token that the drafter proposes next; otherwise the draft ends.

        Args:
            confidence: The largest probability of the drafter's distribution.
        """
        if not self._pass_cost:
            return True
        probability = self._probabilities[bisect(_BOUNDS, confidence)]
        if self._gain(probability) < 0:
            return False
        self._all_accepted *= probability
        self._start_cost = 0.0
        return True

    def _gain(self, probability: float) -> float:
        """Expected tokens gained by verifying one more token that is accepted with this probability."""
        accepted = self._all_accepted * probability
        gain = accepted - self._position_cost
        if self._start_cost:
            # The tokens expected after the first one help to pay for starting the draft.
            gain -= self._start_cost
            costs = self._pass_cost + self._position_cost
            for _ in range(self._max_tokens - 1):
                accepted *= self._mean_probability
                if accepted <= costs:
                    break
                gain += accepted - costs
        return gain

    def observe(self, confidence: float, accepted: float) -> None:
        """Add the outcome of one token; arguments as for :meth:`AcceptanceByConfidence.observe`."""
        index = bisect(_BOUNDS, confidence)
        expected = self._acceptance.probability(index)
        self._shares = [share * _REQUEST_DECAY for share in self._shares]
        self._shares[index] += 1
        self._accepted = self._accepted * _REQUEST_DECAY + accepted
        self._expected = self._expected * _REQUEST_DECAY + expected
        self._acceptance.observe(confidence, accepted)

    def observe_pass(self, positions: int) -> None:
        """Add a drafter pass that gave the distribution at this many positions, at least one."""
        self._positions = self._positions * DECAY + positions
        self._passes = self._passes * DECAY + 1

    def observe_round(self, tokens: int, seconds: float, *, from_drafter: bool = True) -> None:
        """Add a round: the tokens of all its sequences, its time, and whether the drafter made its draft."""
        self._tokens = self._tokens * DECAY + tokens
        self._seconds = self._seconds * DECAY + seconds
        if from_drafter:
            self._acceptance.observe_round(tokens, seconds)

    @property
    def drafter_tokens_per_s(self) -> float:
        """Tokens per second of rounds whose drafts the drafter made; 0 before the first one."""
        return self._acceptance.tokens_per_s
