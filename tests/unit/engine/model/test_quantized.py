"""Linear layers in 8-bit integers, and models made of them, as drafters above all."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, tiny_model
from torch import nn

from rapid_integrations import ConfigurationError, RapidLLM, RapidPipeline
from rapid_integrations.demo import generate_documents
from rapid_integrations.engine.cache.fingerprint import fingerprint
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.model.quantized import Int8Linear, quantize_linears


def linear_and_rows(*, bias: bool, rows: int = 6) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(96, 40, bias=bias), torch.randn(2, rows, 96)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_maps_as_the_one_it_replaces_but_for_rounding(bias: bool, dtype: torch.dtype) -> None:
    linear, rows = linear_and_rows(bias=bias)
    found = Int8Linear(linear)(rows.to(dtype))
    expected = linear(rows)
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    # Two roundings to 1/127 of about three standard deviations.
    assert (found - expected).std() / expected.std() < 0.02
    assert not torch.equal(found.float(), expected)


@torch.inference_mode()
def test_the_result_of_a_row_does_not_depend_on_other_rows() -> None:
    linear, rows = linear_and_rows(bias=True)
    layer = Int8Linear(linear)
    together = layer(torch.cat([rows, 100 * rows]))
    for index, row in enumerate(rows.reshape(-1, 96)):
        assert torch.equal(layer(row[None])[0], together.reshape(-1, 40)[index])


@torch.inference_mode()
def test_zeros_and_nothing_are_mapped_too() -> None:
    linear, rows = linear_and_rows(bias=True)
    layer = Int8Linear(linear)
    assert torch.equal(layer(torch.zeros(1, 96))[0], linear.bias)
    assert layer(rows[:, :0]).shape == (2, 0, 40)


def test_every_linear_layer_is_replaced_and_the_embeddings_are_not() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    embeddings = model.get_input_embeddings().weight
    before = fingerprint(model)
    quantize_linears(model)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert isinstance(model.lm_head, Int8Linear)
    assert model.get_input_embeddings().weight is embeddings
    assert fingerprint(model) != before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_of_every_architecture_load_in_int8(architecture: str, tmp_path: Path) -> None:
    tiny_model(architecture).save_pretrained(tmp_path)
    exact = CausalModel.load(tmp_path)
    rounded = CausalModel.load(tmp_path, quantization_config="int8")
    assert rounded.lean == exact.lean
    text = list(range(3, 40))
    p, q = (m.forward([Step(SequenceKV(64), text, 12)]).softmax(-1) for m in (exact, rounded))
    assert not torch.equal(p, q)
    assert torch.minimum(p, q).sum(-1).mean() > 0.8


def test_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match="quantization_config='int3' is not allowed: it must be 'int8'"
    ):
        CausalModel.load(tmp_path, quantization_config="int3")


def test_other_devices_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="is for CPUs, but the model is on meta"):
        quantize_linears(tiny_model("llama").to("meta"))


@pytest.fixture(scope="module")
def pipeline() -> Iterator[RapidPipeline]:
    pipeline = RapidPipeline.demo(self_speculation=True, drafter_quantization_config="int8")
    yield pipeline
    pipeline.close()


def test_the_target_rounded_drafts_for_itself_and_changes_nothing(pipeline: RapidPipeline) -> None:
    (document,) = generate_documents(num_tokens=1024, num_documents=1, questions_per_document=8, seed=2)
    prompts = [f"Context: {document.text} Question: {q.question} Answer:" for q in document.questions]
    engine = pipeline.engine
    assert engine.drafter is not engine.target
    plain, drafted = (
        pipeline.generate(prompts, options=pipeline.options.override(acceptance="lossless", **options))
        for options in ({"num_draft_tokens": 0}, {"num_draft_tokens": 6, "retrieval_min_tokens": 2048})
    )
    assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
    accepted = sum(c.stats.accepted_tokens for c in drafted)
    assert accepted > 0.9 * sum(c.stats.drafted_tokens for c in drafted) > 0


def test_an_llm_says_so_in_its_configuration() -> None:
    llm = RapidLLM.from_pretrained("some/model", drafter_quantization_config="int8")
    config = llm.to_config()
    assert config["drafter_quantization_config"] == "int8"
    assert RapidLLM(**config).to_config() == config
