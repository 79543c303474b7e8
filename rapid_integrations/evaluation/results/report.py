"""The report of an evaluation: all answers, and figures by method, context length and setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.methods.settings import Setting
from rapid_integrations.evaluation.results.answer_record import AnswerRecord
from rapid_integrations.evaluation.results.groups import group_rows
from rapid_integrations.evaluation.scoring.intervals import (
    Difference,
    Proportion,
    score_difference,
    score_interval,
)

_COUNTED = (
    "completion_tokens",
    "rounds",
    "drafter_passes",
    "drafted_tokens",
    "accepted_tokens",
    "forced_tokens",
    "prefill_s",
    "draft_s",
    "verify_s",
    "decode_s",
)


@dataclass(frozen=True, slots=True)
class MethodResult:
    """The figures of one method at one context length in one setting, over all questions.

    Attributes:
        method: The method's name.
        context: The documents' nominal length in tokens.
        questions: Number of questions.
        accuracy: Share of correct answers, or mean score, with its 95 % confidence interval:
            :func:`~rapid_integrations.evaluation.scoring.intervals.score_interval`.
        speculates: Whether the method drafts tokens.
        evidence_found: Share of questions whose whole evidence was retrieved; ``None`` if no task names its
            evidence.
        stats: Sums of the answers' counts and times.
        setting: The setting that the figures apply to.
        asked_in: The setting in which the questions were asked. It is an earlier setting if the difference
            between the two does not affect the method.
    """

    method: str
    context: int
    questions: int
    accuracy: Proportion
    speculates: bool
    evidence_found: float | None
    stats: RapidStats
    setting: Setting
    asked_in: Setting

    @classmethod
    def of(cls, records: Sequence[AnswerRecord], *, speculates: bool) -> MethodResult:
        """Compute the figures of one method at one context length.

        Args:
            records: The answers: at least one, all asked in one setting.
            speculates: Whether the method drafts tokens.
        """
        found = [record.evidence_found for record in records if record.evidence_found is not None]
        return cls(
            method=records[0].method,
            context=records[0].context,
            questions=len(records),
            accuracy=score_interval(
                [record.score for record in records], [record.document for record in records]
            ),
            speculates=speculates,
            evidence_found=sum(found) / len(found) if found else None,
            stats=RapidStats.pooled(record.stats for record in records),
            setting=records[0].setting,
            asked_in=records[0].setting,
        )

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; ``None`` if nothing was drafted."""
        return self.stats.acceptance_rate if self.stats.drafted_tokens else None

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON-compatible data."""
        return {
            "method": self.method,
            "context": self.context,
            "setting": self.setting.as_dict(),
            "questions": self.questions,
            "accuracy": self.accuracy.value,
            "accuracy_low": self.accuracy.low,
            "accuracy_high": self.accuracy.high,
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_round": self.stats.tokens_per_round,
            "decode_tokens_per_s": self.stats.decode_tokens_per_s,
            "evidence_found": self.evidence_found,
            "correct": self.accuracy.successes,
            **{name: getattr(self.stats, name) for name in _COUNTED},
        }


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The results of an evaluation.

    Attributes:
        results: One for each context length, setting and method, in the order of the arguments.
        answers: Every answer.
        settings: Models, methods, options, tasks and machine of the run.
        versions: Versions of Python and of the packages that results depend on.
    """

    results: tuple[MethodResult, ...]
    answers: tuple[AnswerRecord, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def swept(self) -> tuple[Setting, ...]:
        """The settings of the run, in the order of the arguments."""
        return tuple(dict.fromkeys(result.setting for result in self.results))

    def result(self, method: str, context: int, setting: Setting | None = None) -> MethodResult:
        """Find the figures of one method at one context length.

        Args:
            method: The method's name.
            context: The nominal length in tokens.
            setting: Optional if all of the method's results come from the same answers.

        Raises:
            ConfigurationError: The method was not run at this context length or in this setting, or it was
                run in several settings and none is given.
        """
        found = [result for result in self.results if (result.method, result.context) == (method, context)]
        if not found:
            cells = dict.fromkeys(f"{result.method} at {result.context:,}" for result in self.results)
            raise ConfigurationError(
                f"there is no result for {method!r} at {context:,} tokens: there are {', '.join(cells)}."
            )
        if setting is not None:
            found = [result for result in found if result.setting == setting]
        if not found or len({result.asked_in for result in found}) > 1:
            problem = "in several settings: name one" if setting is None else f"not with {setting.label}"
            labels = "; ".join(swept.label for swept in self.swept)
            raise ConfigurationError(
                f"{method!r} at {context:,} tokens was measured {problem}. There are: {labels}."
            )
        return found[0]

    def within(self, setting: Setting) -> EvaluationReport:
        """The results that apply to one setting, and their answers."""
        results = tuple(result for result in self.results if result.setting == setting)
        asked = {(result.method, result.asked_in) for result in results}
        answers = tuple(record for record in self.answers if (record.method, record.setting) in asked)
        return dataclasses.replace(self, results=results, answers=answers)

    def answers_of(self, result: MethodResult) -> tuple[AnswerRecord, ...]:
        """The answers that a result was computed from, in the order in which they were given."""
        cell = (result.method, result.context, result.asked_in)
        return tuple(
            record for record in self.answers if (record.method, record.context, record.setting) == cell
        )

    def difference(self, method: str, other: str, context: int, setting: Setting | None = None) -> Difference:
        """The difference of two methods' scores at one context length, question by question.

        Args:
            method: The name of a method.
            other: The name of the method whose scores are subtracted.
            context: The nominal length in tokens.
            setting: As in :meth:`result`.

        Raises:
            ConfigurationError: As :meth:`result`.
        """
        pairs = [self._scores(self.result(name, context, setting)) for name in (method, other)]
        asked = sorted(pairs[0])
        return score_difference(
            [pairs[0][key] for key in asked],
            [pairs[1][key] for key in asked],
            [document for document, _ in asked],
        )

    def _scores(self, result: MethodResult) -> dict[tuple[int, int], float]:
        """The scores of a result's answers by document and question."""
        return {(record.document, record.question_number): record.score for record in self.answers_of(result)}

    def as_dict(self) -> dict[str, Any]:
        """JSON-compatible data: ``results``, ``groups``, ``settings``, ``versions`` and ``answers``."""
        return {
            "results": [result.as_dict() for result in self.results],
            "groups": group_rows(self.answers),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "answers": [record.as_dict() for record in self.answers],
        }
