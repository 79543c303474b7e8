"""Interrupted runs: no answer is lost, computed twice or taken from another run."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.evaluation_pipelines import ScriptedPipeline
from helpers.tiny_models import tiny_model

from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError, DocumentError
from rapid_integrations.evaluation import AnswerRecord, Setting, demo_tasks, evaluate
from rapid_integrations.evaluation.methods.choice import make_method
from rapid_integrations.evaluation.results import identity
from rapid_integrations.evaluation.results.journal import JOURNAL_FILE, make_folder, open_journal

TASKS = demo_tasks(context=512, num_questions=5, seed=2)
METHODS = ["lc", "rag", "rapid"]
WARM = dataclasses.replace(make_method("rapid"), options={"temperature": 1})
SWEEP = {"transfer_strength": (1, 5)}
ANSWERS = 5 * (1 + 1 + 2)


class InterruptedError_(Exception):
    pass


def answering(call):
    return f"{call.prompt.query} {call.options.speculation.transfer_strength if not call.plain else ''}"


def run(folder, pipeline=None, *, after=None, tasks=TASKS, methods=METHODS, sweep=SWEEP, **more):
    """Run an evaluation, and interrupt it after ``after`` answers."""
    answers = []

    def interrupt(record):
        answers.append(record)
        if len(answers) == after:
            raise InterruptedError_

    return evaluate(
        pipeline or ScriptedPipeline(answering),
        tasks,
        methods,
        sweep=sweep,
        journal_folder=folder,
        on_answer=interrupt,
        **more,
    )


def untimed(report):
    """The answers without the time of their retrieval."""
    return [
        dataclasses.replace(record, stats=dataclasses.replace(record.stats, retrieval_s=0.0))
        for record in report.answers
    ]


@pytest.fixture(scope="module")
def whole():
    """The answers of an uninterrupted run."""
    return untimed(run(None))


@pytest.fixture
def journal(tmp_path):
    """The journal of a run that was interrupted after seven answers."""
    with pytest.raises(InterruptedError_):
        run(tmp_path, after=7)
    return tmp_path / JOURNAL_FILE


@pytest.mark.parametrize("after", [1, 4, 7, 12, ANSWERS])
def test_an_interrupted_run_continues(tmp_path, after, whole):
    with pytest.raises(InterruptedError_):
        run(tmp_path, after=after)
    pipeline = ScriptedPipeline(answering)
    report = run(tmp_path, pipeline)
    assert len(whole) == ANSWERS
    assert untimed(report) == whole
    assert len(pipeline.measured_calls) == ANSWERS - after
    # The warm-up precedes the first new answer, if there is one.
    warm_up = [call.options.sampling.max_new_tokens for call in pipeline.calls[: len(METHODS)]]
    assert warm_up == ([8] * 3 if after < ANSWERS else [])
    again = ScriptedPipeline(answering)
    assert untimed(run(tmp_path, again)) == whole
    assert again.calls == []


def test_a_journal_has_a_header_and_a_line_for_each_answer(tmp_path):
    report = run(tmp_path, about={"seed": 3})
    header, *lines = [json.loads(line) for line in (tmp_path / JOURNAL_FILE).read_bytes().splitlines()]
    assert [line["answer"] for line in lines] == json.loads(
        json.dumps([record.as_dict() for record in report.answers])
    )
    assert [line["elapsed_s"] for line in lines] == sorted(line["elapsed_s"] for line in lines)
    identity = header["run"]
    assert identity["target"]["name"] == "scripted"
    assert identity["target"]["fingerprint"] != identity["drafter"]["fingerprint"]
    assert (identity["methods"], identity["tasks"]) == (METHODS, {"seed": 3})
    assert identity["options"]["max_new_tokens"] == 256
    assert (identity["retrieval"], identity["sweep"]) == (["natural"], {"transfer_strength": [1, 5]})
    assert {"python", "torch", "transformers"} <= identity["versions"].keys()


def test_time_adds_up_over_interruptions(journal):
    lines = journal.read_bytes().splitlines(keepends=True)
    last = json.loads(lines[-1])
    last["elapsed_s"] = 1000.0
    journal.write_bytes(b"".join([*lines[:-1], json.dumps(last).encode() + b"\n"]))
    report = run(journal.parent)
    assert 1000 < report.settings["seconds"] < 1100


def test_answered_questions_are_not_retrieved_again(journal, monkeypatch):
    from rapid_integrations.evaluation.methods.retrieval import TaskRetrieval

    found, find = [], TaskRetrieval.find

    def counting(self, task, question):
        found.append(question.question)
        return find(self, task, question)

    monkeypatch.setattr(TaskRetrieval, "find", counting)
    run(journal.parent)
    # The first question is answered, the second in part.
    assert found == [q.question for task in TASKS for q in task.questions][1:]


def test_an_incomplete_line_is_dropped_and_its_question_asked_again(journal, whole):
    data = journal.read_bytes()
    lines = data.splitlines(keepends=True)
    for cut in (1, 20, len(lines[-1]) - 1):
        journal.write_bytes(data[:-cut])
        pipeline = ScriptedPipeline(answering)
        assert untimed(run(journal.parent, pipeline)) == whole
        assert len(pipeline.measured_calls) == ANSWERS - 6
        assert len(journal.read_bytes().splitlines()) == 1 + ANSWERS


def test_a_truncated_file_keeps_its_complete_lines(journal):
    data = journal.read_bytes()
    identity = json.loads(data.splitlines()[0])["run"]
    lines = [json.loads(line)["answer"] for line in data.splitlines()[1:]]
    for length in range(0, len(data), 97):
        journal.write_bytes(data[:length])
        with open_journal(journal.parent, identity) as opened:
            found = [
                opened.find(a["document"], a["question_number"], a["method"], Setting.from_dict(a["setting"]))
                for a in lines
            ]
        whole = max(0, data[:length].count(b"\n") - 1)
        assert [record.as_dict() for record in found if record] == [
            AnswerRecord.from_dict(a).as_dict() for a in lines[:whole]
        ]


def test_a_last_line_that_is_not_json_is_dropped(journal, whole):
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + b"\0" * 40 + b"\n")
    assert untimed(run(journal.parent)) == whole


@pytest.mark.parametrize("length", [0, 1, 30, -1])
def test_an_incomplete_header_starts_a_new_journal(journal, whole, length):
    header = journal.read_bytes().splitlines(keepends=True)[0]
    journal.write_bytes(header[:length])
    assert untimed(run(journal.parent)) == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"My notes.\n", "rapid eval has not written it"),
        (b"My", "rapid eval has not written it"),
        (b'{"rapid_eval_answers": 99, "run": {}}\n', "was written by another version of rapid eval"),
        (b'{"rapid_eval_answers": 1}\n', "was written by another version of rapid eval"),
        (b'{"rapid_eval_answers": \n', "line 1: this is not JSON"),
    ],
)
def test_another_file_is_left_alone(tmp_path, content, message):
    file = tmp_path / JOURNAL_FILE
    file.write_bytes(content)
    with pytest.raises(DocumentError, match=message):
        run(tmp_path)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops\n", "line 3: this is not JSON, so the file is damaged. Remove the line"),
        (b'{"answer": {}}\n', "line 3: this is not an answer of this version"),
        (b"[]\n", "line 3: this is not an answer of this version"),
    ],
)
def test_damage_in_the_middle_names_the_line(journal, line, message):
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[2] = line
    journal.write_bytes(b"".join(lines))
    with pytest.raises(DocumentError, match=message):
        run(journal.parent)
    assert journal.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sweep": {"transfer_strength": (1, 9)}},
            r"sweep.transfer_strength was \[1, 5\] and is \[1, 9\]\. Use",
        ),
        ({"retrieval": "gold"}, r'run: retrieval was \["natural"\] and is \["gold"\]\. Use'),
        ({"methods": ["lc", "rag"]}, r'methods was \["lc", "rag", "rapid"\] and is \["lc", "rag"\]'),
        ({"methods": ["lc", "rag", WARM]}, r"run: method_options.rapid.temperature was null and is 1\. Use"),
        ({"prompt_template": "{context} {question}"}, "prompt_template was .* and is "),
        ({"about": {"seed": 4, "data": "x"}}, r"tasks.seed was null and is 4\. Use"),
        (
            {"options": ScriptedPipeline(answering).options.override(temperature=1, top_k=3)},
            r"options.temperature was 0.0 and is 1; options.top_k was null and is 3\. Use",
        ),
    ],
)
def test_the_journal_of_another_run_is_an_error_with_the_differences(journal, change, message):
    data = journal.read_bytes()
    with pytest.raises(ConfigurationError, match=message):
        run(journal.parent, **change)
    assert journal.read_bytes() == data


def test_models_are_identified_by_their_weights(journal, whole):
    pipeline = ScriptedPipeline(answering)
    pipeline.engine.drafter.name = "moved/elsewhere"
    assert untimed(run(journal.parent, pipeline)) == whole
    pipeline.engine.target.kv_dtype = torch.float16
    message = r'run: target.fingerprint was "\w+… and is "\w+…; kv_dtype was null and is "float16"\. '
    with pytest.raises(ConfigurationError, match=message):
        run(journal.parent, pipeline)
    pipeline.engine.target.kv_dtype = None
    pipeline.engine.drafter.model = tiny_model("llama", 7)
    message = (
        r'run: drafter.name was "drafter" and is "moved/elsewhere"; drafter.fingerprint was "\w+… and is '
    )
    with pytest.raises(ConfigurationError, match=message):
        run(journal.parent, pipeline)


def test_another_machine_is_another_run(journal, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    monkeypatch.setattr(identity, "machine", lambda device: {"processor": "Abacus", "system": "Beads 2"})
    with pytest.raises(ConfigurationError, match=r'processor was ".*" and is "Abacus"; threads was \d+ and '):
        run(journal.parent)


def test_changed_documents_are_an_error(journal):
    changed = dataclasses.replace(TASKS[0], document=TASKS[0].document + "!")
    with pytest.raises(ConfigurationError, match=r"answers about document 1, but its text, its questions or"):
        run(journal.parent, tasks=[changed, *TASKS[1:]])


def test_a_failed_question_is_asked_again(tmp_path, whole):
    pipeline = ScriptedPipeline(answering)

    def failing(call):
        if len(pipeline.measured_calls) == 5:
            raise RuntimeError("out of paper")
        return answering(call)

    pipeline.script = failing
    with pytest.raises(RuntimeError, match="out of paper"):
        run(tmp_path, pipeline)
    pipeline = ScriptedPipeline(answering)
    assert untimed(run(tmp_path, pipeline)) == whole
    assert len(pipeline.measured_calls) == ANSWERS - 4


@pytest.mark.slow
def test_only_one_process_writes_to_a_folder(tmp_path):
    with open_journal(tmp_path, {}):
        with pytest.raises(ConfigurationError, match="another process is evaluating into"):
            run(tmp_path)
        program = (
            "import sys\nfrom pathlib import Path\n"
            "from rapid_integrations.evaluation.results.journal import open_journal\n"
            "with open_journal(Path(sys.argv[1]), {}): pass"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert "another process is evaluating into" in done.stderr
    with open_journal(tmp_path, {}):
        pass


def test_a_folder_that_cannot_be_written_to_says_so(tmp_path):
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"cannot be written to: .* Name another one"):
        make_folder(file / "inside")
    make_folder(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


def test_stats_are_restored_exactly(tmp_path):
    stats = RapidStats(completion_tokens=3, decode_s=1 / 3, agreement=0.1 + 0.2, verify_s=1e-300)
    first = run(tmp_path, ScriptedPipeline(answering, lambda call: stats))
    second = run(tmp_path)
    assert first.answers == second.answers
    assert first.results == second.results
