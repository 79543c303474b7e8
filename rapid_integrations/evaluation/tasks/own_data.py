"""The user's own questions, from a JSONL file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapid_integrations.errors import ContextLengthError, DocumentError
from rapid_integrations.evaluation.scoring.answer_metrics import make_metric
from rapid_integrations.evaluation.tasks.prompt_budget import document_budget
from rapid_integrations.evaluation.tasks.records import Record, read_records
from rapid_integrations.evaluation.tasks.retrieval_quality import RetrievalQuality
from rapid_integrations.evaluation.tasks.sources import content_digest
from rapid_integrations.evaluation.tasks.task import Task, TaskFormat, TaskQuestion
from rapid_integrations.pipeline import RapidPipeline
from rapid_integrations.retrieval.document_files import read_document

_FIELDS = (
    "document",
    "document_file",
    "question",
    "answer",
    "answers",
    "id",
    "kind",
    "evidence",
    "contradiction",
)


@dataclass(frozen=True, slots=True)
class OwnData:
    """Questions with their documents, each document once.

    Attributes:
        path: The file.
        documents: The texts, in the file's order.
        questions: The questions about each document, at least one.
        places: The position of each document's first line in the file, for error messages.
        metric: The metric of the answers.
        prompt_template: Text with ``{context}`` and then ``{question}``.
    """

    path: Path
    documents: tuple[str, ...]
    questions: tuple[tuple[TaskQuestion, ...], ...]
    places: tuple[str, ...]
    metric: str
    prompt_template: str
    name: str = "own"

    @classmethod
    def read(
        cls,
        path: Path,
        *,
        metric: str,
        prompt_template: str,
        max_questions: int | None = None,
        retrievals: tuple[RetrievalQuality, ...] = ("natural",),
    ) -> OwnData:
        """Read a JSONL file with one question per line.

        Each line is an object with ``document`` (text) or ``document_file`` (the path of a text, Markdown or
        PDF file, relative to the JSONL file), ``question``, and ``answer`` or ``answers``. Optional fields
        are ``id``, ``kind`` (the question's groups), ``evidence`` (character spans of the document that
        contain the answer, ``[[start, end], …]``) and ``contradiction`` (a passage that contradicts it).

        Args:
            path: The file.
            metric: One of :data:`rapid_integrations.evaluation.METRIC_NAMES`.
            prompt_template: Text with ``{context}`` and then ``{question}``.
            max_questions: Maximum number of questions, from the start of the file.
            retrievals: The retrieval qualities of the run. Some need the evidence or a second document.

        Raises:
            ConfigurationError: The metric is unknown, or its library is missing.
            DocumentError: The file or one of its lines cannot be used; names the line.
        """
        make_metric(metric)
        grouped: dict[str, list[TaskQuestion]] = {}
        places: dict[str, str] = {}
        files: dict[Path, str] = {}
        ids: dict[str, str] = {}
        for record in read_records(path, max_records=max_questions):
            if unknown := sorted(record.fields.keys() - set(_FIELDS)):
                raise record.error(f"{', '.join(unknown)} is unknown: allowed are {', '.join(_FIELDS)}")
            document = _document(record, path.parent, files)
            question = _question(record, document)
            for retrieval in retrievals:
                if retrieval in ("gold", "missing", "adversarial") and not question.evidence:
                    raise record.error(
                        f"retrieval {retrieval!r} needs the position of the answer: add 'evidence'"
                    )
            if "adversarial" in retrievals and not question.contradiction:
                raise record.error(
                    "retrieval 'adversarial' needs a passage that contradicts the answer: add 'contradiction'"
                )
            if question.question_id and (other := ids.get(question.question_id)):
                raise record.error(
                    f"the id {question.question_id!r} is also that of {other}: give each question its own"
                )
            ids[question.question_id] = record.place
            grouped.setdefault(document, []).append(question)
            places.setdefault(document, record.place)
        if "unrelated" in retrievals and len(grouped) < 2:
            raise DocumentError(f"'{path}' has one document: retrieval 'unrelated' needs two or more.")
        return cls(
            path,
            tuple(grouped),
            tuple(tuple(questions) for questions in grouped.values()),
            tuple(places.values()),
            metric,
            prompt_template,
        )

    @property
    def num_questions(self) -> int:
        """Number of questions about all documents."""
        return sum(len(questions) for questions in self.questions)

    def tasks(self, pipeline: RapidPipeline) -> Iterator[Task]:
        """Yield a task for each document. Its nominal length is the documents' mean length in tokens.

        Raises:
            ContextLengthError: A document does not fit into the target's context window.
        """
        form = TaskFormat(self.metric, self.prompt_template)
        lengths = [pipeline.count_tokens(document) for document in self.documents]
        for length, questions, place in zip(lengths, self.questions, self.places, strict=True):
            budget = document_budget(pipeline, questions, form, sequence_tokens=pipeline.context_window)
            if length > budget:
                raise ContextLengthError(
                    f"{place}: the document has {length:,} tokens; '{pipeline.name}' takes {budget:,} beside "
                    "the question and the answer. Shorten it, lower --max-new-tokens, or take a model with a "
                    "longer context window."
                )
        context = round(sum(lengths) / len(lengths))
        for i, (document, questions) in enumerate(zip(self.documents, self.questions, strict=True)):
            other = self.documents[(i + 1) % len(self.documents)] if len(self.documents) > 1 else None
            yield Task(document, questions, context, other, form)

    def settings(self) -> Mapping[str, Any]:
        """The file, a digest of its data, the prompt and the metric."""
        return {
            "data": str(self.path),
            "data_digest": content_digest((self.documents, self.questions, self.prompt_template)),
            "metric": self.metric,
            "questions": self.num_questions,
            "documents": len(self.documents),
        }


def _document(record: Record, folder: Path, files: dict[Path, str]) -> str:
    if ("document" in record.fields) == ("document_file" in record.fields):
        raise record.error("give either 'document' or 'document_file'")
    if "document" in record.fields:
        return record.text("document")
    path = folder / record.text("document_file")
    if path not in files:
        try:
            files[path] = read_document(path)
        except DocumentError as error:
            raise DocumentError(f"{record.place}: {error}") from error
    return files[path]


def _question(record: Record, document: str) -> TaskQuestion:
    if ("answer" in record.fields) == ("answers" in record.fields):
        raise record.error("give either 'answer' or 'answers'")
    answers = (record.text("answer"),) if "answer" in record.fields else record.texts("answers")
    name = record.fields.get("id", "")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise record.error(f"'id' must be text or a whole number, not {name!r}")
    return TaskQuestion(
        question=record.text("question").strip(),
        answers=answers,
        evidence=_evidence(record, document),
        kind=record.text("kind").strip() if "kind" in record.fields else "",
        question_id=str(name),
        contradiction=record.text("contradiction") if "contradiction" in record.fields else "",
    )


def _evidence(record: Record, document: str) -> tuple[tuple[int, int], ...]:
    spans = record.fields.get("evidence", [])
    if not isinstance(spans, list):
        raise record.error(f"'evidence' must be a list of [start, end], not {spans!r}")
    for span in spans:
        whole = isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)
        if not (whole and 0 <= span[0] < span[1] <= len(document)):
            raise record.error(
                f"the evidence {span!r} is no span of the document: [start, end] with 0 <= start < end <= "
                f"{len(document):,} characters is allowed"
            )
    return tuple((start, end) for start, end in spans)
