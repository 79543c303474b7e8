"""Every question with its answers, and over how many pages they go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest

from rapid_integrations.engine.stats import RetrievedChunk
from rapid_integrations.evaluation.answer_record import AnswerRecord
from rapid_integrations.evaluation.report import EvaluationReport

SOURCES = {"d": "drafted", "f": "forced", "t": "own", "": "unknown"}
"""What the letters of :attr:`RapidStats.token_sources` are called on the page."""
_PAGE_CHARACTERS = 400_000


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tokens of an answer that have one source.

    Attributes:
        source: A value of :data:`SOURCES`.
        pieces: What each token adds to the answer.
    """

    source: str
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One method's answer in one setting.

    Attributes:
        record: The answer.
        runs: Its tokens.
        ending: Where its end-of-sequence token comes from, a value of :data:`SOURCES`; ``""`` without one.
        rest: Text of the answer that is not in ``runs``: of a follow-up, or of tokens nobody knows.
    """

    record: AnswerRecord
    runs: tuple[Run, ...]
    ending: str
    rest: str

    @classmethod
    def of(cls, record: AnswerRecord) -> Answer:
        """The answer of a record."""
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
        """How many tokens come from where; without those nobody knows of."""
        sources = self.record.stats.token_sources
        counts = {name: sources.count(letter) for letter, name in SOURCES.items() if letter}
        return {name: count for name, count in counts.items() if count}


@dataclass(slots=True)
class Question:
    """A question, as every method answered it.

    Attributes:
        first: Its first answer, for what all share.
        answers: All, those of a method one after the other.
        retrievals: What was retrieved, with the settings it was retrieved in.
    """

    first: AnswerRecord
    answers: list[Answer] = field(default_factory=list)
    retrievals: dict[tuple[RetrievedChunk, ...], list[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """An identifier, distinct in a report."""
        return f"q{self.first.document}-{self.first.question_number}"

    @property
    def right(self) -> list[str]:
        """The methods all of whose answers are right."""
        wrong = self.wrong
        return [name for name in self._methods if name not in wrong]

    @property
    def wrong(self) -> list[str]:
        """The methods that gave a wrong answer."""
        return list(dict.fromkeys(a.record.method for a in self.answers if not a.record.correct))

    @property
    def prompt_tokens(self) -> int:
        """The longest prompt that the target read: the one with the whole document."""
        return max(answer.record.stats.prompt_tokens for answer in self.answers)

    @property
    def characters(self) -> int:
        """About how much text it shows."""
        chunks = sum(len(chunk.text) for chunks in self.retrievals for chunk in chunks)
        # A token costs its mark-up as well.
        return chunks + sum(len(a.record.answer) + 20 * len(a.record.pieces) for a in self.answers)

    @property
    def _methods(self) -> list[str]:
        return list(dict.fromkeys(answer.record.method for answer in self.answers))


@dataclass(frozen=True, slots=True)
class QuestionPage:
    """Questions that are shown together.

    Attributes:
        name: The page's file name.
        context: Their documents' nominal length in tokens.
        questions: In the order they were asked.
    """

    name: str
    context: int
    questions: tuple[Question, ...]


def questions_of(report: EvaluationReport) -> list[Question]:
    """The questions of a report, in the order they were asked."""
    found: dict[tuple[int, int, int], Question] = {}
    for record in report.answers:
        key = (record.context, record.document, record.question_number)
        question = found.setdefault(key, Question(record))
        question.answers.append(Answer.of(record))
        if record.stats.retrieved_chunks:
            labels = question.retrievals.setdefault(record.stats.retrieved_chunks, [])
            if record.setting.label not in labels:
                labels.append(record.setting.label)
    order = {name: at for at, name in enumerate(dict.fromkeys(r.method for r in report.results))}
    settings = {setting: at for at, setting in enumerate(report.swept)}
    for question in found.values():
        question.answers.sort(key=lambda a: (order[a.record.method], settings[a.record.setting]))
    return list(found.values())


def question_pages(questions: Sequence[Question]) -> list[QuestionPage]:
    """Pages of one context length each that a browser opens with ease."""
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
