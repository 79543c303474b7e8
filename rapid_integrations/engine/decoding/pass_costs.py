"""."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median

# How many passes tell their costs, how many there must be, and after how many new ones, once there are all,
# the line is fitted anew.
_OBSERVATIONS, _KNOWN_FROM, _REFIT_AFTER = 16, 3, 4


# A pass that takes less than this share of what passes over no more took tells that those were held up.
_SOONER = 0.4


class RobustLine:
    """A straight line through the last (x, y) observations: the median slope, at the median height.

    Times are measured on machines that others use: a pass now and then takes many times as long as it should
    (H. Theil, 1950; P. K. Sen, 1968: up to 29 % of the observations may be any). Where something else kept
    the machine busy for long, all of them are too high. But nothing makes a pass too fast: the first that is
    not held up puts the others right.
    """

    def __init__(self) -> None:
        self._observations: deque[tuple[float, float]] = deque(maxlen=_OBSERVATIONS)
        self._line: tuple[float, float] | None = None
        self._unfitted = 0

    def observe(self, x: float, y: float) -> None:
        """Take in one observation."""
        self._unfitted += 1
        if len(self._observations) < _OBSERVATIONS or self._unfitted >= _REFIT_AFTER:
            self._line = None
        before = [seconds for place, seconds in self._observations if place <= x]
        if len(before) >= _KNOWN_FROM and y < _SOONER * median(before):
            share = y / max(self.at(x) or 0.0, median(before))
            scaled = [(place, seconds * share) for place, seconds in self._observations]
            self._observations = deque(scaled, maxlen=_OBSERVATIONS)
            self._line = None
        self._observations.append((x, y))

    def at(self, x: float) -> float | None:
        """The height, its slope held between 0 and proportionality; ``None`` while it is hardly known."""
        if len(self._observations) < _KNOWN_FROM:
            return None
        if self._line is None:
            self._line, self._unfitted = self._fit(), 0
        slope, height = self._line
        return height + slope * x

    def _fit(self) -> tuple[float, float]:
        pairs = combinations(self._observations, 2)
        slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairs if x1 != x2]
        level = median(y for _, y in self._observations) / median(x for x, _ in self._observations)
        slope = min(max(median(slopes), 0.0), level) if slopes else 0.0
        return slope, median(y - slope * x for x, y in self._observations)


@dataclass(slots=True)
class RoundCosts:
    """Measured seconds of the engine's passes, by order of magnitude of the contexts they read."""

    _plain: defaultdict[int, RobustLine] = field(default_factory=lambda: defaultdict(RobustLine))
    _verify: defaultdict[int, RobustLine] = field(default_factory=lambda: defaultdict(RobustLine))
    _draft: defaultdict[int, RobustLine] = field(default_factory=lambda: defaultdict(RobustLine))

    def observe_verify(self, context_tokens: int, sequences: int, positions: int, seconds: float) -> None:
        """One target pass over ``positions`` new positions with ``context_tokens`` cached ones."""
        # A single query of a sequence has kernels of its own.
        lines = self._plain if positions == sequences else self._verify
        lines[context_tokens.bit_length()].observe(positions, seconds)

    def observe_draft(self, context_tokens: int, sequences: int, seconds: float) -> None:
        """One drafter pass for ``sequences`` sequences with ``context_tokens`` cached tokens in all."""
        self._draft[context_tokens.bit_length()].observe(sequences, seconds)

    def plain_s(self, context_tokens: int, sequences: int) -> float | None:
        """Expected seconds of a target pass over a position of each sequence; ``None`` while unknown."""
        return self._plain[context_tokens.bit_length()].at(sequences)

    def verify_s(self, context_tokens: int, positions: int) -> float | None:
        """Expected seconds of a target pass that scores drafts; ``None`` while unknown."""
        return self._verify[context_tokens.bit_length()].at(positions)

    def draft_s(self, context_tokens: int, sequences: int) -> float | None:
        """Expected seconds of a drafter pass; ``None`` while unknown."""
        return self._draft[context_tokens.bit_length()].at(sequences)
