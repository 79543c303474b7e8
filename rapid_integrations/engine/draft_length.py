"""How many tokens to draft: expected tokens per second, from measured costs and the running acceptance.

A round that drafts gamma tokens yields ``E(gamma) = (1 - a^(gamma+1)) / (1 - a)`` tokens in expectation, a
being the chance that a draft token stands given that the ones before it did (arXiv:2211.17192 Eq. 1). It
costs gamma drafter steps and one target pass over gamma + 1 positions. The length with the most expected
tokens per second is drafted; where none beats plain decoding nothing is, but for a short probe now and then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Weight that an observation keeps when the next one arrives.
DECAY = 0.9
# Rounds without a draft after which one is tried again, and how long that probe is.
PROBE_EVERY = 16
PROBE_TOKENS = 2
# A fresh engine's guess, worth this many observed tokens.
PRIOR_ACCEPTANCE = 0.8
PRIOR_WEIGHT = 4.0


@dataclass(slots=True)
class DecayingLine:
    """A straight line through (x, y) observations, the recent ones counting most."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def observe(self, x: float, y: float) -> None:
        """Take in one observation."""
        self.weight = self.weight * DECAY + 1
        for name, value in (("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, getattr(self, name) * DECAY + value)

    def at(self, x: float) -> float:
        """The line's height, its slope held between 0 and proportionality; 0 before any observation."""
        if not self.weight:
            return 0.0
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x * mean_x
        slope = (self.xy / self.weight - mean_x * mean_y) / spread if spread > 1e-9 else 0.0
        slope = min(max(slope, 0.0), mean_y / mean_x if mean_x else 0.0)
        return mean_y + slope * (x - mean_x)


@dataclass(slots=True)
class RoundCosts:
    """Measured seconds of the engine's passes, by order of magnitude of the contexts they read."""

    _verify: dict[int, DecayingLine] = field(default_factory=dict)
    _draft: dict[int, DecayingLine] = field(default_factory=dict)

    def observe_verify(self, context_tokens: int, positions: int, seconds: float) -> None:
        """One target pass over ``positions`` new positions with ``context_tokens`` cached ones."""
        self._verify.setdefault(context_tokens.bit_length(), DecayingLine()).observe(positions, seconds)

    def observe_draft(self, context_tokens: int, sequences: int, seconds: float) -> None:
        """One drafter step for ``sequences`` sequences with ``context_tokens`` cached tokens in all."""
        self._draft.setdefault(context_tokens.bit_length(), DecayingLine()).observe(sequences, seconds)

    def verify_s(self, context_tokens: int, positions: int) -> float | None:
        """Expected seconds of a target pass; ``None`` while unknown."""
        line = self._verify.get(context_tokens.bit_length())
        return line.at(positions) if line else None

    def draft_s(self, context_tokens: int, sequences: int) -> float | None:
        """Expected seconds of a drafter step; ``None`` while unknown."""
        line = self._draft.get(context_tokens.bit_length())
        return line.at(sequences) if line else None


@dataclass(slots=True)
class Acceptance:
    """The chance that a draft token stands, learnt as it runs.

    Attributes:
        accepted: Decayed count of draft tokens that stood.
        tried: Decayed count of draft tokens that were reached (those behind a rejected one were not). Tokens
            that a constraint forces are draft tokens here.
    """

    accepted: float = PRIOR_ACCEPTANCE * PRIOR_WEIGHT
    tried: float = PRIOR_WEIGHT

    def observe(self, drafted: int, accepted: int) -> None:
        """Take in one round's outcome."""
        if drafted:
            reached = min(accepted + 1, drafted)
            self.accepted = self.accepted * DECAY + accepted
            self.tried = self.tried * DECAY + reached

    @property
    def rate(self) -> float:
        """The chance, kept off 0 and 1."""
        return min(max(self.accepted / self.tried, 0.01), 0.995)

    def fork(self) -> Acceptance:
        """A new request's starting point: this rate, at the prior's weight."""
        return Acceptance(self.rate * PRIOR_WEIGHT, PRIOR_WEIGHT)


def expected_tokens(acceptance: float, num_draft_tokens: int) -> float:
    """Tokens a round is expected to yield (arXiv:2211.17192 Eq. 1)."""
    return (1 - acceptance ** (num_draft_tokens + 1)) / (1 - acceptance)


def best_draft_length(
    acceptance: float, *, verify_s: tuple[float, float], draft_s: float, most: int, reads_bonus: bool = False
) -> int:
    """The draft length with the most expected tokens per second.

    Args:
        acceptance: Chance that a draft token stands, in (0, 1).
        verify_s: Seconds of a target pass over 1 position, and what each further position adds.
        draft_s: Seconds of a drafter step.
        most: The longest draft allowed.
        reads_bonus: Whether a round whose draft stands in full costs one more drafter step, for the drafter's
            distribution at the bonus position.

    Returns:
        A length in [0, most].
    """

    def tokens_per_s(length: int) -> float:
        steps = length + (acceptance**length if reads_bonus else 0.0)
        return expected_tokens(acceptance, length) / (verify_s[0] + verify_s[1] * length + draft_s * steps)

    return max(range(most + 1), key=tokens_per_s)


class DraftLength:
    """Chooses one request's draft length round by round.

    Args:
        fixed: A draft length to keep to, or ``None`` to choose.
        most: The longest draft when choosing.
        costs: The engine's measured costs.
        acceptance: Where the request's acceptance starts.
        reads_bonus: As in :func:`best_draft_length`.
    """

    # Before any cost is known: long enough to learn from.
    FIRST = 6

    def __init__(
        self, fixed: int | None, most: int, costs: RoundCosts, acceptance: Acceptance, *, reads_bonus: bool
    ) -> None:
        self.acceptance = acceptance
        self._fixed = fixed
        self._most = most
        self._costs = costs
        self._reads_bonus = reads_bonus
        self._rounds_without = 0

    def next(self, *, target_context: int, drafter_context: int, sequences: int, room: int) -> int:
        """The length of the next draft.

        Args:
            target_context: Cached tokens of all sequences the round verifies together.
            drafter_context: The same for the drafter.
            sequences: How many sequences that is.
            room: The most tokens that are of use, the end of the answer being near.
        """
        if self._fixed is not None:
            return min(self._fixed, room)
        most = min(self._most, room)
        single = self._costs.verify_s(target_context, sequences)
        step = self._costs.draft_s(drafter_context, sequences)
        if single is None or step is None:
            return min(self.FIRST, most)
        # Company drafts about as much: a further position of mine comes with one of everybody's.
        further = (self._costs.verify_s(target_context, 9 * sequences) or single) - single
        length = best_draft_length(
            self.acceptance.rate,
            verify_s=(single, further / 8),
            draft_s=step,
            most=most,
            reads_bonus=self._reads_bonus,
        )
        self._rounds_without = 0 if length else self._rounds_without + 1
        if self._rounds_without > PROBE_EVERY:
            self._rounds_without = 0
            return min(PROBE_TOKENS, most)
        return length
