"""GGUF files through every way of loading a model: classes, options, the command line and the benchmark."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gguf_files import gguf_model, write_gguf
from helpers.small_tokenizers import tokenizer_named
from transformers import PreTrainedModel

from rapid_integrations import ChatRapid, RapidLLM, RapidPipeline
from rapid_integrations.benchmark.models import ModelChoice
from rapid_integrations.cli import app as cli
from rapid_integrations.config import GenerationOptions
from rapid_integrations.engine.model import causal_model
from rapid_integrations.errors import ConfigurationError

OPTIONS = GenerationOptions().override(max_new_tokens=8, num_draft_tokens=2, acceptance="lossless")
PROMPT = "what is the answer, the document says so"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "target.gguf")
    write_gguf(folder / "drafter.gguf", gguf_model(seed=1))
    return folder


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources of the models that are loaded."""
    sources: list[str] = []

    def load(source: Any, **arguments: Any) -> PreTrainedModel:
        sources.append(str(source))
        return load_model(source, **arguments)

    load_model = causal_model.load_model
    monkeypatch.setattr(causal_model, "load_model", load)
    return sources


def answer(pipeline: RapidPipeline) -> tuple[int, ...]:
    (completion,) = pipeline.generate([PROMPT])
    pipeline.close()
    return tuple(completion.token_ids)


def test_a_file_answers_as_the_loaded_model_and_is_loaded_once(folder: Path, loaded: list[str]) -> None:
    path = str(folder / "target.gguf")
    expected = answer(
        RapidPipeline.from_pretrained(gguf_model(), tokenizer=tokenizer_named("chatml"), options=OPTIONS)
    )
    first = RapidPipeline.from_pretrained(path, options=OPTIONS)
    second = RapidPipeline.from_pretrained(folder, gguf_file="target.gguf", options=OPTIONS)
    same = RapidPipeline.from_pretrained(Path(path), folder, drafter_gguf_file="target.gguf", options=OPTIONS)
    assert first.engine is second.engine is same.engine
    assert first.engine.drafter is first.engine.target
    assert loaded == [path]
    assert first.name == path
    assert first.context_window == 2048
    second.close()
    same.close()
    assert answer(first) == expected
    assert len(expected) == 8


def test_the_drafter_may_be_another_file(folder: Path, loaded: list[str]) -> None:
    target, drafter = (str(folder / f"{name}.gguf") for name in ("target", "drafter"))
    other = gguf_model(seed=1).get_input_embeddings().weight
    for arguments in (
        {"target": target, "drafter": drafter},
        {"target": folder, "gguf_file": "target.gguf", "drafter_gguf_file": "drafter.gguf"},
    ):
        pipeline = RapidPipeline.from_pretrained(**arguments, options=OPTIONS)
        assert pipeline.engine.drafter is not None
        weight = pipeline.engine.drafter.model.get_input_embeddings().weight
        assert torch.equal(weight, other)
        pipeline.close()
        assert loaded == [target, drafter]
        loaded.clear()
    pipeline = RapidPipeline.from_pretrained(target, drafter_dtype="bfloat16")
    assert pipeline.engine.drafter is not None
    assert pipeline.engine.drafter.model.dtype == torch.bfloat16
    assert pipeline.engine.target.model.dtype == torch.float32
    assert loaded == [target, target]
    pipeline.close()


@pytest.mark.parametrize("kind", [RapidLLM, ChatRapid])
def test_the_frameworks_classes_take_a_file(kind: type[RapidLLM | ChatRapid], folder: Path) -> None:
    options = {"max_new_tokens": 8, "acceptance": "lossless"}
    llm = kind.from_pretrained(folder / "target.gguf", **options)
    named = kind.from_pretrained(folder, gguf_file="target.gguf", **options)
    texts = [str(getattr(each.invoke(PROMPT), "content", each.invoke(PROMPT))) for each in (llm, named)]
    assert texts[0]
    assert texts[0] == texts[1]
    assert named.to_config()["gguf_file"] == "target.gguf"
    with pytest.raises(ConfigurationError, match="no GGUF file"):
        kind.from_pretrained(folder / "missing.gguf").invoke(PROMPT)


def test_a_later_process_reuses_the_prefixes_of_the_same_file_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "document.txt"
    document.write_text("the answer is in the document of the harbour town. " * 110)
    arguments = ["ask", "--document", str(document), "--question", "what?", "--json", "--target", str(folder)]
    arguments += ["--max-new-tokens", "4", "--prefix-cache-dir", str(tmp_path / "prefixes"), "--gguf-file"]

    def reused(output: str) -> int:
        return int(json.loads(output)["stats"]["reused_prefix_tokens"])

    assert cli.main([*arguments, "target.gguf"]) == 0
    assert reused(capsys.readouterr().out) == 0
    done = subprocess.run(
        [sys.executable, "-m", "rapid_integrations.cli", *arguments, "target.gguf"],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert reused(done.stdout) > 1000
    assert cli.main([*arguments, "drafter.gguf"]) == 0
    assert reused(capsys.readouterr().out) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gguf-file", "x.gguf"], "give --target too"),
        (["--target", "a/x.gguf", "--gguf-file", "x.gguf"], "'a/x.gguf' is a GGUF file itself"),
        (["--target", "no/such.gguf"], "there is no GGUF file 'no/such.gguf'"),
    ],
)
def test_the_command_line_refuses_with_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "document.txt").write_text("The answer is 12.")
    assert cli.main(["ask", "--document", str(tmp_path / "document.txt"), "--question", "x", *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_the_benchmark_loads_files_for_transformers_and_for_the_engine(folder: Path) -> None:
    models = ModelChoice(str(folder), str(folder), gguf_file="target.gguf", drafter_gguf_file="drafter.gguf")
    assert models.load_tokenizer().get_vocab() == tokenizer_named("chatml").get_vocab()
    target, drafter = models.load_bare()
    assert drafter is not None
    for model, seed in ((target, 0), (drafter, 1)):
        assert torch.equal(
            model.get_input_embeddings().weight, gguf_model(seed).get_input_embeddings().weight
        )
    for self_drafting in (True, False):
        pipeline = models.load_pipeline(self_drafting=self_drafting)
        assert (pipeline.engine.drafter is pipeline.engine.target) == self_drafting
        pipeline.close()
    with pytest.raises(ConfigurationError, match="give --target too"):
        ModelChoice(gguf_file="target.gguf")
