"""Models load from folders, unsafe or unsuitable ones are refused, and pipelines share engines."""

import gc
import json
import os
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_tokenizers import tokenizer_named
from helpers.tiny_models import ARCHITECTURES, run, tiny_model
from transformers import PreTrainedModel

from rapid_integrations.config import EngineLimits, GenerationOptions, SamplingParams, SpeculationParams
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.requests import Request
from rapid_integrations.errors import (
    ConfigurationError,
    EngineClosedError,
    UnsupportedModelError,
    VocabularyMismatchError,
)
from rapid_integrations.loading import ENGINES, EngineRegistry, ModelSpec, check_same_vocabulary
from rapid_integrations.pipeline import RapidPipeline

TIMEOUT_S = 60.0
FAMILIES = dict(zip(ARCHITECTURES, ("llama3", "chatml", "chatml", "llama2", "gemma"), strict=True))
OPTIONS = GenerationOptions().override(max_new_tokens=6, num_draft_tokens=2, acceptance="lossless")
PROMPT = "what is the answer, the document says so"


def model_for(family: str, architecture: str = "llama", **overrides: Any) -> PreTrainedModel:
    return tiny_model(architecture, vocab_size=len(tokenizer_named(family)), **overrides)


def saved(folder: Path, family: str, architecture: str = "llama", **overrides: Any) -> Path:
    model_for(family, architecture, **overrides).save_pretrained(folder)
    tokenizer_named(family).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"), "chatml")


# Models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_answers_as_the_loaded_model_does(tmp_path, architecture) -> None:
    family = FAMILIES[architecture]
    folder = saved(tmp_path, family, architecture)
    assert [path.suffix for path in folder.glob("model*")] == [".safetensors"]
    answers = []
    for source, tokenizer in ((folder, None), (model_for(family, architecture), tokenizer_named(family))):
        pipeline = RapidPipeline.from_pretrained(source, tokenizer=tokenizer, options=OPTIONS)
        assert pipeline.context_window == 2048
        (completion,) = pipeline.generate([PROMPT])
        assert completion.stats.prompt_tokens > 10
        assert completion.stats.rounds > 0
        answers.append((completion.text, completion.token_ids, completion.finish_reason))
        pipeline.close()
    assert answers[0] == answers[1]


def test_a_model_is_named_by_its_folder(llama_folder) -> None:
    model = CausalModel.load(llama_folder)
    assert model.name == str(llama_folder)
    assert next(model.model.parameters()).dtype == torch.float32
    half = CausalModel.load(str(llama_folder), dtype="bfloat16")
    assert next(half.model.parameters()).dtype == torch.bfloat16


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_pickled_checkpoint_is_refused_and_never_opened(tmp_path) -> None:
    folder = saved(tmp_path / "model", "chatml")
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "opened"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil(marker)))
    with pytest.raises(OSError, match="safetensors"):
        CausalModel.load(folder)
    assert not marker.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert marker.exists(), "unpickling runs the code"


def test_code_in_a_model_s_folder_is_never_run(tmp_path) -> None:
    folder = saved(tmp_path / "model", "chatml")
    marker = tmp_path / "executed"
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "custom_thing",
        "auto_map": {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "trap.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        CausalModel.load(folder)
    with pytest.raises(ValueError, match="trust_remote_code"):
        RapidPipeline.from_pretrained(folder)
    assert not marker.exists()


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(OSError, match="no/such/folder"):
        CausalModel.load("no/such/folder")
    with pytest.raises(OSError, match="no/such/folder"):
        RapidPipeline.from_pretrained("no/such/folder", local_files_only=True)


# Vocabularies ----------------------------------------------------------------------------------------------


def test_equal_vocabularies_pass() -> None:
    check_same_vocabulary(tokenizer_named("chatml"), tokenizer_named("chatml"))


def test_different_vocabularies_raise_with_an_example() -> None:
    with pytest.raises(
        VocabularyMismatchError, match=r"[\d,]+ of [\d,]+ tokens differ, for example '.+': \d+ in"
    ):
        check_same_vocabulary(tokenizer_named("chatml"), tokenizer_named("gemma"))


def test_one_different_token_raises() -> None:
    ours, theirs = tokenizer_named("word_level"), _Renamed()
    with pytest.raises(
        VocabularyMismatchError, match="2 of 10 tokens differ, for example 'the': 5 in the target, 6"
    ):
        check_same_vocabulary(ours, theirs)  # type: ignore[arg-type]
    theirs.vocabulary = {token: i for token, i in ours.get_vocab().items() if token != "document"}
    with pytest.raises(VocabularyMismatchError, match="'document': 9 in the target, None in the drafter"):
        check_same_vocabulary(ours, theirs)  # type: ignore[arg-type]


class _Renamed:
    def __init__(self) -> None:
        self.vocabulary = dict(tokenizer_named("word_level").get_vocab())
        self.vocabulary["the"], self.vocabulary["answer"] = self.vocabulary["answer"], self.vocabulary["the"]

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def test_a_pipeline_refuses_a_drafter_of_another_family(tmp_path, llama_folder) -> None:
    other = saved(tmp_path, "gemma")
    with pytest.raises(VocabularyMismatchError, match="Choose a drafter of the target's family"):
        RapidPipeline.from_pretrained(llama_folder, other)


def test_loaded_models_with_different_vocabulary_sizes_are_refused() -> None:
    big = tiny_model("llama", vocab_size=3000)
    with pytest.raises(VocabularyMismatchError, match=r"3,000 tokens, drafter 'LlamaForCausalLM' \d+"):
        RapidPipeline.from_pretrained(big, model_for("chatml"), tokenizer=tokenizer_named("chatml"))


def test_different_padding_of_the_embeddings_is_allowed() -> None:
    size = len(tokenizer_named("chatml"))
    target, drafter = tiny_model("llama", vocab_size=size), tiny_model("llama", vocab_size=size + 500)
    pipeline = RapidPipeline.from_pretrained(target, drafter, tokenizer=tokenizer_named("chatml"))
    for chosen in ("lossless", "augmented", "mixture", "paper"):
        for temperature in (0.0, 1.0):
            options = OPTIONS.override(acceptance=chosen, temperature=temperature, seed=1)
            (completion,) = pipeline.generate([PROMPT], options=options)
            assert all(token < size for token in completion.token_ids)
    pipeline.close()


# Contradicting options -----------------------------------------------------------------------------------


def test_a_loaded_model_needs_its_tokenizer() -> None:
    with pytest.raises(ConfigurationError, match="a loaded LlamaForCausalLM was given without its tokenizer"):
        RapidPipeline.from_pretrained(tiny_model("llama"))


@pytest.mark.parametrize("name", ["dtype", "device_map", "quantization_config"])
def test_options_of_loading_are_refused_for_a_loaded_model(name) -> None:
    with pytest.raises(ConfigurationError, match="but a loaded one was given"):
        RapidPipeline.from_pretrained(
            model_for("chatml"), tokenizer=tokenizer_named("chatml"), **{name: "auto"}
        )


def test_after_an_unsupported_model_the_registry_loads_again() -> None:
    model = model_for("chatml")
    model.config.layer_types = ["linear_attention"] * 3
    spec = ModelSpec(model)
    registry = EngineRegistry()
    with pytest.raises(UnsupportedModelError):
        registry.acquire(spec, None, EngineLimits())
    model.config.layer_types = None
    engine, release = registry.acquire(spec, None, EngineLimits())
    assert run(engine, _request())[0]
    release()


# Sharing -------------------------------------------------------------------------------------------------


def _request() -> Request:
    sampling = SamplingParams(max_new_tokens=3, ignore_eos=True)
    return Request([5, 6, 7], [7], sampling, SpeculationParams(num_draft_tokens=2))


def test_pipelines_over_the_same_models_share_an_engine_until_the_last_closes(llama_folder) -> None:
    first = RapidPipeline.from_pretrained(llama_folder)
    second = RapidPipeline.from_pretrained(str(llama_folder))
    other = RapidPipeline.from_pretrained(llama_folder, limits=EngineLimits(max_active_requests=2))
    engine = first.engine
    assert second.engine is engine
    assert other.engine is not engine
    first.close()
    first.close()
    assert len(run(engine, _request())[0]) == 3, "the second still uses it"
    second.close()
    with pytest.raises(EngineClosedError):
        run(engine, _request())
    again = RapidPipeline.from_pretrained(llama_folder)
    assert again.engine is not engine
    again.close()
    other.close()


def test_a_garbage_collected_pipeline_releases_its_engine(llama_folder) -> None:
    pipeline = RapidPipeline.from_pretrained(llama_folder)
    engine = pipeline.engine
    gone = weakref.ref(pipeline)
    del pipeline
    gc.collect()
    assert gone() is None
    with pytest.raises(EngineClosedError):
        run(engine, _request())


def test_the_drafter_can_be_the_target_in_another_dtype(llama_folder) -> None:
    pipeline = RapidPipeline.from_pretrained(llama_folder, drafter_dtype="bfloat16")
    target, drafter = pipeline.engine.target, pipeline.engine.drafter
    assert drafter is not None
    assert drafter is not target
    assert next(target.model.parameters()).dtype == torch.float32
    assert next(drafter.model.parameters()).dtype == torch.bfloat16
    pipeline.close()
    plain = RapidPipeline.from_pretrained(llama_folder, llama_folder)
    assert plain.engine.drafter is plain.engine.target, "the same model twice is self-speculation"
    plain.close()


def test_a_closed_engine_is_not_shared_again() -> None:
    registry, spec = EngineRegistry(), ModelSpec(model_for("chatml"))
    broken, release_broken = registry.acquire(spec, None, EngineLimits())
    broken.close()
    engine, release = registry.acquire(spec, None, EngineLimits())
    assert engine is not broken
    release_broken()
    assert len(run(engine, _request())[0]) == 3
    release()


class _SlowSpec:
    """A specification that releases an engine while it loads, as garbage collection can."""

    loaded = False
    key = ("slow",)

    def __init__(self, model: PreTrainedModel, release: Any) -> None:
        self.model = model
        self.release = release

    def load(self) -> CausalModel:
        self.release()
        return CausalModel(self.model)


def test_releasing_an_engine_while_a_model_loads_does_not_deadlock() -> None:
    registry = EngineRegistry()
    _, release = registry.acquire(ModelSpec(model_for("chatml")), None, EngineLimits())
    spec: Any = _SlowSpec(model_for("chatml"), release)
    releases: list[Any] = []

    def load() -> None:
        releases.append(registry.acquire(spec, None, EngineLimits())[1])

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(20)
    assert releases, "the registry deadlocks"
    releases[0]()


def test_many_threads_load_once(llama_folder) -> None:
    barrier = threading.Barrier(8)
    pipelines: list[RapidPipeline] = []

    def make() -> None:
        barrier.wait(TIMEOUT_S)
        pipelines.append(RapidPipeline.from_pretrained(llama_folder))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert len(pipelines) == 8
    assert len({id(pipeline.engine) for pipeline in pipelines}) == 1
    for pipeline in pipelines:
        pipeline.close()
    assert not any(str(llama_folder) in str(key) for key in ENGINES._shared)
