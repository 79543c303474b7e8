"""One answer of an evaluation, with its score and what it cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rapid_integrations.engine.stats import RapidStats, RetrievedChunk
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.methods.settings import Setting


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """One method's answer to one question.

    Attributes:
        method: The method's name.
        context: The task's nominal length in tokens.
        kind: The question's kind.
        question: The question.
        answers: The correct answers.
        answer: The answer given.
        correct: Whether the score is 1.
        score: The score by the task's metric, in [0, 1].
        finish_reason: ``"stop"`` or ``"length"``.
        evidence_found: Whether all of the evidence was among the retrieved chunks; ``None`` where the task
            does not name its evidence.
        stats: Counts and times, and the retrieved chunks of a method that uses retrieval.
        question_id: The question's name in its file.
        setting: The setting in which it was asked. Settings that make no difference to the method share
            the first one's answers.
        document: The task's number in the run, from 0.
        question_number: The question's number among its task's, from 0.
        pieces: The text that each token adds to the answer, without the end-of-sequence token. Joined, they
            are the answer without what a follow-up added. Empty where the tokens do not spell the answer.
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
    setting: Setting = field(default_factory=Setting)
    document: int = 0
    question_number: int = 0
    pieces: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON-compatible data for :meth:`from_dict`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "setting": self.setting.as_dict(), "stats": dataclasses.asdict(self.stats)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AnswerRecord:
        """The record from the data of :meth:`as_dict`, also after a trip through JSON.

        Raises:
            ConfigurationError: The data is not a record's.
        """
        try:
            fields: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
            }
            fields["setting"] = Setting.from_dict(data["setting"])
            chunks = tuple(RetrievedChunk(**chunk) for chunk in data["stats"]["retrieved_chunks"])
            fields["stats"] = RapidStats.from_dict({**data["stats"], "retrieved_chunks": chunks})
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ConfigurationError(
                f"this is not an answer of this version of rapid eval ({type(error).__name__}: {error})."
            ) from error
