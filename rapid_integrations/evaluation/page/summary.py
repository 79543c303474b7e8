"""The figures of the page, computed from the answers of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rapid_integrations.config import GenerationOptions
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.methods.choice import make_method
from rapid_integrations.evaluation.methods.settings import Setting
from rapid_integrations.evaluation.results.answer_record import AnswerRecord
from rapid_integrations.evaluation.results.groups import are_grouped, group_rows
from rapid_integrations.evaluation.results.report import EvaluationReport, MethodResult
from rapid_integrations.evaluation.scoring.intervals import Difference, Proportion, wilson_interval

PLAIN, RETRIEVED = "lc", "rag"
SPLIT = {
    (True, True): "both right",
    (True, False): "only long context right",
    (False, True): "only retrieved right",
    (False, False): "both wrong",
}

QuestionKey = tuple[int, int]
"""A question's document and its number in the document."""


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one context length in one setting.

    Attributes:
        result: Its figures.
        prefill_s: Mean seconds of a prefill. Prompts of later questions mostly reuse a cached prefix.
        unread_prefill_s: The mean over prompts that reused less than half of their tokens; ``None`` if there
            is none, because other methods prefilled the documents first.
        speed_up: Decoding speed divided by that of long context; ``None`` if that was not measured.
    """

    result: MethodResult
    prefill_s: float
    unread_prefill_s: float | None
    speed_up: float | None


@dataclass(frozen=True, slots=True)
class SplitGroup:
    """The questions with one outcome of long context and of the retrieved chunks alone.

    Attributes:
        name: A value of :data:`SPLIT`.
        questions: Number of questions.
        right: Share of correct answers of each other method; empty if there are no questions.
    """

    name: str
    questions: int
    right: Mapping[str, Proportion]


@dataclass(frozen=True, slots=True)
class GroupRow:
    """The questions of one group at one context length.

    Attributes:
        name: A domain, a task, a kind of question, or ``all``.
        questions: Number of questions.
        scores: Mean scores in [0, 1] by method.
    """

    name: str
    questions: int
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class Change:
    """A speculating method compared with long context in one setting.

    Attributes:
        row: The method's figures.
        retrieval: The setting's retrieval quality; ``None`` if it does not affect the method.
        options: The swept options and the transfer strength, without those that do not affect the method.
        difference: The method's mean score minus that of long context.
    """

    row: Row
    retrieval: str | None
    options: Mapping[str, Any]
    difference: Difference


class Summary:
    """Computes the figures of a report.

    Args:
        report: A report with at least one result.
    """

    def __init__(self, report: EvaluationReport) -> None:
        self.report = report
        self.contexts = list(dict.fromkeys(result.context for result in report.results))
        self.methods = list(dict.fromkeys(result.method for result in report.results))

    @cached_property
    def _cells(self) -> dict[tuple[int, Setting, str], MethodResult]:
        return {(r.context, r.setting, r.method): r for r in self.report.results}

    @cached_property
    def _records(self) -> dict[tuple[int, Setting, str], dict[QuestionKey, AnswerRecord]]:
        """Answers by context, the setting in which they were asked, and method."""
        records: dict[tuple[int, Setting, str], dict[QuestionKey, AnswerRecord]] = {}
        for record in self.report.answers:
            cell = records.setdefault((record.context, record.setting, record.method), {})
            cell[record.document, record.question_number] = record
        return records

    def answers(self, context: int, setting: Setting, method: str) -> Mapping[QuestionKey, AnswerRecord]:
        """The answers of a method by question; empty if the method was not measured there."""
        result = self._cells.get((context, setting, method))
        return {} if result is None else self._records[context, result.asked_in, method]

    def row(self, context: int, setting: Setting, method: str) -> Row | None:
        """The row of a method; ``None`` if the method was not measured there."""
        result = self._cells.get((context, setting, method))
        if result is None:
            return None
        unread = [
            record.stats.prefill_s
            for record in self.answers(context, setting, method).values()
            if record.stats.reused_prefix_tokens * 2 < record.stats.prompt_tokens
        ]
        plain = self._cells.get((context, setting, PLAIN))
        plain_speed = plain.stats.decode_tokens_per_s if plain is not None else 0.0
        return Row(
            result,
            result.stats.prefill_s / result.questions,
            sum(unread) / len(unread) if unread else None,
            result.stats.decode_tokens_per_s / plain_speed if plain_speed else None,
        )

    def rows(self, setting: Setting) -> list[list[Row]]:
        """The rows of all methods for each context length."""
        table = [[self.row(context, setting, name) for name in self.methods] for context in self.contexts]
        return [[row for row in rows if row is not None] for rows in table]

    def groups(self, setting: Setting) -> dict[int, list[GroupRow]]:
        """The scores of the groups of questions by context length; empty if there is only one group."""
        answers = self.report.within(setting).answers
        if not are_grouped(answers):
            return {}
        groups: dict[int, dict[str, GroupRow]] = {}
        for cell in group_rows(answers):
            rows = groups.setdefault(cell["context"], {})
            row = rows.setdefault(cell["group"], GroupRow(cell["group"], cell["questions"], {}))
            row.scores[cell["method"]] = cell["score"]
        return {context: list(rows.values()) for context, rows in groups.items()}

    def speculating(self) -> list[str]:
        """The names of the methods that draft."""
        return list(dict.fromkeys(r.method for r in self.report.results if r.speculates))

    def split(self, setting: Setting, contexts: Sequence[int]) -> list[SplitGroup]:
        """Split the questions by the outcomes of long context and of the retrieved chunks alone.

        See arXiv:2502.20330, Figure 2. A graded answer is correct only with the full score.

        Args:
            setting: The setting.
            contexts: The context lengths whose questions are pooled.

        Returns:
            The four groups, or none if one of the two methods was not measured.
        """
        if not {PLAIN, RETRIEVED} <= set(self.methods):
            return []
        others = [name for name in self.methods if name not in (PLAIN, RETRIEVED)]
        outcomes: dict[tuple[bool, bool], list[dict[str, bool]]] = {kind: [] for kind in SPLIT}
        for context in contexts:
            plain, retrieved = (self.answers(context, setting, name) for name in (PLAIN, RETRIEVED))
            other = {name: self.answers(context, setting, name) for name in others}
            for key in plain.keys() & retrieved.keys():
                outcome = {name: cell[key].correct for name, cell in other.items() if key in cell}
                outcomes[plain[key].correct, retrieved[key].correct].append(outcome)
        return [
            SplitGroup(
                name,
                len(outcomes[kind]),
                {
                    other: wilson_interval(sum(asked), len(asked))
                    for other in others
                    if (asked := [outcome[other] for outcome in outcomes[kind] if other in outcome])
                },
            )
            for kind, name in SPLIT.items()
        ]

    def faster_from(self, setting: Setting, method: str) -> int | None:
        """The shortest context at which, and above which, a method is faster than long context."""
        shortest = None
        for context in sorted(self.contexts, reverse=True):
            row = self.row(context, setting, method)
            if row is None or row.speed_up is None or row.speed_up <= 1:
                break
            shortest = context
        return shortest

    def changes(self) -> list[Change]:
        """Compare every setting with long context; empty if the run has only one setting."""
        settings = self.report.swept
        if len(settings) < 2 or PLAIN not in self.methods:
            return []
        changes = []
        for context in self.contexts:
            for name in self.speculating():
                strength = self._transfer_strength(name)
                cells = [self._cells[context, setting, name] for setting in settings]
                for asked_in in dict.fromkeys(cell.asked_in for cell in cells):
                    same = [cell.setting for cell in cells if cell.asked_in == asked_in]
                    row = self.row(context, asked_in, name)
                    assert row is not None
                    options = [_shown_options(setting, strength) for setting in same]
                    changes.append(
                        Change(
                            row,
                            same[0].retrieval if len({setting.retrieval for setting in same}) == 1 else None,
                            {
                                key: value
                                for key, value in options[0].items()
                                if all(others.get(key) == value for others in options)
                            },
                            self.report.difference(name, PLAIN, context, asked_in),
                        )
                    )
        return changes

    def _transfer_strength(self, method: str) -> float | None:
        """A method's transfer strength if no setting changes it; ``None`` if it has none or is unknown."""
        settings = self.report.settings
        if (matched := settings.get("matched", {}).get(method, {}).get("transfer_strength")) is not None:
            return float(matched)
        options = GenerationOptions().override(**settings.get("options", {}))
        try:
            return make_method(method).in_force(options).speculation.effective_strength or None
        except ConfigurationError:
            return None


def _shown_options(setting: Setting, transfer_strength: float | None) -> dict[str, Any]:
    retriever = {} if setting.retriever is None else {"retriever": setting.retriever}
    return {"transfer_strength": transfer_strength, **setting.options, **retriever}
