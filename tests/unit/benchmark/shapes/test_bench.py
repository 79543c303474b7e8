"""The measurements on models with random weights."""

import pytest
from helpers.tiny_models import tiny_model

from rapid_integrations.benchmark.shapes.bench import ShapeBench
from rapid_integrations.benchmark.shapes.plan import ShapePlan
from rapid_integrations.benchmark.shapes.report import shape_tables
from rapid_integrations.errors import VocabularyMismatchError

METHODS = (("ours, plain", None), ("ours, η = 0", 0.5), ("ours, η = 0", 1.0))


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
def test_every_method_is_measured_on_every_batch(tmp_path, drafter):
    target = folder(tmp_path / "target")
    if drafter == "small":
        drafter = folder(tmp_path / "small", num_hidden_layers=1)
    labels = []
    with ShapeBench(plan(target, drafter=drafter)) as bench:
        report = bench.measure(labels.append)
        assert len(labels) == bench.num_runs
    cells = {(cell.method, cell.batch, cell.acceptance): cell for cell in report.cells}
    assert set(cells) == {
        ("generate()", 1, None),
        *((method, batch, acceptance) for batch in (1, 3) for method, acceptance in METHODS),
    }
    for (method, batch, acceptance), cell in cells.items():
        assert len(cell.runs) == 2
        assert cell.stats.completion_tokens == 2 * batch * 12
        assert (cell.stats.drafted_tokens > 0) <= (acceptance is not None)
        assert (report.bound(cell) is not None) <= (batch == 1 and acceptance is not None)
        assert (report.bandwidth_share(cell) is not None) == (method == "ours, plain")
        if method != "generate()":  # only decoding is measured: the prompts are cached
            tokens_read = cell.stats.prompt_tokens - cell.stats.reused_prefix_tokens
            assert tokens_read <= 2 * batch
    # A pass reads the output layer but not the embeddings, and 3 layers of keys and values with 2 heads of
    # 16.
    weights = sum(p.nbytes for p in tiny_model("llama").parameters()) - 256 * 64 * 4
    assert report.step_bytes == weights + 96 * 3 * 2 * 2 * 16 * 4
    assert report.prefill_tokens_per_s.keys() == {"target", "drafter"}
    assert [table.row_count for table in shape_tables(report)] == [2, 7]


def test_a_pass_over_windowed_layers_reads_the_window(tmp_path):
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


def test_the_drafter_s_passes_can_be_replayed(tmp_path, replayed):
    settings = {
        "batches": (1, 3), "acceptances": (0.8,), "repeats": 1,
        "cuda_graph_tokens": 1024, "num_draft_tokens": 3,
    }  # fmt: skip
    with ShapeBench(plan(folder(tmp_path), **settings)) as bench:
        report = bench.measure(lambda _: None)
    cell = next(cell for cell in report.cells if cell.acceptance and cell.batch == 3)
    assert set(replayed) >= {1, 3}
    # The script replaces the logits after the replay of a graph.
    assert 0.4 < cell.stats.accepted_tokens / cell.stats.drafted_tokens < 1


def test_models_of_other_vocabularies_are_refused(tmp_path):
    with pytest.raises(VocabularyMismatchError, match="share one vocabulary"):
        ShapeBench(plan(folder(tmp_path / "a"), drafter=folder(tmp_path / "b", vocab_size=2048)))
