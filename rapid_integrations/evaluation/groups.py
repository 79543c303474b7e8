"""Results by groups of questions: domains, RULER's tasks, ∞Bench's subsets, LongBench v2's lengths."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rapid_integrations.evaluation.report import AnswerRecord
    from rapid_integrations.evaluation.settings import Setting

ALL = "all"


def are_grouped(records: Sequence[AnswerRecord]) -> bool:
    """Whether the answers are to questions of several domains, tasks or subsets."""
    return len({record.kind.split(", ")[0] for record in records}) > 1


def group_rows(records: Sequence[AnswerRecord]) -> list[dict[str, Any]]:
    """Mean scores of every group, after those of all questions.

    Args:
        records: Answers. A question belongs to each group that its kind names, ``", "`` between them.

    Returns:
        Rows with ``context`` (tokens), ``group``, ``method``, ``setting`` (in which it was asked),
        ``questions`` and ``score`` in [0, 1]. Contexts are in the order in which they come, and so are
        groups, those that kinds name first before the others.
    """
    scores: dict[tuple[int, str, str, Setting], list[float]] = {}
    places: dict[str, int] = {}
    for record in records:
        for place, group in enumerate((ALL, *(name for name in record.kind.split(", ") if name))):
            places.setdefault(group, place)
            cell = (record.context, group, record.method, record.setting)
            scores.setdefault(cell, []).append(record.score)
    contexts = list(dict.fromkeys(context for context, *_ in scores))
    groups = sorted(places, key=lambda group: places[group])
    order = sorted(scores, key=lambda cell: (contexts.index(cell[0]), groups.index(cell[1])))
    return [
        {
            "context": context,
            "group": group,
            "method": method,
            "setting": setting.as_dict(),
            "questions": len(scores[context, group, method, setting]),
            "score": statistics.fmean(scores[context, group, method, setting]),
        }
        for context, group, method, setting in order
    ]
