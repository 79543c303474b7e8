"""Every question with all answers to it, and the division of questions into pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest

from rapid_integrations.engine.stats import RetrievedChunk
from rapid_integrations.evaluation.results.answer_record import AnswerRecord
from rapid_integrations.evaluation.results.report import EvaluationReport

SOURCES = {"d": "drafted", "f": "forced", "t": "own", "": "unknown"}
"""The page's names for the letters of :attr:`RapidStats.token_sources`."""
_PAGE_CHARACTERS = 400_000


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of an answer with the same source.

    Attributes:
        source: A value of :data:`SOURCES`.
        pieces: The text that each token adds to the answer.
    """

    source: str
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One method's answer in one setting.

    Attributes:
        record: The answer.
        runs: The answer's tokens.
        ending: The source of the end-of-sequence token, a value of :data:`SOURCES`; ``""`` without one.
        rest: Text of the answer that is not in ``runs``: text of a follow-up or of unknown tokens.
    """

    record: AnswerRecord
    runs: tuple[Run, ...]
    ending: str
    rest: str

    @classmethod
    def of(cls, record: AnswerRecord) -> Answer:
        """Make the answer of a record."""
        sources = record.stats.token_sources
        tokens = list(zip_longest(record.pieces, sources[: len(record.pieces)], fillvalue=""))
        runs = tuple(
            Run(SOURCES[source], tuple(piece for piece, _ in run))
            for source, run in groupby(tokens, key=lambda token: token[1])
        )
        ended = bool(record.pieces) and len(sources) == len(record.pieces) + 1
        return cls(
            record,
            runs,
            SOURCES[sources[-1]] if ended else "",
            record.answer.removeprefix("".join(record.pieces)),
        )

    @property
    def counts(self) -> dict[str, int]:
        """Number of tokens from each source, without unknown sources."""
        sources = self.record.stats.token_sources
        counts = {name: sources.count(letter) for letter, name in SOURCES.items() if letter}
        return {name: count for name, count in counts.items() if count}


@dataclass(slots=True)
class Question:
    """A question with its answers by all methods.

    Attributes:
        first: The first answer. Templates read from it the fields that are equal in all answers.
        answers: All answers, grouped by method.
        retrievals: The retrieved chunks, with the labels of the settings in which they were retrieved.
    """

    first: AnswerRecord
    answers: list[Answer] = field(default_factory=list)
    retrievals: dict[tuple[RetrievedChunk, ...], list[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """An identifier that is unique in the report."""
        return f"q{self.first.document}-{self.first.question_number}"

    @property
    def right(self) -> list[str]:
        """The methods whose answers are all correct."""
        wrong = self.wrong
        return [name for name in self._methods if name not in wrong]

    @property
    def wrong(self) -> list[str]:
        """The methods that gave a wrong answer, in order."""
        return list(dict.fromkeys(a.record.method for a in self.answers if not a.record.correct))

    @property
    def prompt_tokens(self) -> int:
        """Length of the longest prompt, which has the whole document."""
        return max(answer.record.stats.prompt_tokens for answer in self.answers)

    @property
    def characters(self) -> int:
        """The approximate number of characters that the page shows for the question."""
        chunks = sum(len(chunk.text) for chunks in self.retrievals for chunk in chunks)
        # Each token also needs mark-up.
        return chunks + sum(len(a.record.answer) + 20 * len(a.record.pieces) for a in self.answers)

    @property
    def _methods(self) -> list[str]:
        return list(dict.fromkeys(answer.record.method for answer in self.answers))


@dataclass(frozen=True, slots=True)
class QuestionPage:
    """The questions of one page.

    Attributes:
        name: The page's file name.
        context: The nominal length of their documents in tokens.
        questions: The questions, in the order in which they were asked.
    """

    name: str
    context: int
    questions: tuple[Question, ...]


def questions_of(report: EvaluationReport) -> list[Question]:
    """The questions of a report, in the order in which they were asked."""
    questions: dict[tuple[int, int, int], Question] = {}
    for record in report.answers:
        key = (record.context, record.document, record.question_number)
        question = questions.setdefault(key, Question(record))
        question.answers.append(Answer.of(record))
        if record.stats.retrieved_chunks:
            labels = question.retrievals.setdefault(record.stats.retrieved_chunks, [])
            if record.setting.label not in labels:
                labels.append(record.setting.label)
    methods = {name: i for i, name in enumerate(dict.fromkeys(r.method for r in report.results))}
    settings = {setting: i for i, setting in enumerate(report.swept)}
    for question in questions.values():
        question.answers.sort(key=lambda a: (methods[a.record.method], settings[a.record.setting]))
    return list(questions.values())


def question_pages(questions: Sequence[Question]) -> list[QuestionPage]:
    """Divide questions into pages of one context length each, small enough for a browser."""
    pages = []
    for context in dict.fromkeys(question.first.context for question in questions):
        parts = _parts([question for question in questions if question.first.context == context])
        pages += [
            QuestionPage(f"questions-{context}-{number}.html", context, tuple(part))
            for number, part in enumerate(parts, start=1)
        ]
    return pages


def _parts(questions: Sequence[Question]) -> Iterator[list[Question]]:
    part: list[Question] = []
    characters = 0
    for question in questions:
        if part and characters + question.characters > _PAGE_CHARACTERS:
            yield part
            part, characters = [], 0
        part.append(question)
        characters += question.characters
    yield part
