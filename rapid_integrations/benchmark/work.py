"""The work that a baseline does and its outcome, as plain data that worker processes exchange."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.tasks.retrieval_quality import RetrievalQuality
from rapid_integrations.evaluation.tasks.task import Task, demo_tasks

# The relative error of a document's length, in the models' own tokens, above which it is generated again.
_LENGTH_TOLERANCE = 0.03


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one baseline.

    Attributes:
        baseline: The baseline's name.
        task: The document and the questions, all of which are asked.
        together: Whether the questions are asked at the same time instead of one after the other.
        cold: Whether caches and indexes of earlier runs are discarded first.
        retrieval: The quality of the drafter's context. With ``"natural"``, the pipeline's own retriever runs
            within the measured time.
    """

    baseline: str
    task: Task
    together: bool = False
    cold: bool = False
    retrieval: RetrievalQuality = "natural"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer.

    Attributes:
        text: The answer's text.
        token_ids: The answer's tokens without the end-of-sequence token; ``None`` if the host framework
            returned only text.
    """

    text: str
    token_ids: tuple[int, ...] | None = None

    def same_as(self, other: Answer) -> bool:
        """Whether the answers have equal tokens or, if the tokens of one are unknown, equal text."""
        if self.token_ids is not None and other.token_ids is not None:
            return self.token_ids == other.token_ids
        return self.text.strip() == other.text.strip()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one run.

    Attributes:
        answers: One per question.
        stats: Counts and times of all questions, summed. The time of a forward pass that several questions
            share is counted once for each. Without the engine, ``rounds`` counts the target's passes after
            the prefill, and drafting is not reported separately.
        wall_s: Seconds from the first call to the last answer.
        first_token_s: For each question, seconds from its call to its first text; empty if unknown.
        same_prompt: Whether the prompt had the same tokens as for the other baselines.
        kv_bytes: Bytes of keys and values at the end of the run, the drafter's included; ``None`` if they
            include those of earlier runs.
        rest_bytes: Bytes in use before the run: allocated on the accelerator, or resident memory of the
            process.
        peak_bytes: The maximum during the run. This and ``rest_bytes`` are ``None`` if the system does not
            report them.
    """

    answers: tuple[Answer, ...]
    stats: RapidStats
    wall_s: float
    first_token_s: tuple[float, ...] = ()
    same_prompt: bool = True
    kv_bytes: int | None = None
    rest_bytes: int | None = None
    peak_bytes: int | None = None


def make_task(
    *,
    context: int,
    num_questions: int,
    seed: int,
    count_tokens: Callable[[str], int],
    kinds: Sequence[str] | None = None,
) -> Task:
    """Generate a document of a given length in the models' own tokens, with questions about it.

    Args:
        context: The length of the document in tokens.
        num_questions: The number of questions.
        seed: The same seed gives the same document.
        count_tokens: Counts a text's tokens.
        kinds: The kinds of questions, see :func:`rapid_integrations.demo.generate_documents`.

    Raises:
        ConfigurationError: The document is too short for the questions.
    """
    length = context
    for _ in range(3):
        (task, *_) = demo_tasks(
            context=length,
            num_questions=num_questions,
            questions_per_document=num_questions,
            seed=seed,
            kinds=kinds,
        )
        measured = count_tokens(task.document)
        if abs(measured / context - 1) <= _LENGTH_TOLERANCE:
            return dataclasses.replace(task, context=context)
        length = max(1, round(length * context / measured))
    raise ConfigurationError(
        f"the document for a context of {context:,} tokens has {measured:,} in these models' tokenizer, and "
        "generating it again did not help: choose longer contexts."
    )
