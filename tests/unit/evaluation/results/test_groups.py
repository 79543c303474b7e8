"""Results by groups of questions, and tables of graded answers."""

from io import StringIO

import pytest
from helpers.evaluation_pipelines import ScriptedPipeline
from rich.console import Console

from rapid_integrations.evaluation import (
    Task,
    TaskFormat,
    TaskQuestion,
    evaluate,
    group_rows,
    score_interval,
)
from rapid_integrations.evaluation.tables import group_table, report_table

DOCUMENT = "The sea is wide. The house is old. " * 30
QUESTIONS = (
    TaskQuestion("What is one?", ("red one",), kind="easy, short"),
    TaskQuestion("What is two?", ("two",), kind="hard, short"),
    TaskQuestion("What is three?", ("three",)),
)


def graded_report(metric="f1"):
    tasks = [Task(DOCUMENT, QUESTIONS, length, format=TaskFormat(metric)) for length in (1024, 600)]
    return evaluate(ScriptedPipeline(lambda call: "two" if call.plain else "one"), tasks, ["lc", "rapid"])


def rendered(table):
    console = Console(file=StringIO(), width=80)
    console.print(table)
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_a_question_counts_in_every_group_of_its_kind():
    report = graded_report()
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
    report = graded_report()
    lines = rendered(group_table(report.answers, ["rapid", "lc"]))
    assert lines[0] == ["context", "group", "questions", "rapid", "lc"]
    assert lines[2] == ["1k", "all", "3", "22.2", "33.3"]
    assert ["short", "2", "33.3", "50.0"] in lines
    assert len(lines) == 2 + 2 * 4


def test_the_report_table_shows_scores_as_scores():
    graded = graded_report()
    assert graded.result("rapid", 600).accuracy.value == pytest.approx(2 / 9)
    lines = rendered(report_table(graded))
    assert lines[0][2] == "score"
    assert "22.2" in lines[3]
    right = graded_report("contains")
    assert rendered(report_table(right))[0][2] == "right"
    accuracy = right.result("lc", 600).accuracy
    assert accuracy == score_interval([0.0, 1.0, 0.0], [0, 0, 0])
    assert (accuracy.successes, accuracy.total) == (1, 3)
