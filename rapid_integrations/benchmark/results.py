"""The results of a benchmark: all samples, the figures derived from them, and their JSON form.

A report has one :class:`Cell` per baseline and piece of work, and one :class:`Difference` per answer of a
lossless baseline that does not equal ``generate()``'s. Result files of earlier versions can still be read.
"""

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
"""A part of the benchmark; see the README for what each measures."""

EARLIER_SUITE_NAMES: Mapping[str, Suite] = {"reading": "prefill"}
"""Names of suites in earlier versions, which the command line and result files may still use."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median and range of several measurements.

    Attributes:
        median: Their median.
        low: The smallest.
        high: The largest.
        count: The number of measurements.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """The spread of these measurements; ``None`` if there are none."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1], len(ordered)) if ordered else None


@dataclass(frozen=True, slots=True)
class Cell:
    """The measurements of one baseline on one piece of work.

    Attributes:
        suite: The part of the benchmark that it belongs to.
        baseline: The baseline's name.
        context: The document's nominal length in tokens.
        batch: The number of questions.
        together: Whether the questions were asked at the same time.
        cold: Whether the run includes the prefill of the document.
        retrieval: The quality of the drafter's context; ``None`` if there is no drafter.
        samples: One outcome per repetition.
        compared: The number of answers compared with ``generate()``'s.
        equal: The number of these that were equal.
        asked: The number of questions of one repetition that have a known correct answer.
        right: The number of these that were correct.
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
        """Seconds of prefill, of both models."""
        return self._spread(lambda sample: sample.stats.prefill_s or None)

    @property
    def decode_tokens_per_s(self) -> Spread | None:
        """Tokens per second after the prefill, of questions asked one at a time."""
        return self._spread(lambda sample: sample.stats.decode_tokens_per_s or None)

    @property
    def tokens_per_s(self) -> Spread | None:
        """Tokens per second from the first call to the last answer."""
        return self._spread(lambda sample: sample.stats.completion_tokens / sample.wall_s or None)

    def first_token_s(self, question: int = 0) -> Spread | None:
        """Seconds to a question's first token; ``None`` if the baseline does not report it."""
        return self._spread(
            lambda sample: sample.first_token_s[question] if question < len(sample.first_token_s) else None
        )

    @property
    def kv_bytes(self) -> int | None:
        """Bytes of keys and values at the end of a run, the maximum of all samples."""
        return _largest(sample.kv_bytes for sample in self.samples)

    @property
    def run_bytes(self) -> int | None:
        """Bytes in use during a run beyond those in use before it, the maximum of all samples."""
        return _largest(
            sample.peak_bytes - sample.rest_bytes
            for sample in self.samples
            if sample.peak_bytes is not None and sample.rest_bytes is not None
        )

    @property
    def peak_bytes(self) -> int | None:
        """Bytes in use, models and libraries included, the maximum of all samples."""
        return _largest(sample.peak_bytes for sample in self.samples)

    def _spread(self, value: Callable[[Outcome], float | None]) -> Spread | None:
        return Spread.of(number for sample in self.samples if (number := value(sample)) is not None)


@dataclass(frozen=True, slots=True)
class Difference:
    """An answer of a lossless baseline that does not equal ``generate()``'s.

    Attributes:
        suite: The suite in which it occurred.
        baseline: The name of the baseline that answered.
        context: The document's nominal length in tokens.
        question: The question.
        expected: The answer of ``generate()``.
        answer: The baseline's answer.
        position: The index of the first token that differs; ``None`` if only the text is known.
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
        """The difference between two answers; ``None`` if they are equal."""
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
    """The results of a benchmark.

    Attributes:
        cells: All cells, in the order of the tables.
        differences: The answers of lossless baselines that differ from ``generate()``'s.
        settings: The plan, the models, and the run time in seconds.
        hardware: The machine, and the devices that the runtimes used.
        versions: Versions of Python and of the packages that affect the results.
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
        """Another baseline's cell on the same work; its retrieval may differ."""
        matches = (c for c in self.cells if c.baseline == baseline and _work_of(c) == _work_of(cell))
        return next(matches, None)

    def bound(self, cell: Cell) -> SpeedBound | None:
        """The bound on a cell's speed; ``None`` if nothing was drafted or plain decoding was not measured.

        It is defined only for questions asked one at a time, because the times of concurrent requests
        overlap.
        """
        plain = self.beside(cell, "plain")
        if plain is None or cell.together:
            return None
        return SpeedBound.of(cell.stats, plain.stats)

    @property
    def compared(self) -> int:
        """The number of answers compared with the reference."""
        return sum(cell.compared for cell in self.cells)

    @property
    def equal(self) -> int:
        """The number of compared answers that equal the reference."""
        return sum(cell.equal for cell in self.cells)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON data, with all samples."""
        return {
            "settings": dict(self.settings),
            "hardware": dict(self.hardware),
            "versions": dict(self.versions),
            "cells": [dataclasses.asdict(cell) | {"figures": self._figures(cell)} for cell in self.cells],
            "differences": [dataclasses.asdict(difference) for difference in self.differences],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> BenchmarkReport:
        """Read a report from the data of :meth:`as_dict`, of this version or an earlier one.

        Raises:
            ConfigurationError: The data does not have that form.
        """
        try:
            return cls(
                cells=tuple(_stored_cell(cell) for cell in stored["cells"]),
                differences=tuple(Difference(**_renamed(difference)) for difference in stored["differences"]),
                settings=stored["settings"],
                hardware=stored["hardware"],
                versions=stored["versions"],
            )
        except (KeyError, TypeError) as error:
            raise ConfigurationError(f"this is not a result file of rapid bench: {error!r}.") from error

    def _figures(self, cell: Cell) -> dict[str, Any]:
        """Derived figures of a cell, for readers of the file who do not have this package."""
        bound, stats = self.bound(cell), cell.stats
        spreads = {
            "wall_s": cell.wall_s,
            "prefill_s": cell.prefill_s,
            "first_token_s": cell.first_token_s(),
            "decode_tokens_per_s": None if cell.together else cell.decode_tokens_per_s,
            "tokens_per_s": cell.tokens_per_s,
        }
        return {
            **{
                name: None if spread is None else dataclasses.asdict(spread)
                for name, spread in spreads.items()
            },
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


def _renamed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stored cell or difference, with the names of earlier versions replaced."""
    renamed = dict(stored)
    if "contestant" in renamed:
        renamed["baseline"] = renamed.pop("contestant")
    renamed["suite"] = EARLIER_SUITE_NAMES.get(renamed["suite"], renamed["suite"])
    return renamed


def _stored_cell(stored: Mapping[str, Any]) -> Cell:
    fields = _renamed(stored)
    fields.pop("figures", None)
    return Cell(**{**fields, "samples": tuple(_stored_outcome(sample) for sample in fields["samples"])})


def _stored_outcome(stored: Mapping[str, Any]) -> Outcome:
    answers: Sequence[Mapping[str, Any]] = stored["answers"]
    return Outcome(
        **{
            **stored,
            "answers": tuple(
                Answer(a["text"], None if a["token_ids"] is None else tuple(a["token_ids"])) for a in answers
            ),
            # Statistics summed over requests have no retrieved chunks.
            "stats": RapidStats.from_dict({**stored["stats"], "retrieved_chunks": ()}),
            "first_token_s": tuple(stored["first_token_s"]),
        }
    )
