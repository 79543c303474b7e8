"""LongBench v2 (arXiv:2412.15204): questions with four choices about texts of 8,000 to 2 million words.

Reports accuracy over all questions, by difficulty (easy, hard) and by length (short, medium, long). Prompts
and extraction of the answer are those of github.com/THUDM/LongBench (prompts/0shot.txt, 0shot_cot.txt and
0shot_cot_ans.txt, pred.py). With chain of thought, the model first reasons about the text, and then chooses
in a second prompt without the text. Long texts are truncated in the middle, as published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rapid_integrations.evaluation.tasks.prompt_budget import truncated_task
from rapid_integrations.evaluation.tasks.records import Record, hub_file, read_records
from rapid_integrations.evaluation.tasks.sources import content_digest
from rapid_integrations.evaluation.tasks.task import Task, TaskFormat, TaskQuestion
from rapid_integrations.pipeline import RapidPipeline

DATASET = "zai-org/LongBench-v2"
FILE = "data.json"
_DIFFICULTIES = ("easy", "hard")
_LENGTHS = ("short", "medium", "long")
_ANSWER_FORMAT = 'Format your response as follows: "The correct answer is (insert answer here)".'
_PLAIN = TaskFormat(
    "stated-choice",
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
    "What is the correct answer to this question: {question}\n\n" + _ANSWER_FORMAT,
    128,
)
_THINKING = TaskFormat(
    "stated-choice",
    "Please read the following text and answer the questions below.\n\n<text>\n{context}\n</text>\n\n"
    "What is the correct answer to this question: {question}\n\nLet’s think step by step:",
    1024,
    "Please read the following text and answer the questions below.\n\n"
    "The text is too long and omitted here.\n\n"
    "What is the correct answer to this question: {question}\n\nLet’s think step by step: {answer}\n\n"
    "Based on the above, what is the single, most likely answer choice? " + _ANSWER_FORMAT,
    128,
)


@dataclass(frozen=True, slots=True)
class LongBenchV2:
    """Questions of LongBench v2 with their texts.

    Attributes:
        texts: Each text with the questions about it.
        thinking: Whether the model reasons first (chain of thought).
        contexts: Maximum lengths of prompt and answer together in the target's tokens; texts are truncated.
            ``None`` is the target's context window.
        max_new_tokens: Maximum length of an answer; ``None`` is the benchmark's 128 tokens, or 1,024 tokens
            with chain of thought.
    """

    texts: tuple[tuple[str, tuple[TaskQuestion, ...]], ...]
    thinking: bool = False
    contexts: tuple[int, ...] | None = None
    max_new_tokens: int | None = None
    name: str = "longbench-v2"

    @classmethod
    def read(
        cls,
        path: Path | None = None,
        *,
        thinking: bool = False,
        contexts: tuple[int, ...] | None = None,
        max_questions: int | None = None,
        max_new_tokens: int | None = None,
    ) -> LongBenchV2:
        """Read the published file.

        Args:
            path: ``data.json``, or the same entries as JSONL; ``None`` downloads the file from the hub.
            thinking: See the attribute.
            contexts: See the attribute.
            max_questions: Maximum number of questions, from the start of the file.
            max_new_tokens: See the attribute.

        Raises:
            ConfigurationError: The file cannot be fetched.
            DocumentError: The file or one of its entries cannot be used; names the entry.
        """
        grouped: dict[str, list[TaskQuestion]] = {}
        for record in read_records(path or hub_file(DATASET, FILE), max_records=max_questions):
            grouped.setdefault(record.text("context").strip(), []).append(_question(record))
        texts = tuple((text, tuple(questions)) for text, questions in grouped.items())
        return cls(texts, thinking, contexts, max_new_tokens)

    @property
    def num_questions(self) -> int:
        """Number of questions at all lengths."""
        return sum(len(questions) for _, questions in self.texts) * len(self.contexts or (None,))

    def tasks(self, pipeline: RapidPipeline) -> Iterator[Task]:
        """Yield the texts, truncated to each length in turn.

        Raises:
            ContextLengthError: A length leaves no tokens for a text, or exceeds the target's context window.
        """
        form = _THINKING if self.thinking else _PLAIN
        if self.max_new_tokens is not None:
            form = replace(form, max_new_tokens=self.max_new_tokens)
        for context in self.contexts or (None,):
            for text, questions in self.texts:
                yield truncated_task(pipeline, text, questions, form, sequence_tokens=context)

    def settings(self) -> Mapping[str, Any]:
        """The lengths, the number of questions, the use of chain of thought, and a digest of the data."""
        return {
            "contexts": None if self.contexts is None else list(self.contexts),
            "questions": self.num_questions // len(self.contexts or (None,)),
            "chain_of_thought": self.thinking,
            "data_digest": content_digest(self.texts),
        }


def _question(record: Record) -> TaskQuestion:
    answer, difficulty, length = (record.text(name) for name in ("answer", "difficulty", "length"))
    for value, allowed in ((answer, tuple("ABCD")), (difficulty, _DIFFICULTIES), (length, _LENGTHS)):
        if value not in allowed:
            raise record.error(f"{value!r} is not allowed: it is one of {', '.join(allowed)}")
    choices = "\n".join(f"({letter}) {record.text(f'choice_{letter}').strip()}" for letter in "ABCD")
    return TaskQuestion(
        f"{record.text('question').strip()}\nChoices:\n{choices}",
        (answer,),
        kind=f"{difficulty}, {length}",
        question_id=record.text("_id"),
    )
