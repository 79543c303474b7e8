"""What a benchmark found: every sample, and the figures that follow from them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rapid_integrations.benchmark.bound import SpeedBound
from rapid_integrations.benchmark.work import Answer, Outcome
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError

Suite = Literal["prefill", "decode", "batch", "questions", "end-to-end"]


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing.

    Attributes:
        median: Their median.
        low: The least.
        high: The largest.
        count: How many.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Sum up measurements; ``None`` when there are none."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1], len(found)) if found else None


@dataclass(frozen=True, slots=True)
class Cell:
    """One baseline on one piece of work.

    Attributes:
        suite: Which part of the benchmark.
        baseline: Its name.
        context: The document's nominal length in tokens.
        batch: How many questions.
        together: Whether they were asked at once.
        cold: Whether the document had to be read.
        retrieval: What the drafter read; ``None`` for a baseline without one.
        samples: One per repetition.
        compared: Answers that were compared with ``generate()``'s.
        equal: How many of these were equal.
        asked: Answers whose right answer is known, in one repetition.
        right: How many of these were right.
    """

    suite: Suite
    baseline: str
    context: int
    batch: int
    together: bool
    cold: bool
    retrieval: str | None
    samples: tuple[Outcome, ...]
    compared: int = 0
    equal: int = 0
    asked: int = 0
    right: int = 0

    @property
    def stats(self) -> RapidStats:
        """Counts and times of all samples, summed."""
        return RapidStats.pooled(sample.stats for sample in self.samples)

    @property
    def wall_s(self) -> Spread | None:
        """Seconds from the first call to the last answer."""
        return self._spread(lambda sample: sample.wall_s)

    @property
    def prefill_s(self) -> Spread | None:
        """Seconds of reading, both models'."""
        return self._spread(lambda sample: sample.stats.prefill_s or None)

    @property
    def decode_tokens_per_s(self) -> Spread | None:
        """Tokens per second behind the reading, of questions asked one at a time."""
        return self._spread(lambda sample: sample.stats.decode_tokens_per_s or None)

    @property
    def tokens_per_s(self) -> Spread | None:
        """Tokens per second from the first call to the last answer."""
        return self._spread(lambda sample: sample.stats.completion_tokens / sample.wall_s or None)

    def first_token_s(self, question: int = 0) -> Spread | None:
        """Seconds to a question's first token; ``None`` where nobody can tell."""
        return self._spread(
            lambda sample: sample.first_token_s[question] if question < len(sample.first_token_s) else None
        )

    @property
    def kv_bytes(self) -> int | None:
        """The most keys and values that any sample held in the end."""
        return _largest(sample.kv_bytes for sample in self.samples)

    @property
    def run_bytes(self) -> int | None:
        """The most memory that any sample took beyond what was in use before it."""
        return _largest(
            sample.peak_bytes - sample.rest_bytes
            for sample in self.samples
            if sample.peak_bytes is not None and sample.rest_bytes is not None
        )

    @property
    def peak_bytes(self) -> int | None:
        """The most memory in use, models and libraries included."""
        return _largest(sample.peak_bytes for sample in self.samples)

    def _spread(self, value: Callable[[Outcome], float | None]) -> Spread | None:
        return Spread.of(found for sample in self.samples if (found := value(sample)) is not None)


@dataclass(frozen=True, slots=True)
class Difference:
    """An answer of a lossless run that is not ``generate()``'s.

    Attributes:
        suite: Where it came up.
        baseline: Whose answer.
        context: The document's nominal length.
        question: The question.
        expected: The answer of ``generate()``.
        answer: The answer that came.
        position: The first token that differs; ``None`` where only text is known.
    """

    suite: Suite
    baseline: str
    context: int
    question: str
    expected: str
    answer: str
    position: int | None = None

    @classmethod
    def between(
        cls, expected: Answer, answer: Answer, *, suite: Suite, baseline: str, context: int, question: str
    ) -> Difference | None:
        """The difference between two answers; ``None`` when they are equal."""
        if answer.same_as(expected):
            return None
        position = None
        if answer.token_ids is not None and expected.token_ids is not None:
            pairs = zip(answer.token_ids, expected.token_ids, strict=False)
            shorter = min(len(answer.token_ids), len(expected.token_ids))
            position = next((i for i, (left, right) in enumerate(pairs) if left != right), shorter)
        return cls(suite, baseline, context, question, expected.text, answer.text, position)


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """A benchmark's results.

    Attributes:
        cells: In the order of the tables.
        differences: Of lossless runs from ``generate()``.
        settings: What it was run with.
        hardware: What it was run on.
        versions: Of Python and the packages that matter.
    """

    cells: tuple[Cell, ...]
    differences: tuple[Difference, ...]
    settings: Mapping[str, Any]
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]

    def of(self, suite: Suite) -> list[Cell]:
        """The cells of one suite."""
        return [cell for cell in self.cells if cell.suite == suite]

    def beside(self, cell: Cell, baseline: str) -> Cell | None:
        """Another baseline's cell on the same work, the retrieval aside."""
        return next(
            (
                other
                for other in self.cells
                if other.baseline == baseline and _work_of(other) == _work_of(cell)
            ),
            None,
        )

    def bound(self, cell: Cell) -> SpeedBound | None:
        """The bound on a cell's speed; ``None`` where nothing was drafted or plain decoding not measured.

        Only of questions that are asked one at a time: the times of requests in company overlap.
        """
        plain = self.beside(cell, "plain")
        if plain is None or cell.together:
            return None
        return SpeedBound.of(cell.stats, plain.stats)

    @property
    def compared(self) -> int:
        """Answers of lossless runs that were compared with the reference."""
        return sum(cell.compared for cell in self.cells)

    @property
    def equal(self) -> int:
        """How many of these were equal."""
        return sum(cell.equal for cell in self.cells)

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold, with every sample."""
        return {
            "settings": dict(self.settings),
            "hardware": dict(self.hardware),
            "versions": dict(self.versions),
            "cells": [dataclasses.asdict(cell) | {"figures": self._figures(cell)} for cell in self.cells],
            "differences": [dataclasses.asdict(difference) for difference in self.differences],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> BenchmarkReport:
        """The report that :meth:`as_dict` made plain data of.

        Raises:
            ConfigurationError: It is no such data.
        """
        try:
            return cls(
                cells=tuple(_stored_cell(cell) for cell in stored["cells"]),
                differences=tuple(_stored_difference(each) for each in stored["differences"]),
                settings=stored["settings"],
                hardware=stored["hardware"],
                versions=stored["versions"],
            )
        except (KeyError, TypeError) as error:
            raise ConfigurationError(f"these are no results of rapid bench: {error!r}.") from error

    def _figures(self, cell: Cell) -> dict[str, Any]:
        """What the tables show of a cell; derived, for whoever reads the file without this package."""
        bound, stats = self.bound(cell), cell.stats
        spreads = {
            "wall_s": cell.wall_s,
            "prefill_s": cell.prefill_s,
            "first_token_s": cell.first_token_s(),
            "decode_tokens_per_s": None if cell.together else cell.decode_tokens_per_s,
            "tokens_per_s": cell.tokens_per_s,
        }
        return {
            **{name: None if each is None else dataclasses.asdict(each) for name, each in spreads.items()},
            "acceptance_rate": stats.acceptance_rate if stats.drafted_tokens else None,
            "tokens_per_round": stats.tokens_per_round or None,
            "kv_bytes": cell.kv_bytes,
            "run_bytes": cell.run_bytes,
            "bound": None if bound is None else dataclasses.asdict(bound) | {"share": bound.share},
        }


def _work_of(cell: Cell) -> tuple[Any, ...]:
    return cell.suite, cell.context, cell.batch, cell.together, cell.cold


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


# Names in result files of version 0.1.0.
_FORMER_NAMES = {"contestant": "baseline", "reading": "prefill"}


def _stored_difference(stored: Mapping[str, Any]) -> Difference:
    fields = {_FORMER_NAMES.get(name, name): value for name, value in stored.items()}
    return Difference(**{**fields, "suite": _FORMER_NAMES.get(fields["suite"], fields["suite"])})


def _stored_cell(stored: Mapping[str, Any]) -> Cell:
    fields = {_FORMER_NAMES.get(name, name): value for name, value in stored.items() if name != "figures"}
    fields["suite"] = _FORMER_NAMES.get(fields["suite"], fields["suite"])
    return Cell(**{**fields, "samples": tuple(_stored_outcome(sample) for sample in stored["samples"])})


def _stored_outcome(stored: Mapping[str, Any]) -> Outcome:
    answers: Sequence[Mapping[str, Any]] = stored["answers"]
    return Outcome(
        **{
            **stored,
            "answers": tuple(
                Answer(a["text"], None if a["token_ids"] is None else tuple(a["token_ids"])) for a in answers
            ),
            # A sum of requests has no chunks.
            "stats": RapidStats.from_dict({**stored["stats"], "retrieved_chunks": ()}),
            "first_token_s": tuple(stored["first_token_s"]),
        }
    )
