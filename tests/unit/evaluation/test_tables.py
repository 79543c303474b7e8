"""Tables as they look in a terminal of 80 columns."""

from io import StringIO

from helpers.evaluation_pipelines import ScriptedPipeline
from rich.console import Console

from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.evaluation import Task, TaskQuestion, evaluate
from rapid_integrations.evaluation.tables import (
    context_label,
    demo_table,
    method_label,
    report_table,
    settings_line,
)

DOCUMENT = "The sea is wide. The house is old. " * 30


def task(context: int) -> Task:
    questions = tuple(TaskQuestion(f"What is {name}?", (name,)) for name in ("one", "two", "three", "four"))
    return Task(DOCUMENT, questions, context)


def report(contexts=(1024, 16384), methods=("lc", "rag", "sd", "rapid")):
    def stats(call):
        if call.plain:
            return RapidStats(completion_tokens=20, rounds=20, decode_s=0.2)
        return RapidStats(
            completion_tokens=20, rounds=4, drafted_tokens=40, accepted_tokens=16, decode_s=0.05
        )

    def script(call):
        return call.prompt.query.removeprefix("What is ").rstrip("?") if not call.plain else "one"

    return evaluate(ScriptedPipeline(script, stats), [task(context) for context in contexts], methods)


def rendered(table) -> list[str]:
    console = Console(file=StringIO(), width=80)
    console.print(table)
    return console.file.getvalue().splitlines()


def test_the_report_has_a_row_for_every_context_and_method():
    lines = rendered(report_table(report()))
    assert all(len(line) <= 80 for line in lines)
    rows = [line.split() for line in lines if "%" in line and "95 %" not in line]
    assert rows[0] == ["1k", "long", "context", "25.0", "%", "0–75", "–", "1.0", "100", "1.0×"]
    assert rows[3] == ["RAPID", "100.0", "%", "51–100", "40", "%", "5.0", "400", "4.0×"]
    assert rows[4][0] == "16k"
    assert len(rows) == 8
    header = lines[0].split()
    assert header == ["context", "method", "right", "95", "%", "accepted", "tok/round", "tok/s", "speed"]


def test_speed_is_relative_to_plain_decoding_and_left_out_without_it():
    without = rendered(report_table(report((1024,), ("rag", "rapid"))))
    rows = [line.split() for line in without if "retrieved only" in line or "RAPID" in line]
    assert [row[-2:] for row in rows] == [["100", "–"], ["400", "–"]]


def test_the_demo_table_marks_every_answer():
    lines = rendered(demo_table(report((16384,))))
    assert all(len(line) <= 80 for line in lines)
    long_context = next(line.split() for line in lines if "long context" in line)
    assert long_context == ["long", "context", "✓✗✗✗", "1/4", "100", "1.0×", "–", "1.0", "0.0", "s"]
    rapid = next(line.split() for line in lines if "RAPID" in line)
    assert rapid == ["RAPID", "✓✓✓✓", "4/4", "400", "4.0×", "40", "%", "5.0", "0.0", "s"]


def test_labels():
    assert [context_label(n) for n in (1024, 16384, 600, 1000)] == ["1k", "16k", "600", "1,000"]
    assert method_label("sd") == "plain speculation"
    assert method_label("mine") == "mine"


def test_the_settings_line_leaves_folders_out():
    settings = {"target": "/a/b/target", "drafter": "org/model-0.5B", "retrieval": "gold"}
    line = settings_line({**settings, "device": "cpu", "threads": 2})
    assert line == "target target, drafter model-0.5B, gold retrieval, cpu with 2 threads"
