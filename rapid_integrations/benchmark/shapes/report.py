"""The results of ``rapid bench-shape``: measurements, the figures derived from them, and their tables."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from rapid_integrations.benchmark.bound import SpeedBound, conditional_acceptance
from rapid_integrations.benchmark.results import Spread
from rapid_integrations.benchmark.tables import spread_label
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.evaluation.tables import NOTHING, make_table

GENERATE, PLAIN, DRAFTED = "generate()", "ours, plain", "ours, η = 0"
"""The methods that are measured: transformers alone, and the engine without and with drafts."""


@dataclass(frozen=True, slots=True)
class ShapeRun:
    """One measurement of concurrent requests. Their prompts were cached before.

    Attributes:
        wall_s: Seconds from the first request to the last token.
        stats: Counts and times of all requests, summed. Times of shared passes are counted once for each
            request.
    """

    wall_s: float
    stats: RapidStats

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all requests together."""
        return self.stats.completion_tokens / self.wall_s


@dataclass(frozen=True, slots=True)
class ShapeCell:
    """The measurements of one method on one batch.

    Attributes:
        method: :data:`GENERATE`, :data:`PLAIN` or :data:`DRAFTED`.
        batch: The number of concurrent requests.
        acceptance: The acceptance probability that was set; ``None`` if nothing is drafted.
        runs: One per repetition.
    """

    method: str
    batch: int
    acceptance: float | None
    runs: tuple[ShapeRun, ...]

    @property
    def stats(self) -> RapidStats:
        """Counts and times of all runs, summed."""
        return RapidStats.pooled(run.stats for run in self.runs)

    @property
    def tokens_per_s(self) -> Spread:
        """Tokens per second of all requests together."""
        spread = Spread.of(run.tokens_per_s for run in self.runs)
        assert spread is not None
        return spread


@dataclass(frozen=True, slots=True)
class ShapeReport:
    """The results of one ``rapid bench-shape``.

    Attributes:
        cells: All cells, in the order of the table.
        prefill_tokens_per_s: The prefill speeds of ``"target"`` and ``"drafter"``, with empty caches.
        step_bytes: The minimum of bytes that a plain target pass reads: the weights, and the keys and values
            of one prompt.
        copy_bytes_per_s: The bytes per second that the device reads and writes while it copies memory.
        settings: The plan.
        hardware: The machine and its device.
        versions: Versions of Python and of the packages that affect the results.
    """

    cells: tuple[ShapeCell, ...]
    prefill_tokens_per_s: dict[str, Spread]
    step_bytes: int
    copy_bytes_per_s: float
    settings: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, str]

    def beside(self, cell: ShapeCell, method: str) -> ShapeCell | None:
        """The cell of another method with the same batch; ``None`` if there is none."""
        return next((c for c in self.cells if (c.method, c.batch) == (method, cell.batch)), None)

    def bandwidth_share(self, cell: ShapeCell) -> float | None:
        """The read speed of a plain pass as a share of the copy speed; ``None`` for other methods."""
        if cell.method != PLAIN:
            return None
        return self.step_bytes / (cell.stats.verify_s / cell.stats.rounds) / self.copy_bytes_per_s

    def bound(self, cell: ShapeCell) -> SpeedBound | None:
        """The bound on the speed of speculation; ``None`` for concurrent requests: their times overlap."""
        plain = self.beside(cell, PLAIN)
        if cell.batch > 1 or cell.acceptance is None or plain is None:
            return None
        return SpeedBound.of(cell.stats, plain.stats)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON data, with all runs."""
        data = dataclasses.asdict(self)
        for stored, cell in zip(data["cells"], self.cells, strict=True):
            bound = self.bound(cell)
            stored["tokens_per_s"] = dataclasses.asdict(cell.tokens_per_s)
            stored["bound"] = bound and {**dataclasses.asdict(bound), "share": bound.share}
            stored["bandwidth_share"] = self.bandwidth_share(cell)
        return data


def shape_tables(report: ShapeReport) -> Iterator[Table]:
    """The tables for the terminal: prefill, then decoding."""
    plan = report.settings
    device = report.hardware.get("device_name", report.hardware["device"])
    prefill = make_table(
        f"Random weights, {report.hardware['dtype']}, {device}: prefill",
        "model", "shape", "tokens", "tokens/s", "runs",
    )  # fmt: skip
    for name in ("target", "drafter"):
        tokens = plan["context" if name == "target" else "drafter_context"]
        spread = report.prefill_tokens_per_s[name]
        prefill.add_row(name, plan[name], f"{tokens:,}", spread_label(spread, 0), str(spread.count))
    yield prefill
    decoding = make_table(
        f"Decoding after {plan['context']:,} tokens; a plain pass reads {report.step_bytes / 1e9:.2f} GB, "
        f"the device copies {report.copy_bytes_per_s / 1e9:,.0f} GB/s",
        "batch", "method", "α set", "α", "tokens/s", "× plain", "× generate()", "draft ms", "target ms",
        "bandwidth", "bound", "share",
    )  # fmt: skip
    for batch, cells in itertools.groupby(report.cells, lambda cell: cell.batch):
        for row, cell in enumerate(cells):
            decoding.add_row("" if row else str(batch), *_decoding_row(report, cell))
    yield decoding


def _decoding_row(report: ShapeReport, cell: ShapeCell) -> Iterator[str]:
    stats, bound, share = cell.stats, report.bound(cell), report.bandwidth_share(cell)
    yield cell.method
    yield NOTHING if cell.acceptance is None else f"{cell.acceptance:g}"
    yield f"{_measured_acceptance(stats):.2f}" if stats.drafted_tokens else NOTHING
    yield spread_label(cell.tokens_per_s, 1)
    for method in (PLAIN, GENERATE):
        other = report.beside(cell, method)
        yield NOTHING if other is None else f"{cell.tokens_per_s.median / other.tokens_per_s.median:.2f}"
    yield f"{stats.draft_s / stats.drafter_passes * 1e3:.2f}" if stats.drafter_passes else NOTHING
    yield f"{(stats.verify_s or stats.decode_s) / stats.rounds * 1e3:.2f}"
    yield NOTHING if share is None else f"{share * 100:.0f} %"
    yield NOTHING if bound is None else f"{bound.speed_up:.2f}"
    yield NOTHING if bound is None else f"{bound.share * 100:.0f} %"


def _measured_acceptance(stats: RapidStats) -> float:
    return conditional_acceptance(stats.accepted_tokens / stats.rounds, stats.drafted_tokens / stats.rounds)
