"""∞Bench (arXiv:2402.13718): questions, choices and summaries about whole novels.

En.QA is scored by token F1, En.MC by accuracy, En.Sum by ROUGE-L-Sum. The prompts are the published ones for
open models (github.com/OpenBMB/InfiniteBench, src/prompt.py, ``yarn_mistral_templates``), and the maximum
lengths of answers are those of src/eval_utils.py. Long documents are truncated in the middle, as published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.scoring.answer_metrics import make_metric
from rapid_integrations.evaluation.tasks.prompt_budget import truncated_task
from rapid_integrations.evaluation.tasks.records import Record, hub_file, read_records
from rapid_integrations.evaluation.tasks.sources import check_subsets, content_digest
from rapid_integrations.evaluation.tasks.task import Task, TaskFormat, TaskQuestion
from rapid_integrations.pipeline import RapidPipeline

DATASET = "xinrongzhang2022/InfiniteBench"
FILES = {
    "en.qa": "longbook_qa_eng.jsonl",
    "en.mc": "longbook_choice_eng.jsonl",
    "en.sum": "longbook_sum_eng.jsonl",
}
_LETTERS = "ABCD"
_FORMATS = {
    "en.qa": TaskFormat(
        "f1",
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\n"
        "Question: {question}\nAnswer:",
        40,
    ),
    "en.mc": TaskFormat(
        "choice",
        "Read the book and answer the question.\n\n{context}\n\nQuestion: {question}\n\n"
        "The letter of the correct answer is",
        40,
    ),
    "en.sum": TaskFormat("rouge-lsum", "Summarize the book below.\n\n{context}\n\n{question}", 1200),
}


@dataclass(frozen=True, slots=True)
class InfiniteBench:
    """Questions of ∞Bench with their books, each book of a subset once.

    Attributes:
        books: The subset, the book and the questions about it.
        contexts: Maximum lengths of prompt and answer together in the target's tokens; books are truncated.
            ``None`` is the target's context window.
        max_new_tokens: Maximum length of an answer; ``None`` is the benchmark's 40 tokens, or 1,200 tokens
            for summaries.
    """

    books: tuple[tuple[str, str, tuple[TaskQuestion, ...]], ...]
    contexts: tuple[int, ...] | None = None
    max_new_tokens: int | None = None
    name: str = "infinitebench"

    @classmethod
    def read(
        cls,
        folder: Path | None = None,
        *,
        subsets: tuple[str, ...] = tuple(FILES),
        contexts: tuple[int, ...] | None = None,
        max_questions: int | None = None,
        max_new_tokens: int | None = None,
    ) -> InfiniteBench:
        """Read the published files.

        Args:
            folder: The folder with ``longbook_qa_eng.jsonl`` and the other files; ``None`` downloads them
                from the hub.
            subsets: A selection of ``en.qa``, ``en.mc`` and ``en.sum``.
            contexts: See the attribute.
            max_questions: Maximum number of questions of each subset, from the start of its file.
            max_new_tokens: See the attribute.

        Raises:
            ConfigurationError: A subset is unknown, a metric's library is missing, ``folder`` is not one, or
                the files cannot be fetched.
            DocumentError: A file or one of its lines cannot be used; names the line.
        """
        check_subsets(subsets, FILES)
        if folder is not None and not folder.is_dir():
            raise ConfigurationError(
                f"--data '{folder}' is not a folder: give the folder with "
                f"{', '.join(FILES[subset] for subset in subsets)}."
            )
        books: list[tuple[str, str, tuple[TaskQuestion, ...]]] = []
        for subset in subsets:
            make_metric(_FORMATS[subset].metric)
            path = folder / FILES[subset] if folder else hub_file(DATASET, FILES[subset])
            grouped: dict[str, list[TaskQuestion]] = {}
            for record in read_records(path, max_records=max_questions):
                grouped.setdefault(record.text("context"), []).append(_question(subset, record))
            books += [(subset, book, tuple(questions)) for book, questions in grouped.items()]
        return cls(tuple(books), contexts, max_new_tokens)

    @property
    def num_questions(self) -> int:
        """Number of questions of all subsets at all lengths."""
        return sum(len(questions) for _, _, questions in self.books) * len(self.contexts or (None,))

    def tasks(self, pipeline: RapidPipeline) -> Iterator[Task]:
        """Yield the books, truncated to each length in turn.

        Raises:
            ContextLengthError: A length leaves no tokens for a book, or exceeds the target's window.
        """
        for context in self.contexts or (None,):
            for subset, book, questions in self.books:
                form = _FORMATS[subset]
                if self.max_new_tokens is not None:
                    form = replace(form, max_new_tokens=self.max_new_tokens)
                yield truncated_task(pipeline, book, questions, form, sequence_tokens=context)

    def settings(self) -> Mapping[str, Any]:
        """The lengths, the number of questions of each subset, and a digest of the data."""
        counts: dict[str, int] = {}
        for subset, _, questions in self.books:
            counts[subset] = counts.get(subset, 0) + len(questions)
        return {
            "contexts": None if self.contexts is None else list(self.contexts),
            "questions": counts,
            "data_digest": content_digest(self.books),
        }


def _question(subset: str, record: Record) -> TaskQuestion:
    answer = record.fields.get("answer")
    answers = (record.text("answer"),) if isinstance(answer, str) else record.texts("answer")
    kind, name = subset, str(record.fields.get("id", ""))
    if subset == "en.sum":
        return TaskQuestion("Summary:", answers, kind=kind, question_id=name)
    question = record.text("input").strip()
    if subset == "en.mc":
        options = record.texts("options")
        if len(options) != len(_LETTERS):
            raise record.error(f"'options' must be four texts, not {len(options)}")
        # The correct option's text. Some versions of the data also have its letter.
        if answers[0] not in options:
            raise record.error(f"the answer {answers[0]!r} is none of the options")
        answers = (_LETTERS[options.index(answers[0])], answers[0])
        choices = "\n".join(f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=True))
        question = f"{question}\n{choices}"
    return TaskQuestion(question, answers, kind=kind, question_id=name)
