"""Results by groups of questions: domains, RULER's tasks, ∞Bench's subsets, LongBench v2's lengths."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rapid_integrations.evaluation.methods.settings import Setting
from rapid_integrations.evaluation.results.answer_record import AnswerRecord

ALL = "all"


def are_grouped(records: Sequence[AnswerRecord]) -> bool:
    """Whether the questions belong to several domains, tasks or subsets."""
    return len({record.kind.split(", ")[0] for record in records}) > 1


def group_rows(records: Sequence[AnswerRecord]) -> list[dict[str, Any]]:
    """Mean scores over all questions, and over each group.

    Args:
        records: Answers. A question belongs to each group in its kind, separated by ``", "``.

    Returns:
        Rows with ``context`` (tokens), ``group``, ``method``, ``setting``, ``questions`` and ``score`` in
        [0, 1]. Contexts and groups are in the order of their first occurrence; groups that kinds name first
        precede the others.
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
