"""What is asked: documents with questions whose answers, and where they stand, are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rapid_integrations.demo import DemoDocument, generate_documents
from rapid_integrations.errors import ConfigurationError

_MOST_QUESTIONS_PER_DOCUMENT = 10
_TOKENS_PER_QUESTION = 128


@dataclass(frozen=True, slots=True)
class TaskQuestion:
    """A question about a task's document.

    Attributes:
        question: The question.
        answers: Answers that count as right, at least one.
        evidence: Spans of characters of the document, ``(start, end)``, that hold the answer; empty where
            nobody knows, and then retrieval can only be natural or unrelated.
        kind: The groups of questions it belongs to, with ``", "`` between, for example ``two_hop``.
        question_id: Its name in the file it comes from.
        answer_start: What the answer begins with; part of the prompt, not of the answer.
        contradiction: A passage that says otherwise than the evidence, for adversarial retrieval.
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
    """How questions are put and answers are judged.

    Attributes:
        metric: One of :data:`rapid_integrations.evaluation.METRIC_NAMES`.
        prompt_template: With ``{context}`` and then ``{question}``; ``None`` takes the evaluation's.
        max_new_tokens: The longest answer in tokens; ``None`` takes the evaluation's.
        follow_up_template: With ``{question}`` and then ``{answer}``: what is asked once the first answer is
            there, without the document. The answer to it is the one that is judged.
        follow_up_tokens: The longest answer to that, in tokens.
    """

    metric: str = "exact"
    prompt_template: str | None = None
    max_new_tokens: int | None = None
    follow_up_template: str | None = None
    follow_up_tokens: int = 128


@dataclass(frozen=True, slots=True)
class Task:
    """One document and the questions about it; they are asked one after the other, by every method.

    Attributes:
        document: Its text.
        questions: At least one.
        context: The document's nominal length in tokens; results are reported by it.
        other_document: A document that does not hold the answers, for unrelated retrieval.
        format: How its questions are put and judged.
    """

    document: str
    questions: tuple[TaskQuestion, ...]
    context: int
    other_document: str | None = None
    format: TaskFormat = TaskFormat()


def demo_task(document: DemoDocument, *, context: int, other: DemoDocument | None = None) -> Task:
    """A task from a document in the demo language.

    Args:
        document: The document with its questions.
        context: Its nominal length in tokens.
        other: A document to retrieve unrelated chunks from.
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
        num_questions: Questions over all documents, at least one.
        seed: Same seed, same tasks.
        questions_per_document: At most so many share one document; by default up to 10, fewer in documents
            shorter than 1,280 tokens.
        kinds: As in :func:`rapid_integrations.demo.generate_documents`.
        domain: As there.

    Raises:
        ConfigurationError: A number is too small, a kind or the domain unknown, or the documents too short.
    """
    if num_questions < 1:
        raise ConfigurationError(f"num_questions={num_questions}: at least 1 is needed.")
    per_document = questions_per_document
    if per_document is None:
        per_document = max(1, min(_MOST_QUESTIONS_PER_DOCUMENT, context // _TOKENS_PER_QUESTION))
    per_document = min(per_document, num_questions)
    num_documents = -(-num_questions // max(1, per_document))
    # One more than is asked about: the last document's unrelated chunks come from it.
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
