"""A task: a long document with questions, their correct answers and the position of the evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rapid_integrations.demo import DemoDocument, generate_documents
from rapid_integrations.errors import ConfigurationError

_MAX_QUESTIONS_PER_DOCUMENT = 10
_TOKENS_PER_QUESTION = 128


@dataclass(frozen=True, slots=True)
class TaskQuestion:
    """A question about a task's document.

    Attributes:
        question: The question.
        answers: Answers that count as correct, at least one.
        evidence: Character spans of the document, ``(start, end)``, that contain the answer. Empty if
            unknown; retrieval can then only be natural or unrelated.
        kind: The groups that the question belongs to, separated by ``", "``, for example ``two_hop``.
        question_id: The question's name in its file.
        answer_start: The beginning of the answer, which is a part of the prompt.
        contradiction: A passage that contradicts the evidence, for adversarial retrieval.
    """

    question: str
    answers: tuple[str, ...]
    evidence: tuple[tuple[int, int], ...] = ()
    kind: str = ""
    question_id: str = ""
    answer_start: str = ""
    contradiction: str = ""


@dataclass(frozen=True, slots=True)
class TaskFormat:
    """The prompts of questions and the scoring of answers.

    Attributes:
        metric: One of :data:`rapid_integrations.evaluation.METRIC_NAMES`.
        prompt_template: Text with ``{context}`` and then ``{question}``; ``None`` is the evaluation's.
        max_new_tokens: Maximum length of an answer in tokens; ``None`` is the evaluation's.
        follow_up_template: Text with ``{question}`` and then ``{answer}``, without the document. It is asked
            after the first answer, and the answer to it is scored instead.
        follow_up_tokens: Maximum length of the follow-up's answer in tokens.
    """

    metric: str = "exact"
    prompt_template: str | None = None
    max_new_tokens: int | None = None
    follow_up_template: str | None = None
    follow_up_tokens: int = 128


@dataclass(frozen=True, slots=True)
class Task:
    """A document and the questions about it. Every method answers them one after the other.

    Attributes:
        document: The document's text.
        questions: The questions, at least one.
        context: The document's nominal length in tokens, by which results are grouped.
        other_document: A document without the answers, for unrelated retrieval.
        format: The prompts and the scoring.
    """

    document: str
    questions: tuple[TaskQuestion, ...]
    context: int
    other_document: str | None = None
    format: TaskFormat = TaskFormat()


def demo_task(document: DemoDocument, *, context: int, other: DemoDocument | None = None) -> Task:
    """Make a task from a document in the demo language.

    Args:
        document: The document with its questions.
        context: The document's nominal length in tokens.
        other: The document for unrelated retrieval.
    """
    questions = tuple(
        TaskQuestion(
            q.question,
            (q.answer,),
            q.evidence,
            f"{document.domain}, {q.kind}",
            contradiction=q.contradiction,
        )
        for q in document.questions
    )
    return Task(document.text, questions, context, None if other is None else other.text)


def demo_tasks(
    *,
    context: int,
    num_questions: int,
    seed: int = 0,
    questions_per_document: int | None = None,
    kinds: Sequence[str] | None = None,
    domain: str = "handbook",
) -> list[Task]:
    """Generate held-out documents in the demo language, with ``num_questions`` questions in all.

    Args:
        context: Length of each document in the demo tokenizer's tokens.
        num_questions: Number of questions about all documents together, at least one.
        seed: Equal seeds give equal tasks.
        questions_per_document: Maximum number of questions about one document. By default up to 10, and
            fewer about documents shorter than 1,280 tokens.
        kinds: As in :func:`rapid_integrations.demo.generate_documents`.
        domain: As in :func:`rapid_integrations.demo.generate_documents`.

    Raises:
        ConfigurationError: A number is too small, a kind or the domain is unknown, or the documents are too
            short.
    """
    if num_questions < 1:
        raise ConfigurationError(f"num_questions={num_questions}: at least 1 is needed.")
    per_document = questions_per_document
    if per_document is None:
        per_document = max(1, min(_MAX_QUESTIONS_PER_DOCUMENT, context // _TOKENS_PER_QUESTION))
    per_document = min(per_document, num_questions)
    num_documents = -(-num_questions // max(1, per_document))
    # One document more, for the unrelated retrieval of the last task.
    documents = list(
        generate_documents(
            num_tokens=context,
            num_documents=num_documents + 1,
            questions_per_document=per_document,
            seed=seed,
            kinds=kinds,
            domain=domain,
        )
    )
    tasks = []
    left = num_questions
    for document, other in pairwise(documents):
        task = demo_task(document, context=context, other=other)
        tasks.append(Task(task.document, task.questions[:left], context, other.text))
        left -= per_document
    return tasks
