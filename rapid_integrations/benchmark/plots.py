"""The plots of ``rapid bench`` as PNG files. They need matplotlib, which the extra ``bench`` installs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rapid_integrations.benchmark.baselines import BASELINES
from rapid_integrations.benchmark.results import BenchmarkReport, Cell, Spread
from rapid_integrations.benchmark.tables import method_label, round_seconds
from rapid_integrations.evaluation.plotting import check_plotting, drawn, legend, scale
from rapid_integrations.evaluation.tables import context_label

NEEDED = ("--plot", "bench")
"""The option that needs matplotlib, and the extra that installs it."""

_COLOURS = {"draft": "#e69f00", "verify": "#0072b2", "host": "#999999"}


def write_plots(report: BenchmarkReport, folder: Path) -> list[Path]:
    """Draw the suites that were measured.

    Args:
        report: The results.
        folder: The folder of the files; created if it does not exist.

    Returns:
        The files written: ``speed_over_context.png``, ``share_of_the_bound.png`` and ``round.png`` if
        decoding was measured, ``speed_over_batch.png`` if batches were.

    Raises:
        ConfigurationError: matplotlib is not installed.
        OSError: A file cannot be written.
    """
    check_plotting(*NEEDED)
    folder.mkdir(parents=True, exist_ok=True)
    bounded = [cell for cell in report.of("decode") if report.bound(cell)]
    drawings: tuple[tuple[str, Sequence[Cell], Callable[[Any], None]], ...] = (
        ("speed_over_context.png", report.of("decode"), lambda axes: _speed_over_context(axes, report)),
        ("share_of_the_bound.png", bounded, lambda axes: _share_of_the_bound(axes, report, bounded)),
        ("round.png", bounded, lambda axes: _round(axes, report)),
        ("speed_over_batch.png", report.of("batch"), lambda axes: _speed_over_batch(axes, report)),
    )
    written = []
    for name, cells, draw in drawings:
        if cells:
            written.append(drawn(folder / name, draw))
    return written


def _speed_over_context(axes: Any, report: BenchmarkReport) -> None:
    cells = report.of("decode")
    _draw_speeds(axes, cells, lambda cell: cell.context, lambda cell: cell.decode_tokens_per_s)
    scale(axes, sorted({cell.context for cell in cells}), context_label)
    axes.set_yscale("log")
    axes.set(xlabel="context, tokens", ylabel="tokens/s", title="Decoding, the document read before")
    legend(axes)


def _speed_over_batch(axes: Any, report: BenchmarkReport) -> None:
    cells = report.of("batch")
    _draw_speeds(axes, cells, lambda cell: cell.batch, lambda cell: cell.tokens_per_s)
    scale(axes, sorted({cell.batch for cell in cells}), str)
    context = context_label(cells[0].context)
    axes.set(
        xlabel="questions at once", ylabel="tokens/s of all", title=f"One document of {context}, read before"
    )
    axes.set_ylim(bottom=0)
    legend(axes)


def _share_of_the_bound(axes: Any, report: BenchmarkReport, cells: Sequence[Cell]) -> None:
    for label, line in _lines(cells):
        bounds = [(cell.context, bound) for cell in line if (bound := report.bound(cell)) is not None]
        axes.plot([x for x, _ in bounds], [b.share * 100 for _, b in bounds], marker="o", label=label)
    scale(axes, sorted({cell.context for cell in cells}), context_label)
    axes.axhline(100, color="black", linewidth=0.8)
    axes.set(xlabel="context, tokens", ylabel="% of E / (1 + γc + o)", title="Share of the measured bound")
    axes.set_ylim(bottom=0)
    legend(axes)


def _round(axes: Any, report: BenchmarkReport) -> None:
    """A waterfall chart of one round of each baseline that uses the engine, at the longest context."""
    decode = report.of("decode")
    longest = max(cell.context for cell in decode)
    cells = [cell for cell in decode if cell.context == longest and BASELINES[cell.baseline].uses_engine]
    for row, cell in enumerate(cells):
        start = 0.0
        for part, seconds in round_seconds(cell.stats).items():
            label = part if row == 0 else None
            axes.barh(row, seconds * 1e3, left=start, color=_COLOURS[part], label=label, height=0.6)
            start += seconds * 1e3
        axes.text(start, row, f" {cell.stats.tokens_per_round:.1f} tokens", va="center", fontsize="small")
    axes.set_yticks(range(len(cells)), [method_label(cell) for cell in cells])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="milliseconds", title=f"One round at {context_label(longest)} tokens of context")
    legend(axes)


def _lines(cells: Iterable[Cell]) -> list[tuple[str, list[Cell]]]:
    """The cells of each label, in the order of the report."""
    lines: dict[str, list[Cell]] = {}
    for cell in cells:
        lines.setdefault(method_label(cell), []).append(cell)
    return list(lines.items())


def _draw_speeds(
    axes: Any, cells: Iterable[Cell], x: Callable[[Cell], int], speed: Callable[[Cell], Spread | None]
) -> None:
    """Draw a line per label through the medians, with the range of the samples as error bars."""
    for label, line in _lines(cells):
        points = [(x(cell), spread) for cell in line if (spread := speed(cell)) is not None]
        medians = [spread.median for _, spread in points]
        below = [spread.median - spread.low for _, spread in points]
        above = [spread.high - spread.median for _, spread in points]
        axes.errorbar(
            [place for place, _ in points], medians, yerr=[below, above], marker="o", capsize=2, label=label
        )
