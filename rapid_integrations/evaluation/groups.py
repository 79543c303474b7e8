"""Results by groups of questions: RULER's tasks, ∞Bench's subsets, LongBench v2's lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from rapid_integrations.evaluation.report import AnswerRecord

ALL = "all"


def group_rows(records: Sequence[AnswerRecord]) -> list[dict[str, Any]]:
    """Mean scores of every group, after those of all questions.

    Args:
        records: Answers. A question belongs to each group that its kind names, ``", "`` between them.

    Returns:
        Rows with ``context`` (tokens), ``group``, ``method``, ``questions`` and ``score`` in [0, 1]. Contexts
        are in the order in which they come, and so are groups, those that kinds name first before the others.
    """
    scores: dict[tuple[int, str, str], list[float]] = {}
    places: dict[str, int] = {}
    for record in records:
        for place, group in enumerate((ALL, *(name for name in record.kind.split(", ") if name))):
            places.setdefault(group, place)
            scores.setdefault((record.context, group, record.method), []).append(record.score)
    contexts = list(dict.fromkeys(context for context, _, _ in scores))
    groups = sorted(places, key=lambda group: places[group])
    order = sorted(scores, key=lambda cell: (contexts.index(cell[0]), groups.index(cell[1])))
    return [
        {
            "context": context,
            "group": group,
            "method": method,
            "questions": len(scores[context, group, method]),
            "score": sum(scores[context, group, method]) / len(scores[context, group, method]),
        }
        for context, group, method in order
    ]


def group_table(records: Sequence[AnswerRecord], methods: Sequence[str]) -> Table:
    """A row for each group, a column for each method, scores in per cent.

    Args:
        records: Answers.
        methods: Names, in the order of the columns.
    """
    from rapid_integrations.evaluation.tables import context_label

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("context", "group"):
        table.add_column(column, no_wrap=True)
    for column in ("questions", *methods):
        table.add_column(column, justify="right", no_wrap=True)
    rows = group_rows(records)
    cells = {(row["context"], row["group"], row["method"]): row for row in rows}
    shown = None
    for context, group in dict.fromkeys((row["context"], row["group"]) for row in rows):
        found = {name: cells[context, group, name] for name in methods if (context, group, name) in cells}
        table.add_row(
            context_label(context) if context != shown else "",
            group,
            str(next(iter(found.values()))["questions"]),
            *(f"{found[name]['score'] * 100:.1f}" if name in found else "–" for name in methods),
        )
        shown = context
    return table
