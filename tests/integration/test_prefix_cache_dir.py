"""Prefixes on disk that a later engine or process reuses, with real models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.stored_prompts import request
from helpers.tiny_models import run, tiny_model
from safetensors.torch import load

from rapid_integrations import RapidLLM, demo
from rapid_integrations.cli import app as cli
from rapid_integrations.config import EngineLimits
from rapid_integrations.demo import sample_documents
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.causal_model import CausalModel

HANDBOOK_FILE = Path(demo.__file__).parent / "samples" / "handbook.md"


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_the_next_engine_starts_from_the_stored_prefix(tmp_path, architecture) -> None:
    def models() -> tuple[CausalModel, CausalModel]:
        small = tiny_model(architecture, seed=1, hidden_size=32)
        return CausalModel(tiny_model(architecture)), CausalModel(small)

    def answer(question: int, **limits: object) -> tuple[list[int], int, int]:
        engine = Engine(*models(), limits=EngineLimits(**limits))  # type: ignore[arg-type]
        tokens, stats = run(engine, request(question))
        engine.close()
        return tokens, stats.reused_prefix_tokens, stats.reused_drafter_prefix_tokens

    fresh = answer(2)
    assert fresh[1:] == (0, 0)
    assert answer(1, prefix_cache_dir=tmp_path)[1:] == (0, 0)
    assert len(list(tmp_path.iterdir())) == 2
    assert answer(2, prefix_cache_dir=str(tmp_path)) == (fresh[0], 1400, 1100)
    assert len(list(tmp_path.iterdir())) == 2, "stored prefixes are not written again"
    # It works without a cache in memory.
    assert answer(2, prefix_cache_dir=tmp_path, prefix_cache_bytes=0) == (fresh[0], 1400, 1100)


def test_a_damaged_file_is_computed_again_and_gives_the_same_answer(tmp_path, caplog) -> None:
    def answer() -> tuple[list[int], int]:
        engine = Engine(
            CausalModel(tiny_model("llama")), None, limits=EngineLimits(prefix_cache_dir=tmp_path)
        )
        tokens, stats = run(engine, request(1))
        engine.close()
        return tokens, stats.reused_prefix_tokens

    first = answer()
    (path,) = tmp_path.iterdir()
    good = load(path.read_bytes())
    path.write_bytes(path.read_bytes()[:-1000] + bytes(1000))
    assert answer() == first == (first[0], 0)
    assert "its checksum is wrong" in caplog.text
    anew = load(path.read_bytes())
    assert all(torch.equal(anew[name], tensor) for name, tensor in good.items())
    assert anew.keys() == good.keys()
    assert answer() == (first[0], 1411)


@pytest.mark.slow
def test_a_second_process_reuses_the_document_of_the_first(tmp_path, capsys) -> None:
    questions = [q for q in sample_documents()[0].questions if q.kind == "single"][:2]
    arguments = ["ask", "--document", str(HANDBOOK_FILE), "--json", "--prefix-cache-dir", str(tmp_path)]
    assert cli.main([*arguments, "--question", questions[0].question]) == 0
    first = json.loads(capsys.readouterr().out)
    done = subprocess.run(
        [sys.executable, "-m", "rapid_integrations.cli", *arguments, "--question", questions[1].question],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    second = json.loads(done.stdout)
    assert first["stats"]["reused_prefix_tokens"] == 0
    assert second["stats"]["reused_prefix_tokens"] > 0.95 * second["stats"]["prompt_tokens"]
    assert [first["answer"], second["answer"]] == [question.answer for question in questions]


def test_an_llm_accepts_and_serialises_the_folder_in_its_limits(tmp_path) -> None:
    llm = RapidLLM("x/y", limits={"prefix_cache_dir": tmp_path})
    config = llm.to_config()
    assert json.loads(json.dumps(config))["limits"]["prefix_cache_dir"] == str(tmp_path)
    assert RapidLLM(**config).limits == llm.limits
