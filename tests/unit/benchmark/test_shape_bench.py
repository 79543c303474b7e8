"""Models with random weights that answer by a script, and what is measured on them."""

import json

import pytest
import torch
from helpers.tiny_models import VOCAB, run, tiny_model

from rapid_integrations.benchmark.bound import conditional_acceptance
from rapid_integrations.benchmark.dummy_models import (
    Script,
    ScriptedModel,
    dummy_model,
    load_shape,
    random_prompt,
    random_script,
)
from rapid_integrations.benchmark.shape_bench import ShapeBench, ShapePlan, shape_tables
from rapid_integrations.cli import app as cli
from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.requests import Request
from rapid_integrations.errors import ConfigurationError, VocabularyMismatchError

WAYS = (("ours, plain", None), ("ours, η = 0", 0.5), ("ours, η = 0", 1.0))


def scripted(chance: float, *, prompt_tokens: int, seed: int = 0) -> ScriptedModel:
    model = ScriptedModel(tiny_model("llama", seed), name="tiny")
    model.script = Script(random_script(VOCAB, 40, 0), prompt_tokens, chance)
    return model


def answer(target, drafter, num_draft_tokens):
    request = Request(
        random_prompt(VOCAB, 50, "a"),
        random_prompt(VOCAB, 20, "b"),
        SamplingParams(max_new_tokens=600, ignore_eos=True),
        SpeculationParams(acceptance="lossless", num_draft_tokens=num_draft_tokens),
    )
    engine = Engine(target, drafter)
    try:
        return run(engine, request)
    finally:
        engine.close()


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("num_draft_tokens", [3, 6])
def test_the_answer_is_the_script_and_acceptance_is_what_was_set(chance, num_draft_tokens):
    target = scripted(1.0, prompt_tokens=50)
    tokens, stats = answer(target, scripted(chance, prompt_tokens=20, seed=1), num_draft_tokens)
    script = random_script(VOCAB, 40, 0)
    assert tokens == script * 15
    alpha = conditional_acceptance(stats.accepted_tokens / stats.rounds, stats.drafted_tokens / stats.rounds)
    # Each of some hundred draws has this chance; the last draft may be cut short.
    assert alpha == pytest.approx(chance, abs=0.08)
    assert stats.drafter_passes > 0


def test_one_model_may_play_both_parts():
    model = tiny_model("llama")
    target, drafter = (ScriptedModel(model, name="tiny") for _ in range(2))
    script = random_script(VOCAB, 40, 0)
    target.script, drafter.script = Script(script, 50), Script(script, 20, 0.5)
    tokens, stats = answer(target, drafter, 4)
    assert tokens == script * 15
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


def test_without_a_script_a_model_is_itself():
    model = tiny_model("llama")
    logits = [
        made.forward([Step(SequenceKV(16), [5, 6, 7], 2)])
        for made in (ScriptedModel(model, name="tiny"), CausalModel(model))
    ]
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama-3.1-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400)]
)
def test_named_shapes_have_the_published_number_of_parameters(name, parameters):
    model = dummy_model(load_shape(name), dtype=torch.bfloat16, device=torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.config.max_position_embeddings == 131_072


def folder(path, **overrides):
    tiny_model("llama", **overrides).config.save_pretrained(path)
    return str(path)


def plan(target, **more):
    settings = {
        "drafter": "self", "context": 96, "drafter_context": 32, "batches": (1, 3), "acceptances": (0.5, 1.0),
        "num_new_tokens": 12, "repeats": 2,
    }  # fmt: skip
    return ShapePlan(target=target, **{**settings, **more})


@pytest.mark.parametrize("drafter", ["self", "small"])
def test_every_way_is_measured_on_every_batch(tmp_path, drafter):
    target = folder(tmp_path / "target")
    if drafter == "small":
        drafter = folder(tmp_path / "small", num_hidden_layers=1)
    told = []
    with ShapeBench(plan(target, drafter=drafter)) as bench:
        report = bench.measure(told.append)
        assert len(told) == bench.num_runs
    cells = {(cell.method, cell.batch, cell.acceptance): cell for cell in report.cells}
    assert set(cells) == {
        ("generate()", 1, None),
        *((method, batch, chance) for batch in (1, 3) for method, chance in WAYS),
    }
    for (method, batch, chance), cell in cells.items():
        assert len(cell.runs) == 2
        assert cell.stats.completion_tokens == 2 * batch * 12
        assert (cell.stats.drafted_tokens > 0) <= (chance is not None)
        assert (report.bound(cell) is not None) <= (batch == 1 and chance is not None)
        assert (report.bandwidth_share(cell) is not None) == (method == "ours, plain")
        if method != "generate()":  # what is measured is decoding: the prompts have been read
            read = cell.stats.prompt_tokens - cell.stats.reused_prefix_tokens
            assert read <= 2 * batch
    # Embeddings are not read, and the output layer is: 3 layers, keys and values of 2 heads of 16.
    weights = sum(p.nbytes for p in tiny_model("llama").parameters()) - 256 * 64 * 4
    assert report.step_bytes == weights + 96 * 3 * 2 * 2 * 16 * 4
    assert report.prefill_tokens_per_s.keys() == {"target", "drafter"}
    assert [table.row_count for table in shape_tables(report)] == [2, 7]


def test_of_windowed_layers_a_pass_reads_the_window(tmp_path):
    model = tiny_model("mistral")
    model.config.save_pretrained(tmp_path)
    with ShapeBench(plan(str(tmp_path), batches=(1,), acceptances=(1.0,), repeats=1)) as bench:
        report = bench.measure(lambda _: None)
    weights = sum(p.nbytes for p in model.parameters()) - 256 * 64 * 4
    assert report.step_bytes == weights + 24 * 3 * 2 * 2 * 16 * 4


def test_keys_and_values_may_be_narrower_than_the_weights(tmp_path):
    with ShapeBench(plan(folder(tmp_path), batches=(1,), repeats=1, kv_dtype="bfloat16")) as bench:
        report = bench.measure(lambda _: None)
    weights = sum(p.nbytes for p in tiny_model("llama").parameters()) - 256 * 64 * 4
    assert report.step_bytes == weights + 96 * 3 * 2 * 2 * 16 * 2
    assert report.as_dict()["settings"]["kv_dtype"] == "bfloat16"


def test_the_drafter_s_passes_may_be_replayed(tmp_path, replayed):
    settings = {
        "batches": (1, 3), "acceptances": (0.8,), "repeats": 1,
        "cuda_graph_tokens": 1024, "num_draft_tokens": 3,
    }  # fmt: skip
    with ShapeBench(plan(folder(tmp_path), **settings)) as bench:
        report = bench.measure(lambda _: None)
    cell = next(cell for cell in report.cells if cell.acceptance and cell.batch == 3)
    assert set(replayed) >= {1, 3}
    # What is accepted is what the script says: it is asked behind the graphs.
    assert 0.4 < cell.stats.accepted_tokens / cell.stats.drafted_tokens < 1


def test_models_of_other_vocabularies_are_refused(tmp_path):
    with pytest.raises(VocabularyMismatchError, match="share one vocabulary"):
        ShapeBench(plan(folder(tmp_path / "a"), drafter=folder(tmp_path / "b", vocab_size=2048)))


def test_what_is_no_causal_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigurationError, match="'vit' is no causal language model"):
        dummy_model(load_shape(str(tmp_path)), dtype=torch.float32, device=torch.device("cpu"))


def test_the_command_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "shape.json"
    arguments = [
        "bench-shape", "--target", folder(tmp_path / "shape"), "--context", "96", "--drafter-context", "32",
        "--batches", "1,2", "--acceptances", "1", "--new-tokens", "8", "--repeats", "1", "--json", str(file),
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "prefill" in out
    assert "generate()" in out
    stored = json.loads(file.read_text(encoding="utf-8"))
    assert [(cell["method"], cell["batch"]) for cell in stored["cells"]] == [
        ("ours, plain", 1), ("ours, η = 0", 1), ("generate()", 1), ("ours, plain", 2), ("ours, η = 0", 2),
    ]  # fmt: skip
    assert stored["cells"][0]["bandwidth_share"] > 0
    assert stored["settings"]["context"] == 96
