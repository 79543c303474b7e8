"""Results by groups, and tables and intervals of graded answers."""

from io import StringIO

import pytest
from helpers.evaluation_pipelines import ScriptedPipeline
from rich.console import Console

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation import (
    Task,
    TaskFormat,
    TaskQuestion,
    evaluate,
    group_rows,
    score_interval,
    wilson_interval,
)
from rapid_integrations.evaluation.running.follow_up import follow_up_prompt
from rapid_integrations.evaluation.tables import group_table, report_table

DOCUMENT = "The sea is wide. The house is old. " * 30
QUESTIONS = (
    TaskQuestion("What is one?", ("red one",), kind="easy, short"),
    TaskQuestion("What is two?", ("two",), kind="hard, short"),
    TaskQuestion("What is three?", ("three",)),
)


def asked(metric="f1", **form):
    pipeline = ScriptedPipeline(lambda call: "two" if call.plain else "one")
    tasks = [Task(DOCUMENT, QUESTIONS, length, format=TaskFormat(metric, **form)) for length in (1024, 600)]
    return evaluate(pipeline, tasks, ["lc", "rapid"]), pipeline


def rendered(table):
    console = Console(file=StringIO(), width=80)
    console.print(table)
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_a_question_counts_in_every_group_of_its_kind():
    report, _ = asked()
    rows = group_rows(report.answers)
    assert [(r["context"], r["group"], r["method"]) for r in rows[:4]] == [
        (1024, "all", "lc"),
        (1024, "all", "rapid"),
        (1024, "easy", "lc"),
        (1024, "easy", "rapid"),
    ]
    order = dict.fromkeys(row["group"] for row in rows)
    assert list(order) == ["all", "easy", "hard", "short"]
    scores = {(r["group"], r["method"]): (r["questions"], r["score"]) for r in rows if r["context"] == 600}
    f1 = pytest.approx(2 / 3)
    assert scores["all", "lc"] == (3, pytest.approx(1 / 3))
    assert (scores["easy", "rapid"], scores["easy", "lc"]) == ((1, f1), (1, 0))
    assert (scores["hard", "rapid"], scores["hard", "lc"]) == ((1, 0), (1, 1))
    assert scores["short", "lc"] == (2, 0.5)
    assert report.as_dict()["groups"] == rows


def test_the_group_table_has_a_column_for_every_method():
    report, _ = asked()
    lines = rendered(group_table(report.answers, ["rapid", "lc"]))
    assert lines[0] == ["context", "group", "questions", "rapid", "lc"]
    assert lines[2] == ["1k", "all", "3", "22.2", "33.3"]
    assert ["short", "2", "33.3", "50.0"] in lines
    assert len(lines) == 2 + 2 * 4


def test_the_report_table_shows_scores_as_scores():
    graded, _ = asked()
    assert graded.result("rapid", 600).accuracy.value == pytest.approx(2 / 9)
    lines = rendered(report_table(graded))
    assert lines[0][2] == "score"
    assert "22.2" in lines[3]
    right, _ = asked("contains")
    assert rendered(report_table(right))[0][2] == "right"
    accuracy = right.result("lc", 600).accuracy
    assert accuracy == score_interval([0.0, 1.0, 0.0], [0, 0, 0])
    assert (accuracy.successes, accuracy.total) == (1, 3)


def test_a_task_puts_its_questions_in_its_own_way():
    _, pipeline = asked(prompt_template="Look: {context}! {question}", max_new_tokens=77)
    calls = pipeline.calls[2:]
    assert {call.options.sampling.max_new_tokens for call in calls} == {77}
    assert calls[0].prompt.text == f"Look: {DOCUMENT}! What is one?"
    with pytest.raises(ConfigurationError, match="no metric 'bleu'"):
        asked("bleu")


def test_the_follow_up_must_name_question_and_answer():
    prompt = follow_up_prompt("Q: {question} A: {answer}.", question="{answer}?", answer="{x}")
    assert prompt.text == "Q: {answer}? A: {x}."
    with pytest.raises(ConfigurationError, match=r"must hold \{question\} and then \{answer\}"):
        follow_up_prompt("{answer} {question}", question="", answer="")


def test_an_interval_of_scores_lies_between_those_of_whole_numbers():
    low, middle, high = (wilson_interval(successes, 10) for successes in (4, 4.5, 5))
    assert low.low < middle.low < high.low
    assert low.high < middle.high < high.high
    assert middle.value == 0.45
