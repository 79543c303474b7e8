"""Keys and values in fewer bits than the model computes in: less memory, and another model's answers."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, run, tiny_model

from rapid_integrations import ChatRapid, RapidLLM, RapidPipeline
from rapid_integrations.config import EngineLimits, SamplingParams, SpeculationParams
from rapid_integrations.demo import generate_documents
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.requests import Request
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.loading import ModelSpec

TEXT = list(range(3, 60))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kv_dtype", ["bfloat16", torch.float16])
def test_a_model_of_every_architecture_computes_nearly_the_same(architecture: str, kv_dtype) -> None:
    exact, rounded = (CausalModel(tiny_model(architecture), kv_dtype=each) for each in (None, kv_dtype))
    assert rounded.lean == exact.lean
    caches = SequenceKV(64), SequenceKV(64)
    p, q = (
        model.forward([Step(cache, TEXT, 20)]) for model, cache in zip((exact, rounded), caches, strict=True)
    )
    assert p.dtype == q.dtype == torch.float32
    assert {held.dtype for _, *both in caches[1].layers() for held in both} == {rounded.kv_dtype}
    assert 2 * caches[1].num_bytes == caches[0].num_bytes
    assert not torch.equal(p, q)
    assert (p - q).abs().mean() < 8 * torch.finfo(rounded.kv_dtype).eps * p.std()


def test_the_models_own_dtype_changes_nothing() -> None:
    assert CausalModel(tiny_model("llama")).kv_dtype is None
    assert CausalModel(tiny_model("llama"), kv_dtype="float32").kv_dtype is None
    assert CausalModel(tiny_model("llama").to(torch.bfloat16), kv_dtype="bfloat16").kv_dtype is None
    assert CausalModel(tiny_model("llama").to(torch.bfloat16), kv_dtype="float32").kv_dtype == torch.float32


@pytest.mark.parametrize("given", ["int8", "torch.int32", torch.float64, torch.bool, "", "None"])
def test_other_formats_are_refused(given) -> None:
    message = r"kv_dtype=.* is not allowed: kv_dtype must be one of float32, bfloat16, float16"
    nowhere = "no/such-model"
    for make in (
        lambda: CausalModel(tiny_model("llama"), kv_dtype=given),
        lambda: CausalModel.load(nowhere, kv_dtype=given, local_files_only=True),
        lambda: RapidPipeline.from_pretrained(nowhere, kv_dtype=given),
        lambda: RapidLLM(nowhere, kv_dtype=given),
        lambda: RapidLLM(nowhere).model_copy(update={"kv_dtype": given}),
    ):
        with pytest.raises(ConfigurationError, match=message):
            make()


def test_bytes_kept_for_later_are_those_of_the_narrow_format() -> None:
    request = Request(TEXT, TEXT, SamplingParams(max_new_tokens=4, ignore_eos=True), SpeculationParams())
    kept = []
    for kv_dtype in (None, "bfloat16"):
        engine = Engine(CausalModel(tiny_model("llama"), kv_dtype=kv_dtype), None)
        run(engine, request)
        kept.append(engine.prefix_cache.num_bytes)
        engine.close()
    assert kept[0] == 2 * kept[1] > 0


def test_a_folder_is_not_shared_by_two_formats(tmp_path: Path) -> None:
    prompt = [3 + i * i % 250 for i in range(1400)]

    def answer(kv_dtype: str | None) -> tuple[list[int], int]:
        engine = Engine(
            CausalModel(tiny_model("llama"), kv_dtype=kv_dtype),
            None,
            limits=EngineLimits(prefix_cache_dir=tmp_path),
        )
        sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
        tokens, stats = run(engine, Request(prompt, prompt, sampling, SpeculationParams()))
        engine.close()
        return tokens, stats.reused_prefix_tokens

    assert answer("bfloat16")[1] == 0
    assert answer(None)[1] == 0
    assert answer("float16")[1] == 0
    assert answer("bfloat16")[1] == answer(None)[1] == len(prompt) - 1
    assert answer("bfloat16") == answer("bfloat16")


def test_specifications_that_differ_in_it_are_of_two_models() -> None:
    model = tiny_model("llama")
    for source in ("some/model", model):
        keys = {ModelSpec(source, kv_dtype=each).key for each in (None, "bfloat16", "float16")}
        assert len(keys) == 3
    assert ModelSpec(model, kv_dtype="bfloat16").load().kv_dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [RapidLLM, ChatRapid])
def test_a_face_says_so_in_its_configuration(kind) -> None:
    config = kind.from_pretrained("some/model", kv_dtype=torch.bfloat16).to_config()
    assert config["kv_dtype"] == "bfloat16"
    assert kind(**config).to_config() == config
    copy = kind.from_pretrained("some/model").model_copy(update={"kv_dtype": torch.bfloat16})
    assert copy.to_config() == config
    assert "kv_dtype" not in kind.from_pretrained("some/model").to_config()


# The bundled pair ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["small drafter", "self"])
def pipeline(request) -> Iterator[RapidPipeline]:
    pipeline = RapidPipeline.demo(self_speculation=request.param, kv_dtype="bfloat16")
    yield pipeline
    pipeline.close()


def test_speculation_changes_no_answer_that_is_no_near_tie(pipeline: RapidPipeline) -> None:
    engine = pipeline.engine
    assert engine.target.kv_dtype == engine.drafter.kv_dtype == torch.bfloat16
    (document,) = generate_documents(num_tokens=1024, num_documents=1, questions_per_document=8, seed=2)
    prompts = [f"Context: {document.text} Question: {q.question} Answer:" for q in document.questions]
    answers = {}
    for num_draft_tokens in (0, 6):
        options = pipeline.options.override(acceptance="lossless", num_draft_tokens=num_draft_tokens)
        answers[num_draft_tokens] = [c.text for c in pipeline.generate(prompts, options=options)]
        alone = [pipeline.generate([prompt], options=options)[0].text for prompt in prompts]
        assert alone == answers[num_draft_tokens]
    assert answers[0] == answers[6]
    right = sum(
        text == question.answer for text, question in zip(answers[0], document.questions, strict=True)
    )
    assert right >= math.ceil(0.75 * len(prompts))
