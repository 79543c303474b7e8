"""``rapid`` as a separate process, with the bundled pair."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rapid_integrations import demo
from rapid_integrations.cli import app as cli
from rapid_integrations.demo import generate_documents, sample_documents

HANDBOOK, _, _ = sample_documents()
HANDBOOK_FILE = Path(demo.__file__).parent / "samples" / "handbook.md"


def rapid(*arguments: str, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    environment.pop("FORCE_COLOR", None)
    return subprocess.run(
        [sys.executable, "-m", "rapid_integrations.cli", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        timeout=timeout_s,
        check=False,
    )


def rapid_here(*arguments: str) -> None:
    """Run a command in this process, where the modules are already imported."""
    assert cli.main(arguments) == 0


def ask(question: str, *more: str) -> subprocess.CompletedProcess[str]:
    return rapid("ask", "--document", str(HANDBOOK_FILE), "--question", question, *more)


@pytest.fixture(scope="module")
def single() -> demo.DemoQuestion:
    return next(question for question in HANDBOOK.questions if question.kind == "single")


def test_ask_answers_in_json_and_nothing_else(single):
    done = ask(single.question, "--json", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    assert answer.keys() == {"answer", "finish_reason", "stats"}
    assert answer["finish_reason"] == "stop"
    assert answer["answer"] == single.answer
    stats = answer["stats"]
    assert 4096 < stats["prompt_tokens"] < 4300
    assert 0 < stats["drafter_prompt_tokens"] < 400
    assert 0 < stats["accepted_tokens"] <= stats["drafted_tokens"]
    assert stats["tokens_per_round"] > 1
    assert stats["retriever"] == "bm25"
    assert all(chunk["text"] in HANDBOOK.text for chunk in stats["retrieved_chunks"])


def test_ask_streams_the_same_answer_as_text(single):
    done = ask(single.question)
    assert done.returncode == 0, done.stderr
    assert done.stdout == single.answer + "\n"
    assert "prompt tokens read in" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_sampling_repeats_with_its_seed(tmp_path, capsys):
    path = tmp_path / "start.txt"
    path.write_text(HANDBOOK.text[:2000], encoding="utf-8")
    answers = []
    for seed in ("7", "7", "8"):
        rapid_here(
            "ask", "--document", str(path), "--question", HANDBOOK.questions[0].question, "--json",
            "--temperature", "5", "--max-new-tokens", "24", "--seed", seed,
        )  # fmt: skip
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_a_document_that_does_not_fit_is_one_line_and_exit_2(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("The old mill was quiet. " * 20_000, encoding="utf-8")
    done = rapid("ask", "--document", str(path), "--question", "Where?", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert re.search(r"the prompt has 1\d\d,\d{3} tokens; '.*' takes \d\d,\d{3}", done.stderr)


@pytest.mark.slow
def test_eval_measures_what_it_says_and_repeats_with_its_seed(tmp_path):
    files = tmp_path / "first.json", tmp_path / "second.json"
    arguments = (
        "eval", "--methods", "generate,lc,rag,sd,rapid", "--contexts", "512,1k", "--questions", "4",
        "--seed", "5", "--num-draft-tokens", "6", "--json",
    )  # fmt: skip
    done = rapid(*arguments, str(files[0]))
    assert done.returncode == 0, done.stderr
    assert "plain speculation" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    rapid_here(*arguments, str(files[1]))
    first, second = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    assert [(r["question"], r["method"], r["answer"]) for r in first["answers"]] == [
        (r["question"], r["method"], r["answer"]) for r in second["answers"]
    ]

    cells = {(row["method"], row["context"]): row for row in first["results"]}
    assert len(cells) == 10
    assert all(row["questions"] == 4 and row["decode_tokens_per_s"] > 0 for row in cells.values())
    assert all(row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] for row in cells.values())
    for context in (512, 1024):
        assert cells["lc", context]["tokens_per_round"] == 1
        assert cells["rapid", context]["tokens_per_round"] > 2
        assert 0 < cells["sd", context]["acceptance_rate"] <= 1
    answers = {
        method: [record["answer"] for record in first["answers"] if record["method"] == method]
        for method in ("generate", "lc", "sd")
    }
    assert answers["generate"] == answers["lc"] == answers["sd"]


@pytest.mark.slow
def test_an_evaluation_that_is_killed_goes_on_and_answers_the_same(tmp_path):
    arguments = (
        "eval", "--methods", "lc,sd,rapid", "--contexts", "512,1k", "--questions", "4", "--seed", "5",
        "--num-draft-tokens", "6", "--retrieval", "natural,missing", "--sweep", "transfer_strength=1,5",
        "--report",
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rapid_here(*arguments, str(whole))
    command = [sys.executable, "-m", "rapid_integrations.cli", *arguments, str(killed)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    answers = 8 * (1 + 2 + 4)
    for least in (5, 30):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            while process.poll() is None and journal_lines(killed) < least:
                time.sleep(0.005)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        assert least <= journal_lines(killed) < 1 + answers
    before = (killed / "answers.jsonl").read_bytes()
    with (killed / "answers.jsonl").open("ab") as file:
        file.write(b'{"answer": {"method": "lc", "con')
    rapid_here(*arguments, str(killed))
    assert (killed / "answers.jsonl").read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    results = [
        json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (whole, killed)
    ]
    names = ("document", "question", "method", "setting", "answer", "score")
    counts = ("completion_tokens", "rounds", "drafted_tokens", "accepted_tokens", "prompt_tokens")
    texts = [
        [[a[name] for name in names] + [a["stats"][name] for name in counts] for a in each["answers"]]
        for each in results
    ]
    assert len(texts[0]) == answers
    assert texts[0] == texts[1]
    assert [row["accuracy"] for row in results[0]["results"]] == [
        row["accuracy"] for row in results[1]["results"]
    ]


def journal_lines(folder: Path) -> int:
    """Number of complete lines of a journal that another process is writing."""
    file = folder / "answers.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
def test_good_and_missing_retrieval_make_the_difference_they_should(tmp_path):
    accuracy = {}
    for quality in ("gold", "missing"):
        file = tmp_path / f"{quality}.json"
        rapid_here(
            "eval", "--methods", "rag", "--contexts", "1k", "--questions", "16", "--retrieval", quality,
            "--json", str(file),
        )  # fmt: skip
        (row,) = json.loads(file.read_text(encoding="utf-8"))["results"]
        assert row["evidence_found"] == (1.0 if quality == "gold" else 0.0)
        accuracy[quality] = row["accuracy"]
    assert accuracy["gold"] > accuracy["missing"]


@pytest.mark.slow
def test_eval_reads_ones_own_documents_once_and_finds_hidden_numbers(tmp_path):
    (document,) = generate_documents(num_tokens=1024, num_documents=1, questions_per_document=4, seed=7)
    (tmp_path / "records.txt").write_text(document.text, encoding="utf-8")
    rows = [
        {"document_file": "records.txt", "question": q.question, "answer": q.answer}
        for q in document.questions
    ]
    data, file = tmp_path / "mine.jsonl", tmp_path / "mine.json"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    rapid_here("eval", "--data", str(data), "--metric", "f1", "--methods", "lc,rapid", "--json", str(file))
    results = json.loads(file.read_text(encoding="utf-8"))
    assert all(row["accuracy"] > 0.5 for row in results["results"])
    assert sum(a["stats"]["reused_prefix_tokens"] > 512 for a in results["answers"]) == 2 * 4 - 1

    done = rapid(
        "eval", "--task", "ruler", "--subsets", "single,common-words", "--contexts", "1k", "--questions", "2",
        "--methods", "lc,rapid", "--json", str(file),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "common-words" in done.stdout
    results = json.loads(file.read_text(encoding="utf-8"))
    lengths = [a["stats"]["prompt_tokens"] for a in results["answers"] if a["kind"] == "single"]
    assert all(1024 - 128 - 70 < length <= 1024 - 128 for length in lengths)
    assert {group["group"] for group in results["groups"]} == {"all", "single", "common-words"}


def test_demo_shows_answers_and_a_table_that_fit_a_terminal():
    done = rapid("demo", "--questions", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = done.stdout
    assert "\x1b" not in out
    assert "\r" not in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "Notes of the gate and the evening, 16,384 tokens: 2 questions." in out
    marks = {}
    for method in ("long context", "retrieved only", "plain speculation", "RAPID"):
        (marks[method],) = re.findall(rf"^{method} +([✓✗]+) ", out, flags=re.MULTILINE)
        assert len(marks[method]) == 2
    assert out.count("✓ right") == marks["RAPID"].count("✓")
    assert out.count("✗ wrong") == marks["RAPID"].count("✗")
    assert re.search(r"5 of 6 answers over\s+it reused", out)
    assert "rapid ask --document" in out
    assert "the drafter read" not in out


@pytest.mark.slow
def test_the_demo_agrees_with_the_evaluation_to_within_a_question():
    out = rapid("demo").stdout
    right = {
        method: int(n) for method, n in re.findall(r"^(long context|RAPID) .* (\d)/6 ", out, re.MULTILINE)
    }
    # Of 200 questions at this length: evaluation/README.md.
    assert abs(right["long context"] - 0.67 * 6) < 1
    assert abs(right["RAPID"] - 0.755 * 6) < 1


@pytest.mark.slow
def test_demo_with_a_target_answers_about_the_handbook():
    # As a target of its own, the pair reads the English text as syllables it does not know.
    done = rapid(
        "demo", "--target", str(demo.TARGET_PATH), "--drafter", str(demo.DRAFTER_PATH), "--questions", "3"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert out.startswith(demo.harbour_handbook().title)
    assert all(len(line) <= 80 for line in out.splitlines())
    for question in demo.harbour_handbook().questions[:3]:
        assert question.question in out
    rows = re.findall(r"^(long context|RAPID) +[✓✗]{3} +\d/3 .* \d+\.\d s$", out, flags=re.MULTILINE)
    assert rows == ["long context", "RAPID"]
    assert len(re.findall(r"the drafter read \d+ passages, with(?:out)?\s+the evidence", out)) == 3
    assert re.search(r"5 of 6 answers over\s+it reused", out)
