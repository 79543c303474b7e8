"""Measured times of the engine's passes, as straight lines over the number of positions or sequences."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median

# Observations that a line keeps, the number from which it gives values, and the number of new ones after
# which it is fitted again.
_MAX_OBSERVATIONS, _MIN_OBSERVATIONS, _REFIT_AFTER = 16, 3, 4
# A pass that takes less than this share of the time of passes over no more positions shows that those were
# delayed.
_DELAYED_SHARE = 0.4


class RobustLine:
    """A straight line through the last (x, y) observations: the median slope, at the median height.

    Times are measured on shared machines, where a pass now and then takes many times as long as it should.
    The estimator ignores up to 29 % of arbitrary observations (H. Theil, 1950; P. K. Sen, 1968). If another
    program keeps the machine busy for long, all observations are too high. Nothing makes a pass too fast, so
    the first undelayed pass scales the older observations down.
    """

    def __init__(self) -> None:
        self._observations: deque[tuple[float, float]] = deque(maxlen=_MAX_OBSERVATIONS)
        self._line: tuple[float, float] | None = None
        self._num_unfitted = 0

    def observe(self, x: float, y: float) -> None:
        """Add one observation."""
        self._num_unfitted += 1
        if len(self._observations) < _MAX_OBSERVATIONS or self._num_unfitted >= _REFIT_AFTER:
            self._line = None
        comparable = [seconds for place, seconds in self._observations if place <= x]
        if len(comparable) >= _MIN_OBSERVATIONS and y < _DELAYED_SHARE * median(comparable):
            share = y / max(self.at(x) or 0.0, median(comparable))
            scaled = [(place, seconds * share) for place, seconds in self._observations]
            self._observations = deque(scaled, maxlen=_MAX_OBSERVATIONS)
            self._line = None
        self._observations.append((x, y))

    def at(self, x: float) -> float | None:
        """The line's height at x; ``None`` with too few observations.

        The slope is kept between 0 and proportionality.
        """
        if len(self._observations) < _MIN_OBSERVATIONS:
            return None
        if self._line is None:
            self._line, self._num_unfitted = self._fit(), 0
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
    """Measured seconds of passes, kept apart by the order of magnitude of the cached context."""

    _plain: defaultdict[int, RobustLine] = field(default_factory=lambda: defaultdict(RobustLine))
    _verify: defaultdict[int, RobustLine] = field(default_factory=lambda: defaultdict(RobustLine))
    _draft: defaultdict[int, RobustLine] = field(default_factory=lambda: defaultdict(RobustLine))

    def observe_verify(self, context_tokens: int, sequences: int, positions: int, seconds: float) -> None:
        """Add a target pass over ``positions`` new positions with ``context_tokens`` cached ones."""
        # Passes with one position per sequence use different kernels.
        lines = self._plain if positions == sequences else self._verify
        lines[context_tokens.bit_length()].observe(positions, seconds)

    def observe_draft(self, context_tokens: int, sequences: int, seconds: float) -> None:
        """Add a drafter pass for ``sequences`` sequences with ``context_tokens`` cached tokens in all."""
        self._draft[context_tokens.bit_length()].observe(sequences, seconds)

    def plain_s(self, context_tokens: int, sequences: int) -> float | None:
        """Expected seconds of a target pass over one position per sequence; ``None`` while unknown."""
        return self._plain[context_tokens.bit_length()].at(sequences)

    def verify_s(self, context_tokens: int, positions: int) -> float | None:
        """Expected seconds of a target pass that verifies drafts; ``None`` while unknown."""
        return self._verify[context_tokens.bit_length()].at(positions)

    def draft_s(self, context_tokens: int, sequences: int) -> float | None:
        """Expected seconds of a drafter pass; ``None`` while unknown."""
        return self._draft[context_tokens.bit_length()].at(sequences)
