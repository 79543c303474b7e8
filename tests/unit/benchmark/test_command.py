"""``rapid bench`` with scripted baselines."""

import dataclasses
import json

import pytest
from helpers.benchmark_reports import ScriptedWorkers, right_answers

from rapid_integrations.benchmark import command
from rapid_integrations.benchmark.results import BenchmarkReport
from rapid_integrations.benchmark.work import Answer
from rapid_integrations.cli import app as cli

QUICK = ("bench", "--contexts", "512", "--batches", "1,2", "--repeats", "2", "--cold-tokens", "512")


@pytest.fixture
def asked(monkeypatch):
    """Scripted processes in place of real ones; ``asked`` has what they were started with."""
    started = []

    def script_with(script):
        def start(runtimes, models):
            workers = ScriptedWorkers(script)
            started.append((runtimes, models, workers))
            return workers

        monkeypatch.setattr(command, "Workers", start)
        return started

    return script_with


def test_it_shows_tables_and_writes_every_sample(asked, tmp_path, capsys):
    started = asked(right_answers)
    file, folder = tmp_path / "bench.json", tmp_path / "plots"
    assert cli.main([*QUICK, "--json", str(file), "--plot", str(folder), "--seed", "2"]) == 0
    out, err = capsys.readouterr()
    assert "Decoding, one question at a time" in out
    assert "lossless runs equal generate()'s" in out
    assert "\x1b" not in out + err
    ((runtimes, models, workers),) = started
    assert set(runtimes) == {"transformers", "rapid", "self"}
    assert models.options == {"max_new_tokens": 128}
    assert {len(run.task.document) for run in workers.runs[:3]} == {len(workers.runs[0].task.document)}
    stored = json.loads(file.read_text(encoding="utf-8"))
    report = BenchmarkReport.from_dict(stored)
    assert {len(cell.samples) for cell in report.of("decode")} == {2}
    assert {len(cell.samples) for cell in report.of("questions")} == {1}
    assert stored["settings"]["seed"] == 2
    assert stored["versions"]["torch"]
    assert stored["hardware"]["processor"]
    assert len(list(folder.glob("*.png"))) == 4


def test_a_differing_answer_is_an_error_after_all_results_are_written(asked, tmp_path, capsys):
    def script(run):
        outcome = right_answers(run)
        if run.baseline == "lookup":
            return dataclasses.replace(outcome, answers=(Answer("No.", (1,)), *outcome.answers[1:]))
        return outcome

    asked(script)
    file = tmp_path / "bench.json"
    assert cli.main([*QUICK, "--suite", "decode", "--json", str(file)]) == 1
    out, err = capsys.readouterr()
    assert "Decoding" in out
    assert "1 answers of lossless runs differ from generate()'s; the first is prompt lookup at 512" in err
    (difference,) = json.loads(file.read_text(encoding="utf-8"))["differences"]
    assert difference["answer"] == "No."
    # With rounded keys and values answers may differ, and are told all the same.
    assert cli.main([*QUICK, "--suite", "decode", "--kv-dtype", "float16", "--json", str(file)]) == 0
    assert "The engine held keys and values in float16" in capsys.readouterr().out
    assert json.loads(file.read_text(encoding="utf-8"))["differences"] == [difference]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "speed"], "no suite 'speed'"),
        (["--baselines", "vllm"], "no baseline 'vllm'"),
        (["--batches", "1,none"], "the batches '1,none'"),
        (["--retrieval", "psychic"], "--retrieval 'psychic'"),
        (["--contexts", "long"], "the context length 'long'"),
        (["--num-draft-tokens", "0"], "plain decoding"),
        (["--drafter", "self", "--peers", "rapid"], "rapid need a drafter"),
        (["--drafter", "some/model"], "without --target"),
        (["--json", "/no/such/folder/x.json"], "cannot be written"),
    ],
)
def test_an_invalid_option_is_one_line_on_stderr(asked, capsys, arguments, message):
    started = asked(right_answers)
    assert cli.main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not started


def test_a_plot_folder_that_is_a_file_is_refused(asked, tmp_path, capsys):
    asked(right_answers)
    (tmp_path / "file").touch()
    assert cli.main(["bench", "--plot", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
