"""The command line with a scripted pipeline: options, output streams and exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.evaluation_pipelines import ScriptedPipeline

from rapid_integrations import errors
from rapid_integrations.cli import app as cli
from rapid_integrations.cli.parsing import parse_contexts
from rapid_integrations.engine.stats import RapidStats, RetrievedChunk

STATS = RapidStats(
    prompt_tokens=1234,
    completion_tokens=12,
    rounds=3,
    drafted_tokens=10,
    accepted_tokens=9,
    decode_s=0.5,
    retrieved_chunks=(RetrievedChunk("It is there.", 0, 1.5),),
)


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.md"
    path.write_text("# Title\n\nThe passcode is 12.\n", encoding="utf-8")
    return path


@pytest.fixture
def pipeline(monkeypatch):
    """A scripted pipeline instead of models; ``loaded`` has the arguments of each loading."""
    pipeline = ScriptedPipeline(lambda call: "It is 12.\nReally.", lambda call: STATS)
    pipeline.loaded = []

    def load(target, drafter, options, *, embeddings, dtype, limits=None, **loading):
        pipeline.loaded.append((target, drafter, embeddings, dtype, options))
        pipeline.prefix_cache_dir = (limits or {}).get("prefix_cache_dir")
        pipeline.drafter_quantization = loading["drafter_quantization_config"]
        pipeline.kv_dtype = loading["kv_dtype"]
        pipeline.options = pipeline.options.override(**options)
        return pipeline

    monkeypatch.setattr("rapid_integrations.model_choice.load_pipeline", load)
    return pipeline


def ask(document, *more, question="What is the passcode?"):
    return cli.main(["ask", "--document", str(document), "--question", question, *more])


def test_the_drafter_may_be_rounded(document, pipeline, capsys):
    assert ask(document, "--drafter", "self", "--drafter-quantization", "int8") == 0
    assert pipeline.loaded[0][1] == "self"
    assert pipeline.drafter_quantization == "int8"
    assert ask(document, "--drafter-quantization", "int3") == 2
    assert "'int3' is not" in capsys.readouterr().err


def test_keys_and_values_may_be_rounded(document, pipeline, capsys):
    assert ask(document, "--kv-dtype", "bfloat16") == 0
    assert pipeline.kv_dtype == "bfloat16"
    assert ask(document) == 0
    assert pipeline.kv_dtype is None
    assert ask(document, "--kv-dtype", "int8") == 2
    assert "'int8' is not" in capsys.readouterr().err


def test_ask_prints_the_answer_and_only_it_on_stdout(document, pipeline, capsys):
    assert ask(document) == 0
    out, err = capsys.readouterr()
    assert out == "It is 12.\nReally.\n"
    assert err == "1,234 prompt tokens read in 0.0 s; 12 tokens at 24 a second, 4.0 a round, 90% of the drafted accepted\n"  # fmt: skip  # noqa: E501
    (call,) = pipeline.calls
    assert call.prompt.context == "# Title\n\nThe passcode is 12.\n"
    assert call.prompt.query == "What is the passcode?"
    assert call.prompt.text.startswith("Context: # Title")


def test_ask_json_prints_one_object_and_nothing_else(document, pipeline, capsys):
    assert ask(document, "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "answer": "It is 12.\nReally.",
        "finish_reason": "stop",
        "stats": {
            **STATS.as_dict(),
            "retrieved_chunks": [{"text": "It is there.", "position": 0, "score": 1.5}],
        },
    }


def test_ask_passes_its_options_on(document, pipeline):
    options = ["--transfer-strength", "2.5", "--acceptance", "paper", "--num-draft-tokens", "7"]
    options += ["--mixture-weight", "0.25"]
    options += ["--max-new-tokens", "9", "--temperature", "0.5", "--seed", "3", "--dtype", "bfloat16"]
    models = ["--target", "a/b", "--drafter", "c/d", "--embeddings", "e/f", "--retriever", "dense"]
    assert ask(document, *options, *models, "--prefix-cache-dir", "some/folder") == 0
    flat = {
        "transfer_strength": 2.5,
        "acceptance": "paper",
        "mixture_weight": 0.25,
        "num_draft_tokens": 7,
        "max_new_tokens": 9,
        "temperature": 0.5,
        "seed": 3,
    }
    assert pipeline.loaded == [("a/b", "c/d", "e/f", "bfloat16", flat)]
    assert pipeline.prefix_cache_dir == Path("some/folder")
    assert "Using the text above" in pipeline.calls[0].prompt.text


def test_options_that_are_not_given_override_nothing(document, pipeline):
    assert ask(document) == 0
    assert pipeline.prefix_cache_dir is None
    assert ask(document, "--num-draft-tokens", "auto") == 0
    assert pipeline.loaded == [(None, None, None, None, {}), (None, None, None, None, {"num_draft_tokens": None})]  # fmt: skip  # noqa: E501


def test_output_of_libraries_goes_to_stderr(document, pipeline, capsys):
    def noisy(call):
        sys.stdout.write("loading...\n")
        return "Yes."

    pipeline.script = noisy
    assert ask(document, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["answer"] == "Yes."
    assert err == "loading...\n"


UNUSABLE = {
    "empty question": (["ask", "--document", "{document}", "--question", " "], "the question is empty"),
    "missing file": (["ask", "--document", "{folder}/no.txt", "--question", "x"], "does not exist"),
    "directory": (["ask", "--document", "{folder}", "--question", "x"], "is a folder"),
    "empty document": (["ask", "--document", "{empty}", "--question", "x"], "is empty"),
    "binary": (["ask", "--document", "{binary}", "--question", "x"], "is not text"),
    "no document": (["ask", "--question", "x"], "Missing option '--document'"),
    "no question": (["ask", "--document", "{document}"], "Missing option '--question'"),
    "unknown option": (["ask", "--documents", "x"], "No such option: --documents"),
    "unknown command": (["answer"], "No such command 'answer'"),
    "acceptance": (["ask!", "--acceptance", "always"], "'lossless', 'augmented', 'mixture', 'paper'"),
    "retriever": (["ask!", "--retriever", "google"], "'bm25', 'dense'"),
    "dtype": (["ask!", "--dtype", "int3"], "'auto', 'float32', 'bfloat16', 'float16'"),
    "dense alone": (["ask!", "--retriever", "dense"], "name one with --embeddings"),
    "bm25 with embeddings": (["ask!", "--retriever", "bm25", "--embeddings", "a"], "takes no --embeddings"),
    "mixture": (["ask!", "--mixture-weight", "2"], "mixture_weight must be in [0, 1]"),
    "strength": (["ask!", "--transfer-strength", "-1"], "transfer_strength must be a number >= 0"),
    "strength word": (["ask!", "--transfer-strength", "much"], "--transfer-strength"),
    "draft tokens": (["ask!", "--num-draft-tokens", "-1"], "whole number >= 0, or 'auto'"),
    "draft tokens word": (["ask!", "--num-draft-tokens", "few"], "whole number >= 0, or 'auto'"),
    "new tokens": (["ask!", "--max-new-tokens", "0"], "max_new_tokens must be an integer >= 1"),
    "temperature": (["ask!", "--temperature", "-0.1"], "temperature must be"),
    "seed": (["ask!", "--seed", "-5"], "seed must be"),
    "contexts": (["eval", "--contexts", "1k,x"], "the context length 'x' is not allowed"),
    "contexts zero": (["eval", "--contexts", "0k"], "the context length '0k' is not allowed"),
    "contexts twice": (["eval", "--contexts", "1k,1024"], "contain a length twice"),
    "method": (["eval", "--contexts", "512", "--methods", "lc,xy"], "no method 'xy'"),
    "no method to match": (["eval", "--match-acceptance", "xy"], "no method 'xy'"),
    "nothing to tune": (["eval", "--match-acceptance", "rapid"], "none of the methods lc, rag"),
    "own metric": (["eval", "--metric", "f1"], "--metric is for own questions, not for demo"),
    "bleu": (["eval", "--data", "{document}", "--metric", "bleu"], "no metric 'bleu': allowed are exact"),
    "own file": (["eval", "--data", "{document}"], "line 1: this is not JSON"),
    "no own file": (["eval", "--data", "{folder}/no.jsonl"], "cannot be read: No such file"),
    "own contexts": (["eval", "--data", "x", "--contexts", "1k"], "--contexts is for demo and ruler and"),
    "task": (["eval", "--task", "mmlu"], "'demo', 'ruler', 'infinitebench', 'longbench-v2'"),
    "ruler subset": (["eval", "--task", "ruler", "--subsets", "x"], "the subsets x are not allowed"),
    "ruler data": (["eval", "--task", "ruler", "--data", "x"], "--data is for infinitebench and longb"),
    "ruler cot": (["eval", "--task", "ruler", "--cot"], "--cot is for longbench-v2, not for ruler"),
    "∞Bench file": (["eval", "--task", "infinitebench", "--data", "{document}"], "is not a folder"),
    "LongBench file": (["eval", "--task", "longbench-v2", "--data", "{document}"], "this is not JSON"),
    "eval retrieval": (["eval", "--retrieval", "gold,bad"], "name one or more of natural, gold, missing"),
    "eval report": (["eval", "--report", "{document}"], "cannot be written to: File exists. Name another"),
    "eval dense": (["eval", "--sweep", "retriever=bm25,dense"], "name one with --embeddings, for example"),
    "eval retriever": (["eval", "--retriever", "bm25", "--sweep", "retriever=bm25"], "already has a value"),
    "eval sweep": (["eval", "--sweep", "eta=1,2"], "'eta' cannot be swept: allowed are acceptance"),
    "eval sweep value": (["eval", "--sweep", "transfer_strength=a"], "must be a number >= 0"),
    "eval swept twice": (["eval", "--sweep", "top_k=1", "--sweep", "top_k=2"], "top_k is swept twice"),
    "eval fixed": (["eval", "--acceptance", "paper", "--sweep", "acceptance=paper"], "already has a value"),
    "eval new tokens": (["eval", "--max-new-tokens", "0"], "max_new_tokens must be an integer >= 1"),
    "eval questions": (["eval", "--questions", "0"], "--questions"),
    "eval json": (["eval", "--json", "{folder}/no/x.json"], "cannot be written"),
    "eval json folder": (["eval", "--json", "{folder}"], "cannot be written"),
    "short": (["eval", "--contexts", "64", "--questions", "1"], "num_tokens=64"),
    "plain rapid": (["eval", "--num-draft-tokens", "0"], "num_draft_tokens=0 is plain decoding"),
    "shape": (["bench-shape", "--target", "{folder}"], "A shape is one of llama-3.1-8b"),
    "no shape": (["bench-shape"], "Missing option '--target'"),
    "shape context": (["bench-shape", "--target", "llama-3.2-1b", "--context", "1k,2k"], "several lengths"),
    "shape window": (["bench-shape", "--target", "llama-3.2-1b", "--context", "128k"], "than the 131,072"),
    "shape question": (["bench-shape", "--target", "x", "--context", "16"], "context=16 is too short"),
    "acceptances": (["bench-shape", "--target", "x", "--acceptances", "80"], "numbers from 0 to 1"),
    "shape batches": (["bench-shape", "--target", "x", "--batches", "0"], "batches '0' are not allowed"),
    "shape dtype": (["bench-shape", "--target", "x", "--dtype", "int3"], "dtype='int3' is not allowed: it"),
    "shape plain": (["bench-shape", "--target", "x", "--num-draft-tokens", "0"], "plain decoding, which is"),
    "demo questions": (["demo", "--questions", "13"], "--questions"),
    "bundled questions": (["demo", "--questions", "11"], "there are 10 questions about the bundled"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_input_is_one_line_on_stderr_and_exit_2(
    arguments, message, document, pipeline, tmp_path, capsys
):
    files = {"document": document, "folder": tmp_path}
    for name, content in (("empty", b" \n"), ("binary", bytes(range(256)))):
        files[name] = tmp_path / name
        files[name].write_bytes(content)
    if arguments[0] == "ask!":
        arguments = ["ask", "--document", "{document}", "--question", "x", *arguments[1:]]
    code = cli.main([argument.format(**files) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("rapid: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert message in err
    assert pipeline.calls == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ContextLengthError("the prompt has 9,214 tokens;\n it takes 7,936."), 2),
        (errors.PromptError("the prompt is empty."), 2),
        (errors.UnsupportedModelError("no."), 2),
        (errors.VocabularyMismatchError("no."), 2),
        (errors.RetrievalError("no."), 2),
        (errors.GenerationError("the engine failed\non one request."), 1),
        (errors.EngineMemoryError("no."), 1),
        (errors.EngineClosedError("no."), 1),
        (errors.DeadlineExceededError("no."), 1),
        (RuntimeError("something\nunforeseen"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_failures_while_answering_are_one_line_on_stderr(document, pipeline, capsys, error, code, more):
    def fail(call):
        raise error

    pipeline.script = fail
    assert ask(document, *more) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 or isinstance(error, KeyboardInterrupt)
    assert "Traceback" not in err
    assert " ".join(str(error).split()) in err


def test_eval_prints_a_table_and_writes_the_file(pipeline, tmp_path, capsys):
    pipeline.script = lambda call: "wrong"
    file = tmp_path / "results.json"
    arguments = ["eval", "--methods", "lc, rapid", "--contexts", "512,1k", "--questions", "3"]
    arguments += ["--retrieval", "gold", "--seed", "4", "--transfer-strength", "5", "--json", str(file)]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    data = json.loads(file.read_text(encoding="utf-8"))
    rows = [(row["method"], row["context"], row["accuracy"], row["questions"]) for row in data["results"]]
    assert rows == [("lc", 512, 0, 3), ("rapid", 512, 0, 3), ("lc", 1024, 0, 3), ("rapid", 1024, 0, 3)]
    required = {"acceptance_rate", "tokens_per_round", "decode_tokens_per_s"}
    assert all(required <= row.keys() for row in data["results"])
    settings = data["settings"]
    assert (settings["retrieval"], settings["seed"], settings["contexts"]) == ("gold", 4, [512, 1024])
    assert "long context" in out
    assert "RAPID" in out
    assert "512" in out
    assert "gold retrieval" in out
    assert "\x1b" not in out + err
    assert pipeline.loaded == [(None, None, None, None, {"transfer_strength": 5.0, "max_new_tokens": 128})]


def test_eval_matches_acceptance_first(pipeline, tmp_path, capsys):
    pipeline.script = lambda call: "wrong"
    file = tmp_path / "results.json"
    arguments = ["eval", "--methods", "rapid,mixture", "--contexts", "512", "--questions", "2"]
    assert cli.main([*arguments, "--match-acceptance", "rapid", "--json", str(file)]) == 0
    matched = json.loads(file.read_text(encoding="utf-8"))["settings"]["matched"]
    assert matched == {"mixture": {"mixture_weight": 1.0, "acceptance": 0.9, "wanted": 0.9}}
    line = "static mixture: mixture_weight=1 accepts 90.0 % on the calibration questions, where 90.0 % was"
    assert line in " ".join(capsys.readouterr().out.split())
    weights = [c.options.speculation.mixture_weight for c in pipeline.calls[-4:]]
    assert sorted(weights) == [0.6, 0.6, 1.0, 1.0]


def test_eval_measures_settings_side_by_side(pipeline, tmp_path, capsys):
    pipeline.script = lambda call: "wrong"
    file = tmp_path / "results.json"
    arguments = ["eval", "--methods", "lc,rapid", "--contexts", "512", "--questions", "3"]
    arguments += ["--retrieval", "gold,missing", "--sweep", "transfer_strength=1,5", "--json", str(file)]
    assert cli.main(arguments) == 0
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    titles = [line for line in lines if "transfer_strength" in line]
    assert titles == [
        f"{quality} retrieval, transfer_strength={strength}"
        for quality in ("gold", "missing")
        for strength in (1, 5)
    ]
    assert out.count("long context") == out.count("RAPID") == 4
    assert "gold, missing retrieval, cpu" in lines[-1]
    data = json.loads(file.read_text(encoding="utf-8"))
    assert len(data["results"]) == 8
    assert len(data["answers"]) == 3 * (1 + 4)
    strengths = [c.options.speculation.transfer_strength for c in pipeline.calls if not c.plain][1:]
    assert (strengths.count(1), strengths.count(5)) == (6, 6)


def test_eval_keeps_its_answers_in_a_folder(pipeline, tmp_path, capsys):
    pipeline.script = lambda call: "wrong"
    arguments = ["eval", "--methods", "lc,rapid", "--contexts", "512", "--questions", "3"]
    folder, file = tmp_path / "new" / "report", tmp_path / "results.json"
    assert cli.main([*arguments, "--report", str(folder), "--json", str(file)]) == 0
    assert (folder / "results.json").read_bytes() == file.read_bytes()
    assert len((folder / "answers.jsonl").read_bytes().splitlines()) == 1 + 6
    assert f"open {folder / 'report.html'} in a browser" in capsys.readouterr().err.replace("\n", "")
    assert "Evaluation of scripted" in (folder / "report.html").read_text(encoding="utf-8")
    calls = len(pipeline.calls)
    assert cli.main([*arguments, "--report", str(folder)]) == 0
    assert len(pipeline.calls) == calls
    assert "RAPID" in capsys.readouterr().out
    assert cli.main([*arguments, "--report", str(folder), "--seed", "1", "--transfer-strength", "2"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert (
        "options.transfer_strength was 10.0 and is 2.0; tasks.seed was 0 and is 1. Use the same settings"
        in err
    )


def test_an_interrupted_eval_says_how_to_continue(pipeline, tmp_path, capsys):
    def interrupted(call):
        if len(pipeline.calls) == 5:
            raise KeyboardInterrupt
        return "wrong"

    pipeline.script = interrupted
    arguments = ["eval", "--methods", "lc,rapid", "--contexts", "512", "--questions", "3"]
    assert cli.main([*arguments, "--report", str(tmp_path)]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert f"the answers so far are in {tmp_path}: repeat the command to continue\n" in err
    assert len((tmp_path / "answers.jsonl").read_bytes().splitlines()) == 1 + 2
    assert cli.main([*arguments, "--report", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["answers"]) == 6


def test_eval_asks_own_questions(pipeline, tmp_path, capsys):
    document = "The sea is wide. The mill is old. " * 20
    rows = [
        {"document": document, "question": "What is wide?", "answer": "the sea", "kind": "sea"},
        {"document": document, "question": "What is old?", "answers": ["x", "the old mill"], "id": "b"},
    ]
    data, file = tmp_path / "mine.jsonl", tmp_path / "results.json"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pipeline.script = lambda call: "mill" if "old" in call.prompt.query else "The sea."
    arguments = ["eval", "--data", str(data), "--metric", "f1", "--methods", "lc,rapid", "--target", "a/b"]
    assert cli.main([*arguments, "--json", str(file)]) == 0
    out, _ = capsys.readouterr()
    results = json.loads(file.read_text(encoding="utf-8"))
    assert [row["accuracy"] for row in results["results"]] == [pytest.approx((1 + 2 / 3) / 2)] * 2
    assert [(a["question_id"], a["score"], a["correct"]) for a in results["answers"][::2]] == [
        ("", 1, True),
        ("b", pytest.approx(2 / 3), False),
    ]
    settings = results["settings"]
    assert (settings["task"], settings["metric"], settings["data"]) == ("own", "f1", str(data))
    assert [line.split() for line in out.splitlines() if line.split()[:1] == ["sea"]] == [
        ["sea", "1", "100.0", "100.0"]
    ]
    assert pipeline.calls[-1].prompt.text.endswith("answer the question.\nQuestion: What is old?\nAnswer:")
    assert cli.main([*arguments, "--prompt-template", "{context} So: {question}", "--questions", "1"]) == 0
    assert pipeline.calls[-1].prompt.text == f"{document} So: What is wide?"


def test_eval_asks_rulers_tasks(pipeline, tmp_path, capsys):
    file = tmp_path / "results.json"
    arguments = ["eval", "--task", "ruler", "--subsets", "single,multi-query", "--contexts", "1k"]
    arguments += ["--questions", "2", "--methods", "lc", "--max-new-tokens", "50", "--seed", "3"]
    assert cli.main([*arguments, "--json", str(file)]) == 0
    results = json.loads(file.read_text(encoding="utf-8"))
    assert [row["questions"] for row in results["results"]] == [4]
    assert {answer["kind"] for answer in results["answers"]} == {"single", "multi-query"}
    assert results["settings"]["subsets"] == ["single", "multi-query"]
    assert pipeline.calls[-1].options.sampling.max_new_tokens == 50
    assert "multi-query" in capsys.readouterr().out


def test_context_lengths_have_suffixes():
    assert parse_contexts("1k,4K, 600") == [1024, 4096, 600]


@pytest.mark.parametrize(
    ("target", "drafter", "dtype", "message"),
    [
        (None, "some/model", None, "without --target the demo pair answers"),
        (None, None, "float16", "without --target the demo pair answers"),
        ("/no/such/folder", None, None, "cannot be loaded: there is no folder '/no/such/folder'"),
        ("no/such-model", None, None, "'no/such-model' cannot be loaded: "),
    ],
)  # fmt: skip
def test_models_that_cannot_be_loaded_are_named(document, capsys, target, drafter, dtype, message):
    options = []
    for name, value in (("--target", target), ("--drafter", drafter), ("--dtype", dtype)):
        options += [] if value is None else [name, value]
    assert ask(document, *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_help_and_version_load_nothing_heavy():
    program = (
        "import sys; from rapid_integrations.cli.app import main\n"
        "codes = [main(['--help']), main(['--version'])]\n"
        "heavy = {'torch', 'transformers', 'numpy', 'bm25s', 'faiss', 'langchain_core', 'llama_index'}\n"
        "assert codes == [0, 0], codes; assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("demo", "ask", "eval", "rapid 0.1.0"):
        assert word in done.stdout
