"""Tables of results for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from rich import box
from rich.table import Table
from rich.text import Text

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.methods.choice import make_method
from rapid_integrations.evaluation.results.answer_record import AnswerRecord
from rapid_integrations.evaluation.results.groups import group_rows
from rapid_integrations.evaluation.results.report import EvaluationReport, MethodResult
from rapid_integrations.evaluation.running.matching import Match
from rapid_integrations.evaluation.scoring.answer_metrics import GRADED_METRICS

NOTHING = "–"
_TEXT_COLUMNS = ("answers", "asked", "batch", "context", "group", "method", "model", "retrieval")
_PLAIN = "lc"


def context_label(tokens: int) -> str:
    """A context length for display: ``4k`` for 4,096, ``600`` for 600."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else f"{tokens:,}"


def make_table(title: str | None, *columns: str) -> Table:
    """An empty table: columns of text are left-aligned, columns of numbers right-aligned."""
    # Two spaces between columns, so that the table fits into 80 characters.
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False,
        pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for column in columns:
        is_text = column in _TEXT_COLUMNS
        table.add_column(column, justify="left" if is_text else "right", no_wrap=is_text)
    return table


def method_label(name: str) -> str:
    """A method's label for display; an unknown method is shown by its name."""
    try:
        return make_method(name).label
    except ConfigurationError:
        return name


def report_table(report: EvaluationReport) -> Table:
    """Accuracy with its confidence interval, acceptance, tokens per round and speed of every result."""
    graded = GRADED_METRICS.intersection(report.settings.get("metrics", ()))
    table = make_table(
        None,
        "context",
        "method",
        "score" if graded else "right",
        "95 %",
        "accepted",
        "tok/round",
        "tok/s",
        "speed",
    )
    contexts = list(dict.fromkeys(result.context for result in report.results))
    for context in contexts:
        rows = [result for result in report.results if result.context == context]
        plain = _plain_speed(rows)
        for i, row in enumerate(rows):
            accuracy = row.accuracy
            table.add_row(
                context_label(context) if i == 0 else "",
                method_label(row.method),
                f"{accuracy.value:.1%}".replace("%", " %"),
                f"{accuracy.low * 100:.0f}–{accuracy.high * 100:.0f}",
                *_speculation(row),
                *_speed(row, plain),
                end_section=i == len(rows) - 1,
            )
    return table


def demo_table(report: EvaluationReport) -> Table:
    """One row for each method: its answers, speed, acceptance, tokens per round and time to the first token.

    The time is the median over the questions, in seconds. Of three or more questions about one document, the
    median is that of a question for which the document was already prefilled.
    """
    table = make_table(
        None, "method", "answers", "right", "tok/s", "speed", "accepted", "tok/round", "1st token"
    )
    plain = _plain_speed(report.results)
    for row in report.results:
        answers = [record for record in report.answers if record.method == row.method]
        right = f"{row.accuracy.successes}/{row.questions}"
        first = median(record.stats.retrieval_s + record.stats.time_to_first_token_s for record in answers)
        table.add_row(
            method_label(row.method),
            answer_marks(answers),
            right,
            *_speed(row, plain),
            *_speculation(row),
            f"{first:.1f} s",
        )
    return table


def group_table(records: Sequence[AnswerRecord], methods: Sequence[str]) -> Table:
    """A row for each group, a column for each method, scores in per cent.

    Args:
        records: Answers.
        methods: Names, in the order of the columns.
    """
    table = make_table(None, "context", "group", "questions", *methods)
    rows = group_rows(records)
    cells = {(row["context"], row["group"], row["method"]): row for row in rows}
    last_context = None
    for context, group in dict.fromkeys((row["context"], row["group"]) for row in rows):
        row = {name: cells[context, group, name] for name in methods if (context, group, name) in cells}
        table.add_row(
            context_label(context) if context != last_context else "",
            group,
            str(next(iter(row.values()))["questions"]),
            *(f"{row[name]['score'] * 100:.1f}" if name in row else NOTHING for name in methods),
        )
        last_context = context
    return table


def answer_marks(records: Sequence[AnswerRecord]) -> Text:
    """A tick or a cross for each answer."""
    return Text.assemble(*(("✓", "green") if record.correct else ("✗", "red") for record in records))


def match_line(match: Match) -> str:
    """One line about the tuning of a method to another method's acceptance."""
    return (
        f"{method_label(match.method.name)}: {match.option}={match.value:.3g} accepts "
        f"{match.acceptance:.1%} on the calibration questions, where {match.wanted:.1%} was wanted"
    ).replace("%", " %")


def settings_line(settings: Mapping[str, object]) -> str:
    """One line about the models, the retrieval and the device of a run."""
    target, drafter = Path(str(settings["target"])).name, Path(str(settings["drafter"])).name
    qualities = str(settings["retrieval"]).replace(",", ", ")
    return (
        f"target {target}, drafter {drafter}, {qualities} retrieval, "
        f"{settings['device']} with {settings['threads']} threads"
    )


def _plain_speed(results: Sequence[MethodResult]) -> float:
    """Tokens per second of plain decoding over the whole document; 0 if it was not measured."""
    return next((result.stats.decode_tokens_per_s for result in results if result.method == _PLAIN), 0.0)


def _speculation(row: MethodResult) -> tuple[str, str]:
    rate = row.acceptance_rate
    accepted = NOTHING if rate is None else f"{rate * 100:.0f} %"
    return accepted, f"{row.stats.tokens_per_round:.1f}"


def _speed(row: MethodResult, plain: float) -> tuple[str, str]:
    speed = row.stats.decode_tokens_per_s
    return f"{speed:.0f}", f"{speed / plain:.1f}×" if plain else NOTHING
