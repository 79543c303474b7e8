"""The handbook in plain English: its questions can be answered from one sentence each."""

import os
import re
from pathlib import Path

import pytest

from rapid_integrations.demo import harbour_handbook
from rapid_integrations.demo.documents import HARBOUR_QUESTIONS_PATH
from rapid_integrations.evaluation.tasks.own_data import OwnData
from rapid_integrations.evaluation.tasks.task import TaskQuestion

HANDBOOK = harbour_handbook()
(QUESTIONS,) = OwnData.read(HARBOUR_QUESTIONS_PATH, metric="contains", prompt_template="").questions
# Words that any two English sentences may share.
FUNCTION_WORDS = set(
    re.findall(r"\w+", "a an and at did do does how i in is it of on the to was what when where which who")
)


def evidence_of(question: TaskQuestion) -> str:
    ((start, end),) = question.evidence
    return HANDBOOK.text[start:end]


def words_of(text: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"[a-z0-9]+", text.lower())} - FUNCTION_WORDS


def test_there_are_twelve_different_questions():
    assert (
        len(QUESTIONS)
        == len({q.question for q in QUESTIONS})
        == len({q.question_id for q in QUESTIONS})
        == 12
    )
    asked = [(q.question, q.answer, q.kind, q.evidence) for q in HANDBOOK.questions]
    assert asked == [(q.question, q.answers[0], q.kind, q.evidence) for q in QUESTIONS]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.question_id)
def test_the_evidence_is_one_sentence_that_holds_an_answer_and_occurs_once(question):
    evidence = evidence_of(question)
    assert HANDBOOK.text.count(evidence) == 1
    assert evidence.endswith(".")
    assert re.fullmatch(r"[A-Z].*\.", evidence)
    assert len(re.findall(r"\.(?= |$)", evidence)) == 1
    assert question.answers[0] in evidence
    assert not any(answer.lower() in question.question.lower() for answer in question.answers)


def test_a_third_of_the_questions_share_no_key_word_with_their_evidence():
    apart = {q.question_id for q in QUESTIONS if not words_of(q.question) & words_of(evidence_of(q))}
    assert apart == {q.question_id for q in QUESTIONS if q.kind == "paraphrase"}
    assert len(apart) == 4


def test_the_text_is_plain_ascii_of_about_6000_tokens():
    assert HANDBOOK.text.isascii()
    assert HANDBOOK.text.startswith(f"# {HANDBOOK.title}\n\n## 1. ")
    assert not re.search(r"[ \t]\n|\n{3}|\t|\r", HANDBOOK.text)
    # SmolLM2's tokenizer makes 5,973 tokens of it: 3.96 characters each.
    assert 5700 <= len(HANDBOOK.text) / 3.96 <= 6300


@pytest.mark.real
@pytest.mark.skipif("RAPID_REAL_MODEL" not in os.environ, reason="RAPID_REAL_MODEL names no model")
def test_a_real_tokenizer_counts_about_6000_tokens():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(os.environ["RAPID_REAL_MODEL"]))
    assert 5000 <= len(tokenizer.encode(HANDBOOK.text)) <= 6500
