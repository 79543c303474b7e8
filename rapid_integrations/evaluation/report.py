"""What an evaluation found: every answer, and figures for each method and context length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.metrics import Proportion, wilson_interval

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
        correct: Whether it is one of ``answers``.
        finish_reason: ``"stop"`` or ``"length"``.
        evidence_found: Whether all of the evidence was among the retrieved chunks; ``None`` where the task
            does not name its evidence.
        stats: What the answer cost.
    """

    method: str
    context: int
    kind: str
    question: str
    answers: tuple[str, ...]
    answer: str
    correct: bool
    finish_reason: str
    evidence_found: bool | None
    stats: RapidStats

    def as_dict(self) -> dict[str, Any]:
        """Plain data; of the stats those that differ between methods."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "stats"}
        counted = ("prompt_tokens", "reused_prefix_tokens", "drafter_prompt_tokens", "completion_tokens")
        timed = (
            "rounds",
            "drafted_tokens",
            "accepted_tokens",
            "prefill_s",
            "draft_s",
            "verify_s",
            "decode_s",
        )
        return {**fields, "stats": {name: getattr(self.stats, name) for name in (*counted, *timed)}}


@dataclass(frozen=True, slots=True)
class MethodResult:
    """One method at one context length, over all its questions.

    Attributes:
        method: The method's name.
        context: The documents' nominal length in tokens.
        questions: How many were asked.
        accuracy: Share of right answers with its 95 % confidence interval.
        speculates: Whether the method drafts.
        evidence_found: Share of questions whose evidence was all retrieved; ``None`` where nobody knows.
        completion_tokens: Answer tokens over all questions.
        drafted_tokens: Over all questions, as the following.
        accepted_tokens: Of those.
        rounds: Target passes after the prefill.
        prefill_s: Seconds of reading prompts.
        draft_s: Seconds of drafting.
        verify_s: Seconds of target passes after the prefill.
        decode_s: Seconds of decoding in all.
    """

    method: str
    context: int
    questions: int
    accuracy: Proportion
    speculates: bool
    evidence_found: float | None
    completion_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    rounds: int
    prefill_s: float
    draft_s: float
    verify_s: float
    decode_s: float

    @classmethod
    def of(cls, records: Sequence[AnswerRecord], *, speculates: bool) -> MethodResult:
        """Pool the answers of one method at one context length.

        Args:
            records: At least one.
            speculates: Whether the method drafts.
        """
        known = [r.evidence_found for r in records if r.evidence_found is not None]

        def total(name: str) -> Any:
            return sum(getattr(record.stats, name) for record in records)

        return cls(
            method=records[0].method,
            context=records[0].context,
            questions=len(records),
            accuracy=wilson_interval(sum(record.correct for record in records), len(records)),
            speculates=speculates,
            evidence_found=sum(known) / len(known) if known else None,
            completion_tokens=total("completion_tokens"),
            drafted_tokens=total("drafted_tokens"),
            accepted_tokens=total("accepted_tokens"),
            rounds=total("rounds"),
            prefill_s=total("prefill_s"),
            draft_s=total("draft_s"),
            verify_s=total("verify_s"),
            decode_s=total("decode_s"),
        )

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; ``None`` when nothing was drafted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    @property
    def tokens_per_round(self) -> float:
        """Answer tokens per target pass after the prefill."""
        return self.completion_tokens / self.rounds if self.rounds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Answer tokens per second of decoding, all answers pooled; prefill is not part of it."""
        return self.completion_tokens / self.decode_s if self.decode_s else 0.0

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
            "tokens_per_round": self.tokens_per_round,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "evidence_found": self.evidence_found,
            "correct": self.accuracy.successes,
            "completion_tokens": self.completion_tokens,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "rounds": self.rounds,
            "prefill_s": self.prefill_s,
            "draft_s": self.draft_s,
            "verify_s": self.verify_s,
            "decode_s": self.decode_s,
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

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold: ``results``, ``settings``, ``versions``, ``answers``."""
        return {
            "results": [result.as_dict() for result in self.results],
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
