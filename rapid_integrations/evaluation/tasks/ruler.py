"""RULER's tasks (arXiv:2404.06654, section 3), generated to a given length in any model's tokens.

The tasks are needles in a haystack (one; one of several keys; several values of a key; several keys at once),
variable tracking, and the most common words of a list. The prompts and the beginnings of the answers are
RULER's (github.com/NVIDIA/RULER, scripts/data/synthetic/constants.py). The filler, the keys and the words are
different, and there are no worked examples before the question. Scores are therefore similar to published
ones, but not comparable.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.tasks.filler import compound_words, filler_sentences
from rapid_integrations.evaluation.tasks.prompt_budget import document_budget
from rapid_integrations.evaluation.tasks.sources import check_subsets
from rapid_integrations.evaluation.tasks.task import Task, TaskFormat, TaskQuestion
from rapid_integrations.pipeline import RapidPipeline

RULER_TASKS = ("single", "multi-key", "multi-value", "multi-query", "variable-tracking", "common-words")

_NEEDLES_TEMPLATE = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the numbers afterwards.\n{context}\n{question}"
)
_NEEDLE_TEMPLATE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the number afterwards.\n{context}\n{question}"
)
_TRACKING_TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: {question}"
)
_COMMON_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
    "ones that appear most often.\n{context}\nQuestion: {question}"
)
_NEEDLES = 4
_HOPS = 4
_NUM_COMMON = 10
# RULER repeats common and other words 30 and 3 times, in sequences shorter than 4,096 tokens 6 and 1 times.
_LONG_LIST_TOKENS = 4096
# The words suffice for lists of this length; in longer lists all words are repeated more often.
_ALL_WORDS_TOKENS = 131_072


@dataclass(frozen=True, slots=True)
class _Puzzle:
    """A question and the document around it, of any length.

    Attributes:
        question: The question, without its evidence.
        form: The prompt and the scoring.
        build: Makes the document and the spans of its evidence from a number of filler units. More units
            make a longer document.
        max_units: The maximum number of units.
    """

    question: TaskQuestion
    form: TaskFormat
    build: Callable[[int], tuple[str, tuple[tuple[int, int], ...]]]
    max_units: int


@dataclass(frozen=True, slots=True)
class RulerSource:
    """Generated RULER tasks.

    Attributes:
        contexts: Lengths of prompt and answer together, in the target's tokens, as RULER counts.
        questions: Number of questions of each task at each length. Each question has a document of its own.
        seed: Equal seeds and tokenizers give equal documents and questions.
        subsets: A selection of :data:`RULER_TASKS`, at least one.
        max_new_tokens: Maximum length of an answer; ``None`` is RULER's: 128 tokens, 30 for variables, 120
            for words.

    Raises:
        ConfigurationError: A subset is unknown.
    """

    contexts: tuple[int, ...]
    questions: int
    seed: int
    subsets: tuple[str, ...] = RULER_TASKS
    max_new_tokens: int | None = None
    name: str = "ruler"

    def __post_init__(self) -> None:
        check_subsets(self.subsets, RULER_TASKS)

    @property
    def num_questions(self) -> int:
        """Number of questions of all tasks at all lengths."""
        return self.questions * len(self.contexts) * len(self.subsets)

    def tasks(self, pipeline: RapidPipeline) -> Iterator[Task]:
        """Generate the tasks, ordered by context length, with the subsets in turn.

        Raises:
            ContextLengthError: A length leaves no tokens for a document.
            ConfigurationError: A length is too short for the hidden sentences, or needs more words than
                available.
        """
        for context in self.contexts:
            for number in range(self.questions):
                for subset in self.subsets:
                    yield ruler_task(
                        pipeline,
                        subset,
                        context=context,
                        seed=self.seed,
                        number=number,
                        max_new_tokens=self.max_new_tokens,
                    )

    def settings(self) -> Mapping[str, Any]:
        """The lengths, tasks, number of questions and seed."""
        return {
            "contexts": list(self.contexts),
            "questions": self.questions,
            "seed": self.seed,
            "subsets": list(self.subsets),
        }


def ruler_task(
    pipeline: RapidPipeline,
    subset: str,
    *,
    context: int,
    seed: int = 0,
    number: int = 0,
    max_new_tokens: int | None = None,
) -> Task:
    """Generate one document with one question, as long as ``context`` allows.

    Args:
        pipeline: The pipeline with the tokenizer.
        subset: One of :data:`RULER_TASKS`.
        context: Maximum tokens of prompt and answer together.
        seed: Equal seeds and numbers give equal tasks.
        number: The task's number among those of the seed, from 0.
        max_new_tokens: Maximum length of an answer; ``None`` is RULER's.

    Raises:
        ContextLengthError: The length leaves no tokens for a document.
        ConfigurationError: The subset is unknown, or the length is too short for the hidden sentences or
            needs more words than available.
    """
    rng = random.Random(f"{subset} {seed} {number}")
    puzzle = _puzzle(rng, subset, context)
    form = puzzle.form
    if max_new_tokens is not None:
        form = replace(form, max_new_tokens=max_new_tokens)
    budget = document_budget(pipeline, [puzzle.question], form, sequence_tokens=context)
    # The smallest number of units with a document that is too long.
    units = bisect_right(
        range(puzzle.max_units + 1), budget, key=lambda n: pipeline.count_tokens(puzzle.build(n)[0])
    )
    if units == 0 or units > puzzle.max_units:
        raise ConfigurationError(
            f"RULER's {subset} cannot be generated with {context:,} tokens: "
            + ("the hidden sentences are longer." if units == 0 else "there are not enough words.")
            + " Take another length."
        )
    document, evidence = puzzle.build(units - 1)
    question = replace(
        puzzle.question, evidence=evidence, kind=subset, question_id=f"{subset}-{context}-{number}"
    )
    other = " ".join(filler_sentences(random.Random(f"other {seed} {number}"), max(units, context // 12)))
    return Task(document, (question,), context, other, form)


def _puzzle(rng: random.Random, subset: str, context: int) -> _Puzzle:
    match subset:
        case "single":
            return _needles(rng, context, keys=1, values=1, asked=1)
        case "multi-key":
            return _needles(rng, context, keys=_NEEDLES, values=1, asked=1)
        case "multi-value":
            return _needles(rng, context, keys=1, values=_NEEDLES, asked=1)
        case "multi-query":
            return _needles(rng, context, keys=_NEEDLES, values=1, asked=_NEEDLES)
        case "variable-tracking":
            return _tracking(rng, context)
        case "common-words":
            return _common_words(rng, context)
    raise ConfigurationError(f"there is no RULER task {subset!r}: allowed are {', '.join(RULER_TASKS)}.")


def _needles(rng: random.Random, context: int, *, keys: int, values: int, asked: int) -> _Puzzle:
    """Hide sentences with magic numbers in filler, and ask for the numbers of some keys.

    The contradiction gives other numbers for these keys.
    """
    names = rng.sample(compound_words("-"), keys)
    # Drawn in one sample, so that all numbers are distinct.
    numbers = iter(rng.sample(range(1_000_000, 10_000_000), keys * values))
    needles = [(name, str(next(numbers))) for name in names for _ in range(values)]
    wanted = names[:asked]
    rng.shuffle(needles)
    answers = tuple(number for name in wanted for key, number in needles if key == name)
    several = len(answers) > 1
    things = "are all the special magic numbers" if several else "is the special magic number"
    subject = f"The special magic number{'s' if several else ''}"
    who = wanted[0] if asked == 1 else f"{', '.join(wanted[:-1])}, and {wanted[-1]}"
    # Other numbers of seven digits. The sum of the two is odd, so they always differ.
    wrong = [_needle(name, str(10_999_999 - int(number))) for name, number in needles if name in wanted]
    question = TaskQuestion(
        f"What {things} for {who} mentioned in the provided text?",
        answers,
        answer_start=f"{subject} for {who} mentioned in the provided text {'are' if several else 'is'}",
        contradiction=" ".join(wrong),
    )
    hidden = [_needle(name, number) for name, number in needles]
    gold = [name in wanted for name, _ in needles]
    template = _NEEDLES_TEMPLATE if several else _NEEDLE_TEMPLATE
    return _hidden(rng, question, TaskFormat("contains-all", template, 128), hidden, gold, context)


def _needle(name: str, number: str) -> str:
    return f"One of the special magic numbers for {name} is: {number}."


def _tracking(rng: random.Random, context: int) -> _Puzzle:
    """Hide a chain of assignments in filler, and ask for all variables with the first one's value.

    The contradiction assigns the value to other variables.
    """
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(rng.choices(letters, k=5))
        names += [name] if name not in names else []
    value = rng.randrange(10_000, 99_999)
    # Other variables: each letter is replaced by the next one of the alphabet.
    wrong = [name.translate(str.maketrans(letters, letters[1:] + letters[0])) for name in names]
    question = TaskQuestion(
        f"Find all variables that are assigned the value {value} in the text above.",
        tuple(names),
        answer_start=(
            f"Answer: According to the chain(s) of variable assignment in the text above, {len(names)} "
            f"variables are assigned the value {value}, they are:"
        ),
        contradiction=" ".join(_chain(wrong, value)),
    )
    form = TaskFormat("contains-all", _TRACKING_TEMPLATE, 30)
    return _hidden(rng, question, form, _chain(names, value), [True] * len(names), context)


def _chain(names: Sequence[str], value: int) -> list[str]:
    assignments = [f"VAR {after} = VAR {before}." for before, after in pairwise(names)]
    return [f"VAR {names[0]} = {value}.", *assignments]


def _hidden(
    rng: random.Random,
    question: TaskQuestion,
    form: TaskFormat,
    hidden: Sequence[str],
    gold: Sequence[bool],
    context: int,
) -> _Puzzle:
    """Put sentences into filler at random depths, in order. The gold ones are the evidence."""
    depths = sorted(rng.random() for _ in hidden)
    filler = filler_sentences(rng, context // 4)  # a sentence has at least 4 tokens

    def build(units: int) -> tuple[str, tuple[tuple[int, int], ...]]:
        positions = [int(depth * (units + 1)) for depth in depths]
        sentences: list[str] = []
        evidence: list[tuple[int, int]] = []
        length = used = 0

        def add(text: str) -> None:
            nonlocal length
            sentences.append(text)
            length += len(text) + 1

        for text, is_gold, position in zip(hidden, gold, positions, strict=True):
            for sentence in filler[used:position]:
                add(sentence)
            used = position
            if is_gold:
                evidence.append((length, length + len(text)))
            add(text)
        for sentence in filler[used:units]:
            add(sentence)
        return " ".join(sentences), tuple(evidence)

    return _Puzzle(question, form, build, len(filler))


def _common_words(rng: random.Random, context: int) -> _Puzzle:
    """Make a numbered list of words in random order, ten of which are more frequent than the others."""
    words = compound_words("")
    rng.shuffle(words)
    common, others = words[:_NUM_COMMON], words[_NUM_COMMON:]
    more = 1 + context // _ALL_WORDS_TOKENS
    often, seldom = (30 * more, 3 * more) if context >= _LONG_LIST_TOKENS else (6, 1)
    order = rng.random()

    def build(units: int) -> tuple[str, tuple[tuple[int, int], ...]]:
        listed = common * often + others[:units] * seldom
        random.Random(order).shuffle(listed)
        return " ".join(f"{i}. {word}" for i, word in enumerate(listed, start=1)), ()

    question = TaskQuestion(
        "What are the 10 most common words in the above list?",
        tuple(common),
        answer_start="Answer: The top 10 words that appear most often in the list are:",
    )
    return _Puzzle(question, TaskFormat("contains-all", _COMMON_TEMPLATE, 120), build, len(others))
