"""Training examples of questions and of repetition."""

import itertools
import random

import pytest

from rapid_integrations.demo.tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    MAX_LENGTH,
    PAD,
    SPECIAL_TOKENS,
    USER,
    build_tokenizer,
)
from rapid_integrations.demo.training.training_data import (
    ANSWER,
    QUESTION,
    Example,
    question_example,
    repetition_example,
)

ID = {token: i for i, token in enumerate(SPECIAL_TOKENS)}


def examples(length: int, num_questions: int, count: int) -> list[Example]:
    rng = random.Random(length)
    return [question_example(rng, length, num_questions) for _ in range(count)]


@pytest.mark.parametrize(("length", "num_questions"), [(256, 4), (512, 7), (2048, 26)])
def test_examples_fit_and_their_answers_are_whole_turns(length: int, num_questions: int) -> None:
    for example in examples(length, num_questions, 40):
        assert len(example.ids) == len(example.positions) == len(example.labels) == length
        assert all(before < after for before, after in itertools.pairwise(example.positions))
        assert example.positions[-1] < MAX_LENGTH + length
        assert example.ids[0] == ID[BOS]
        assert ANSWER in example.labels
        if QUESTION not in example.labels:
            continue  # an excerpt without facts became repetition
        for i, label in enumerate(example.labels[1:], 1):
            if label == ANSWER and example.labels[i - 1] != ANSWER and ID[USER] in example.ids:
                assert example.ids[i - 1] == ID[ASSISTANT]
            if label != ANSWER and example.labels[i - 1] == ANSWER:
                assert example.ids[i - 1] == ID[EOS]


def test_answers_of_examples_are_in_the_context() -> None:
    tokenizer = build_tokenizer()
    for example in examples(512, 6, 40):
        if QUESTION not in example.labels:
            continue
        first = (
            example.labels.index(QUESTION) if ANSWER not in example.labels else example.labels.index(ANSWER)
        )
        context = tokenizer.decode(example.ids[:first])
        answers = tokenizer.decode(
            [t for t, label in zip(example.ids, example.labels, strict=True) if label == ANSWER]
        )
        numbers = [word.strip(".") for word in answers.split() if word.strip(".").isdigit()]
        assert all(number in context for number in numbers)


def test_excerpts_begin_and_end_within_sentences() -> None:
    tokenizer = build_tokenizer()
    starts = [
        tokenizer.decode(e.ids[3:7])
        for e in examples(512, 6, 200)
        if tokenizer.id_to_token(e.ids[2]) == "▁Context"
    ]
    assert any(start.lstrip(": ")[:1].islower() for start in starts)
    assert sum(start.lstrip(": #")[:1].isupper() for start in starts) > len(starts) / 2


def test_repetition_repeats() -> None:
    example = repetition_example(random.Random(0), 128, max_position=4096)
    half = example.labels.index(ANSWER)
    seen = set(itertools.pairwise(example.ids[1:half]))
    pairs = [(example.ids[i - 1], example.ids[i]) for i in range(1, 128) if example.labels[i] == ANSWER]
    assert len(pairs) > 40
    assert set(pairs) <= seen
    assert ID[PAD] not in example.ids[:127]
