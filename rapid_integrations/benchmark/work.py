"""What is asked of a baseline, and what comes back. Plain data: it travels between processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.retrieval import RetrievalQuality
from rapid_integrations.evaluation.tasks.task import Task, demo_tasks

# A document is written anew when its length in the models' own tokens is off by more than this.
_LENGTH_TOLERANCE = 0.03


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one baseline.

    Attributes:
        baseline: Its name.
        task: The document and the questions, all of which are asked.
        together: At once, instead of one after the other.
        cold: Whatever was read before is forgotten first.
        retrieval: What the drafter reads; ``"natural"`` lets the pipeline's own retriever find it within the
            time that is measured.
    """

    baseline: str
    task: Task
    together: bool = False
    cold: bool = False
    retrieval: RetrievalQuality = "natural"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it came.

    Attributes:
        text: Its text.
        token_ids: Its tokens without the end-of-sequence token; ``None`` where a framework gave only text.
    """

    text: str
    token_ids: tuple[int, ...] | None = None

    def same_as(self, other: Answer) -> bool:
        """Whether the answers are equal: their tokens where both are known, else their text."""
        if self.token_ids is not None and other.token_ids is not None:
            return self.token_ids == other.token_ids
        return self.text.strip() == other.text.strip()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run came to.

    Attributes:
        answers: One per question.
        stats: Counts and times of all questions, summed. Times of forward passes that questions share are in
            there once for each of them. Outside the engine ``rounds`` are the target's passes after reading,
            and drafting is not told apart.
        wall_s: From the first call to the last answer.
        first_token_s: For each question, from its call to its first text; empty where nobody can tell.
        same_prompt: Whether the prompt's tokens were those of the other baselines.
        kv_bytes: Keys and values held when the run ended, the drafter's included; ``None`` where what earlier
            runs left cannot be told apart.
        rest_bytes: Memory before the run: allocated on the accelerator, else the process's resident memory.
        peak_bytes: The most during the run. Both ``None`` where the system does not say.
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
    """Generate a document of a length in the models' own tokens, with questions.

    Args:
        context: The length wanted.
        num_questions: How many questions.
        seed: Same seed, same document.
        count_tokens: Counts a text's tokens.
        kinds: Of questions, see :func:`rapid_integrations.demo.generate_documents`.

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
        f"a document of {context:,} tokens came out with {measured:,} in these models' tokenizer: choose "
        "longer contexts."
    )
