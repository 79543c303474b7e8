"""What an evaluation found: every answer, and figures for each method and context length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.groups import group_rows
from rapid_integrations.evaluation.metrics import Difference, Proportion, score_difference, score_interval

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
_PACKAGES = ("rapid-integrations", "torch", "transformers", "bm25s", "faiss-cpu")


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """One method's answer to one question.

    Attributes:
        method: The method's name.
        context: The task's nominal length in tokens.
        kind: The question's kind.
        question: The question.
        answers: What would be right.
        answer: What came.
        correct: Whether it is wholly right: the score is 1.
        score: By the task's metric, in [0, 1].
        finish_reason: ``"stop"`` or ``"length"``.
        evidence_found: Whether all of the evidence was among the retrieved chunks; ``None`` where the task
            does not name its evidence.
        stats: What the answer cost.
        question_id: The question's name in the file it comes from.
        document: The task's number in the run, from 0.
        question_number: The question's number among its task's, from 0.
    """

    method: str
    context: int
    kind: str
    question: str
    answers: tuple[str, ...]
    answer: str
    correct: bool
    score: float
    finish_reason: str
    evidence_found: bool | None
    stats: RapidStats
    question_id: str = ""
    document: int = 0
    question_number: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data; of the stats those that differ between methods."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "stats"}
        names = ("prompt_tokens", "reused_prefix_tokens", "drafter_prompt_tokens", *_COUNTED)
        return {**fields, "stats": {name: getattr(self.stats, name) for name in names}}


@dataclass(frozen=True, slots=True)
class MethodResult:
    """One method at one context length, over all its questions.

    Attributes:
        method: The method's name.
        context: The documents' nominal length in tokens.
        questions: How many were asked.
        accuracy: Share of right answers, or mean score, with its 95 % confidence interval: see
            :func:`~rapid_integrations.evaluation.metrics.score_interval`.
        speculates: Whether the method drafts.
        evidence_found: Share of questions whose evidence was all retrieved; ``None`` where nobody knows.
        stats: The answers' counts and times, summed.
    """

    method: str
    context: int
    questions: int
    accuracy: Proportion
    speculates: bool
    evidence_found: float | None
    stats: RapidStats

    @classmethod
    def of(cls, records: Sequence[AnswerRecord], *, speculates: bool) -> MethodResult:
        """Pool the answers of one method at one context length.

        Args:
            records: At least one.
            speculates: Whether the method drafts.
        """
        known = [r.evidence_found for r in records if r.evidence_found is not None]
        return cls(
            method=records[0].method,
            context=records[0].context,
            questions=len(records),
            accuracy=score_interval(
                [record.score for record in records], [record.document for record in records]
            ),
            speculates=speculates,
            evidence_found=sum(known) / len(known) if known else None,
            stats=RapidStats.pooled(record.stats for record in records),
        )

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; ``None`` when nothing was drafted."""
        return self.stats.acceptance_rate if self.stats.drafted_tokens else None

    def as_dict(self) -> dict[str, Any]:
        """A flat row of plain data."""
        return {
            "method": self.method,
            "context": self.context,
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
    """An evaluation's results.

    Attributes:
        results: One per context length and method, in the order they were asked for.
        answers: Every answer.
        settings: What it was run with.
        versions: Of Python and the packages that matter.
    """

    results: tuple[MethodResult, ...]
    answers: tuple[AnswerRecord, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    def result(self, method: str, context: int) -> MethodResult:
        """One cell.

        Raises:
            ConfigurationError: This method was not run at this context length.
        """
        for result in self.results:
            if (result.method, result.context) == (method, context):
                return result
        there = ", ".join(f"{result.method} at {result.context:,}" for result in self.results)
        raise ConfigurationError(
            f"there is no result for {method!r} at {context:,} tokens: there are {there}."
        )

    def difference(self, method: str, other: str, context: int) -> Difference:
        """How much better one method did than another at one context length, question by question.

        Args:
            method: A method's name.
            other: What it is compared with.
            context: The nominal length in tokens.

        Raises:
            ConfigurationError: One was not run at this context length.
        """
        pairs = [self._scores(self.result(name, context)) for name in (method, other)]
        asked = sorted(pairs[0])
        return score_difference(
            [pairs[0][key] for key in asked],
            [pairs[1][key] for key in asked],
            [document for document, _ in asked],
        )

    def _scores(self, result: MethodResult) -> dict[tuple[int, int], float]:
        """A cell's scores by document and question."""
        return {
            (record.document, record.question_number): record.score
            for record in self.answers
            if (record.method, record.context) == (result.method, result.context)
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold: ``results``, ``groups``, ``settings``, ``versions``, ``answers``."""
        return {
            "results": [result.as_dict() for result in self.results],
            "groups": group_rows(self.answers),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "answers": [record.as_dict() for record in self.answers],
        }


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that results depend on."""
    import platform

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a source tree, or another faiss
            continue
    return found
