"""What an evaluation found: every answer, and figures for each method and context length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from rapid_integrations.engine.processor import processor_facts
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.answer_record import AnswerRecord
from rapid_integrations.evaluation.groups import group_rows
from rapid_integrations.evaluation.metrics import Difference, Proportion, score_difference, score_interval
from rapid_integrations.evaluation.settings import Setting

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
class MethodResult:
    """One method at one context length in one setting, over all its questions.

    Attributes:
        method: The method's name.
        context: The documents' nominal length in tokens.
        questions: How many were asked.
        accuracy: Share of right answers, or mean score, with its 95 % confidence interval: see
            :func:`~rapid_integrations.evaluation.metrics.score_interval`.
        speculates: Whether the method drafts.
        evidence_found: Share of questions whose evidence was all retrieved; ``None`` where nobody knows.
        stats: The answers' counts and times, summed.
        setting: The setting it holds for.
        asked_in: The setting in which the questions were asked: an earlier one, where the two make no
            difference to the method.
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
        """Pool the answers of one method at one context length.

        Args:
            records: At least one, all asked in one setting.
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
            setting=records[0].setting,
            asked_in=records[0].setting,
        )

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; ``None`` when nothing was drafted."""
        return self.stats.acceptance_rate if self.stats.drafted_tokens else None

    def as_dict(self) -> dict[str, Any]:
        """A row of plain data."""
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
    """An evaluation's results.

    Attributes:
        results: One per context length, setting and method, in the order they were asked for.
        answers: Every answer.
        settings: What it was run with.
        versions: Of Python and the packages that matter.
    """

    results: tuple[MethodResult, ...]
    answers: tuple[AnswerRecord, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def swept(self) -> tuple[Setting, ...]:
        """The settings, in the order they were asked for."""
        return tuple(dict.fromkeys(result.setting for result in self.results))

    def result(self, method: str, context: int, setting: Setting | None = None) -> MethodResult:
        """One cell.

        Args:
            method: The method's name.
            context: The nominal length in tokens.
            setting: May be left out where the method was asked in one only.

        Raises:
            ConfigurationError: This method was not run at this context length in this setting, or in several
                and none is named.
        """
        found = [result for result in self.results if (result.method, result.context) == (method, context)]
        if not found:
            there = ", ".join(
                dict.fromkeys(f"{result.method} at {result.context:,}" for result in self.results)
            )
            raise ConfigurationError(
                f"there is no result for {method!r} at {context:,} tokens: there are {there}."
            )
        if setting is not None:
            found = [result for result in found if result.setting == setting]
        if not found or len({result.asked_in for result in found}) > 1:
            wanted = "in several settings: name one" if setting is None else f"not with {setting.label}"
            there = "; ".join(each.label for each in self.swept)
            raise ConfigurationError(
                f"{method!r} at {context:,} tokens was measured {wanted}. There are: {there}."
            )
        return found[0]

    def within(self, setting: Setting) -> EvaluationReport:
        """The results that hold for one setting, with their answers."""
        results = tuple(result for result in self.results if result.setting == setting)
        asked = {(result.method, result.asked_in) for result in results}
        answers = tuple(record for record in self.answers if (record.method, record.setting) in asked)
        return dataclasses.replace(self, results=results, answers=answers)

    def answers_of(self, result: MethodResult) -> tuple[AnswerRecord, ...]:
        """The answers that a cell is made of, in the order in which they came."""
        cell = (result.method, result.context, result.asked_in)
        return tuple(
            record for record in self.answers if (record.method, record.context, record.setting) == cell
        )

    def difference(self, method: str, other: str, context: int, setting: Setting | None = None) -> Difference:
        """How much better one method did than another at one context length, question by question.

        Args:
            method: A method's name.
            other: What it is compared with.
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
        """A cell's scores by document and question."""
        return {(record.document, record.question_number): record.score for record in self.answers_of(result)}

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold: ``results``, ``groups``, ``settings``, ``versions``, ``answers``."""
        return {
            "results": [result.as_dict() for result in self.results],
            "groups": group_rows(self.answers),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "answers": [record.as_dict() for record in self.answers],
        }


def machine(device: torch.device | None = None) -> dict[str, str]:
    """The processor, the operating system, and the accelerator where ``device`` is one."""
    import platform

    own_name = platform.processor() or platform.machine()
    found = {"processor": processor_facts().get("model name", own_name), "system": platform.platform()}
    if device is not None and device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


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
