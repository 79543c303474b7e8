"""The figures of the page, from the answers of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rapid_integrations.config import GenerationOptions
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.answer_record import AnswerRecord
from rapid_integrations.evaluation.groups import are_grouped, group_rows
from rapid_integrations.evaluation.methods import make_method
from rapid_integrations.evaluation.metrics import Difference, Proportion, wilson_interval
from rapid_integrations.evaluation.report import EvaluationReport, MethodResult
from rapid_integrations.evaluation.settings import Setting

PLAIN, RETRIEVED = "lc", "rag"
SPLIT = {
    (True, True): "both right",
    (True, False): "only long context right",
    (False, True): "only retrieved right",
    (False, False): "both wrong",
}

QuestionKey = tuple[int, int]
"""A question's document and its number in it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one context length in one setting.

    Attributes:
        result: Its figures.
        prefill_s: Mean seconds of reading a prompt, of which much may be known from earlier questions.
        unread_prefill_s: The same over the prompts of which less than half was known; ``None`` where there
            are none, because other methods read the documents first.
        speed_up: Decoding speed over that of long context; ``None`` where that was not measured.
    """

    result: MethodResult
    prefill_s: float
    unread_prefill_s: float | None
    speed_up: float | None


@dataclass(frozen=True, slots=True)
class SplitGroup:
    """Questions on which long context and the retrieved chunks alone did in one way.

    Attributes:
        name: Of :data:`SPLIT`.
        questions: How many.
        right: For each other method the share it gets right; empty where there are no questions.
    """

    name: str
    questions: int
    right: Mapping[str, Proportion]


@dataclass(frozen=True, slots=True)
class GroupRow:
    """The questions of one group at one context length.

    Attributes:
        name: A domain, a task, a kind of question, or ``all``.
        questions: How many.
        scores: Mean scores in [0, 1] by method.
    """

    name: str
    questions: int
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class Change:
    """What a speculating method changes against long context in one setting.

    Attributes:
        row: The method's cell.
        retrieval: The setting's quality of retrieval; ``None`` where it makes no difference to the method.
        options: What the setting sweeps, and the transfer strength in any case; without those that make no
            difference.
        difference: Of the scores.
    """

    row: Row
    retrieval: str | None
    options: Mapping[str, Any]
    difference: Difference


class Summary:
    """A report's figures.

    Args:
        report: With at least one result.
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
        """By context, the setting it was asked in and method."""
        found: dict[tuple[int, Setting, str], dict[QuestionKey, AnswerRecord]] = {}
        for record in self.report.answers:
            cell = found.setdefault((record.context, record.setting, record.method), {})
            cell[record.document, record.question_number] = record
        return found

    def answers(self, context: int, setting: Setting, method: str) -> Mapping[QuestionKey, AnswerRecord]:
        """A cell's answers by their question; none where the cell was not measured."""
        result = self._cells.get((context, setting, method))
        return {} if result is None else self._records[context, result.asked_in, method]

    def row(self, context: int, setting: Setting, method: str) -> Row | None:
        """One method's row; ``None`` where the cell was not measured."""
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
        """For each context length the rows of all methods."""
        found = [[self.row(context, setting, name) for name in self.methods] for context in self.contexts]
        return [[row for row in rows if row is not None] for rows in found]

    def groups(self, setting: Setting) -> dict[int, list[GroupRow]]:
        """By context length the scores of the groups of questions; none where there is one group only."""
        answers = self.report.within(setting).answers
        if not are_grouped(answers):
            return {}
        found: dict[int, dict[str, GroupRow]] = {}
        for cell in group_rows(answers):
            rows = found.setdefault(cell["context"], {})
            row = rows.setdefault(cell["group"], GroupRow(cell["group"], cell["questions"], {}))
            row.scores[cell["method"]] = cell["score"]
        return {context: list(rows.values()) for context, rows in found.items()}

    def speculating(self) -> list[str]:
        """The methods that draft."""
        return list(dict.fromkeys(r.method for r in self.report.results if r.speculates))

    def split(self, setting: Setting, contexts: Sequence[int]) -> list[SplitGroup]:
        """How other methods do where long context and the retrieved chunks alone agree, and where not.

        arXiv:2502.20330, Figure 2. Graded answers count as right with the full score only.

        Args:
            setting: The setting.
            contexts: The context lengths whose questions are taken together.

        Returns:
            The four groups, or none where one of the two was not asked.
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
        """The context length from which on, in all longer ones too, a method decodes faster than plain."""
        fastest = None
        for context in sorted(self.contexts, reverse=True):
            row = self.row(context, setting, method)
            if row is None or row.speed_up is None or row.speed_up <= 1:
                break
            fastest = context
        return fastest

    def changes(self) -> list[Change]:
        """What each setting changes against long context; none where a run has one setting only."""
        settings = self.report.swept
        if len(settings) < 2 or PLAIN not in self.methods:
            return []
        found = []
        for context in self.contexts:
            for name in self.speculating():
                strength = self._transfer_strength(name)
                cells = [self._cells[context, setting, name] for setting in settings]
                for asked_in in dict.fromkeys(cell.asked_in for cell in cells):
                    same = [cell.setting for cell in cells if cell.asked_in == asked_in]
                    row = self.row(context, asked_in, name)
                    assert row is not None
                    options = [_shown_options(setting, strength) for setting in same]
                    found.append(
                        Change(
                            row,
                            same[0].retrieval if len({setting.retrieval for setting in same}) == 1 else None,
                            {
                                key: value
                                for key, value in options[0].items()
                                if all(each.get(key) == value for each in options)
                            },
                            self.report.difference(name, PLAIN, context, asked_in),
                        )
                    )
        return found

    def _transfer_strength(self, method: str) -> float | None:
        """The η of a method where no setting says otherwise; ``None`` where it has none, or nobody knows."""
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
