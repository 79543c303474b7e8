"""The tables of ``rapid bench`` in the terminal, one or more for each suite.

A figure is the median of its samples, followed by the largest deviation of a sample from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

from rapid_integrations.benchmark.baselines import BASELINES, GENERATE, PLAIN, Baseline
from rapid_integrations.benchmark.bound import host_s
from rapid_integrations.benchmark.results import BenchmarkReport, Cell, Spread, Suite
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.evaluation.tables import NOTHING, context_label, make_table

_MEBIBYTE = 2**20


def tables(report: BenchmarkReport) -> Iterator[Table]:
    """The tables of the suites that were measured."""
    makers: tuple[tuple[Suite, Callable[[BenchmarkReport], Table]], ...] = (
        ("prefill", prefill_table),
        ("decode", decode_table),
        ("decode", bound_table),
        ("decode", time_table),
        ("batch", batch_table),
        ("questions", questions_table),
        ("end-to-end", host_table),
    )
    for suite, make in makers:
        if report.of(suite) and (table := make(report)).row_count:
            yield table


def method_label(cell: Cell) -> str:
    """The label of a cell's baseline, with the quality of the drafter's context if it affects the result."""
    baseline = BASELINES[cell.baseline]
    if cell.retrieval is None or baseline.lossless or cell.cold:
        return baseline.label
    return f"{baseline.label}, {cell.retrieval}"


def prefill_table(report: BenchmarkReport) -> Table:
    """One question about a document that no cache holds."""
    table = make_table(
        "One question about a document that has to be read, seconds",
        "context", "method", "prefill", "first token", "answer", "KV MiB", "run MiB", "runs",
    )  # fmt: skip
    for first, cell in _by_context(report.of("prefill")):
        table.add_row(
            first,
            method_label(cell),
            *(spread_label(spread, 2) for spread in (cell.prefill_s, cell.first_token_s(), cell.wall_s)),
            _mebibytes(cell.kv_bytes),
            _mebibytes(cell.run_bytes),
            str(len(cell.samples)),
        )
    return table


def decode_table(report: BenchmarkReport) -> Table:
    """Decoding alone: tokens per second after the prefill."""
    table = make_table(
        "Decoding, one question at a time, the document read before",
        "context", "method", "tokens/s", "× generate()", "× plain", "equal", "right", "runs",
    )  # fmt: skip
    for first, cell in _by_context(report.of("decode")):
        table.add_row(
            first,
            method_label(cell),
            spread_label(cell.decode_tokens_per_s, 0),
            *(_times(report, cell, other, lambda c: c.decode_tokens_per_s) for other in (GENERATE, PLAIN)),
            _equal(cell),
            f"{cell.right}/{cell.asked}",
            str(len(cell.samples)),
        )
    return table


def bound_table(report: BenchmarkReport) -> Table:
    """The bound on the speed of speculation by the run's own costs, and the share of it that was reached."""
    table = make_table(
        "The bound E / (1 + γc + o), in tokens per target step",
        "context", "method", "accepted", "α", "γ", "E", "c", "o", "bound", "reached", "share",
    )  # fmt: skip
    for first, cell in _by_context([cell for cell in report.of("decode") if report.bound(cell)]):
        if (bound := report.bound(cell)) is None:
            continue
        table.add_row(
            first,
            method_label(cell),
            f"{cell.stats.acceptance_rate * 100:.0f} %",
            f"{bound.acceptance:.2f}",
            f"{bound.num_draft_tokens:.1f}",
            f"{bound.expected_tokens:.2f}",
            f"{bound.draft_cost:.3f}",
            f"{bound.host_cost:.3f}",
            f"{bound.speed_up:.2f}",
            f"{bound.reached:.2f}",
            f"{bound.share * 100:.0f} %",
        )
    return table


def time_table(report: BenchmarkReport) -> Table:
    """The engine's time per round by its parts, and the time per question before decoding."""
    table = make_table(
        "Where the time goes, milliseconds (retrieval and prefill per question, the rest per round)",
        "context", "method", "tokens/round", "retrieval", "prefill", "draft", "verify", "host",
    )  # fmt: skip
    engine_cells = [cell for cell in report.of("decode") if BASELINES[cell.baseline].uses_engine]
    for first, cell in _by_context(engine_cells):
        stats, questions = cell.stats, cell.batch * len(cell.samples)
        table.add_row(
            first,
            method_label(cell),
            f"{stats.tokens_per_round:.2f}",
            *(f"{seconds / questions * 1e3:.1f}" for seconds in (stats.retrieval_s, stats.prefill_s)),
            *(f"{seconds * 1e3:.2f}" for seconds in round_seconds(stats).values()),
        )
    return table


def round_seconds(stats: RapidStats) -> dict[str, float]:
    """Mean seconds of a round by its parts: ``draft``, ``verify`` and ``host``."""
    spent = {"draft": stats.draft_s, "verify": stats.verify_s, "host": host_s(stats)}
    return {name: seconds / stats.rounds if stats.rounds else 0.0 for name, seconds in spent.items()}


def batch_table(report: BenchmarkReport) -> Table:
    """Several questions at the same time, about a document that is cached."""
    cells = report.of("batch")
    context = context_label(cells[0].context)
    table = make_table(
        f"Questions at once on one document of {context}, read before: tokens/s of all",
        "batch", "method", "tokens/s", "× generate()", "× plain", "equal", "run MiB", "runs",
    )  # fmt: skip
    for first, cell in _grouped(cells, lambda cell: str(cell.batch)):
        table.add_row(
            first,
            method_label(cell),
            spread_label(cell.tokens_per_s, 0),
            *(_times(report, cell, other, lambda c: c.tokens_per_s) for other in (GENERATE, PLAIN)),
            _equal(cell),
            _mebibytes(cell.run_bytes),
            str(len(cell.samples)),
        )
    return table


def questions_table(report: BenchmarkReport) -> Table:
    """Several questions about a document that no cache holds, one after the other or at the same time."""
    cells = report.of("questions")
    table = make_table(
        f"{cells[0].batch} questions on one document of {context_label(cells[0].context)}, reading included",
        "method", "asked", "seconds", "1st token", "of 2nd", "equal", "right", "KV MiB", "run MiB", "runs",
    )  # fmt: skip
    for cell in cells:
        second = cell.first_token_s(1)
        table.add_row(
            method_label(cell),
            "at once" if cell.together else "in turn",
            spread_label(cell.wall_s, 2),
            _number(cell.first_token_s(), 2),
            NOTHING if cell.together else _number(second, 3),
            _equal(cell),
            f"{cell.right}/{cell.asked}",
            _mebibytes(cell.kv_bytes),
            _mebibytes(cell.run_bytes),
            str(len(cell.samples)),
        )
    return table


def host_table(report: BenchmarkReport) -> Table:
    """Several questions about a document that no cache holds, through the classes of the host frameworks."""
    cells = report.of("end-to-end")
    slowest = max((cell.wall_s.median for cell in cells if cell.wall_s), default=0.0)
    table = make_table(
        f"{cells[0].batch} questions on one document of {context_label(cells[0].context)} by the frameworks",
        "method", "seconds", "a question", "faster", "equal", "run MiB", "runs",
    )  # fmt: skip
    for cell in cells:
        wall = cell.wall_s
        table.add_row(
            method_label(cell),
            spread_label(wall, 1),
            NOTHING if wall is None else f"{wall.median / cell.batch:.2f}",
            NOTHING if wall is None else f"{slowest / wall.median:.1f}×",
            _equal(cell),
            _mebibytes(cell.run_bytes),
            str(len(cell.samples)),
        )
    return table


def table_console(width: int) -> Console:
    """A console on stdout. A terminal keeps its own width; a file or pipe gets ``width`` columns."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def _by_context(cells: Sequence[Cell]) -> Iterator[tuple[str, Cell]]:
    return _grouped(cells, lambda cell: context_label(cell.context))


def _grouped(cells: Sequence[Cell], label: Callable[[Cell], str]) -> Iterator[tuple[str, Cell]]:
    """Each cell with its group's label, or with ``""`` unless it is the first of its group."""
    previous = None
    for cell in cells:
        current = label(cell)
        yield ("" if current == previous else current), cell
        previous = current


def spread_label(spread: Spread | None, digits: int) -> str:
    """The median, and the largest deviation from it in per cent."""
    if spread is None:
        return NOTHING
    median = f"{spread.median:.{digits}f}"
    if spread.count == 1:
        return median
    farthest = max(spread.median - spread.low, spread.high - spread.median)
    return f"{median} ±{farthest / spread.median * 100:.0f} %"


def _number(spread: Spread | None, digits: int) -> str:
    return NOTHING if spread is None else f"{spread.median:.{digits}f}"


def _times(
    report: BenchmarkReport, cell: Cell, baseline: Baseline, speed: Callable[[Cell], Spread | None]
) -> str:
    """The speed relative to another baseline."""
    other = report.beside(cell, baseline.name)
    own_speed, other_speed = speed(cell), None if other is None else speed(other)
    if own_speed is None or other_speed is None:
        return NOTHING
    return f"{own_speed.median / other_speed.median:.2f}"


def _equal(cell: Cell) -> str:
    """The share of answers equal to ``generate()``'s; a dash if they may differ by design."""
    return f"{cell.equal}/{cell.compared}" if cell.compared else NOTHING


def _mebibytes(size: int | None) -> str:
    return NOTHING if size is None else f"{size / _MEBIBYTE:,.0f}"
