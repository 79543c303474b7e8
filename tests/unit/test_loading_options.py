"""Loading options: normalised and validated once, and two model specifications derived from them."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rapid_integrations import EngineLimits
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.loading import ModelSpec, model_specs
from rapid_integrations.loading_options import LoadingOptions
from rapid_integrations.pipeline import RapidPipeline

MODEL = SimpleNamespace(name="loaded")
TOKENIZER = SimpleNamespace()


def test_paths_dtypes_and_limits_are_normalised() -> None:
    options = LoadingOptions(
        Path("a") / "b",
        Path("c"),
        dtype=torch.bfloat16,  # type: ignore[arg-type]
        drafter_dtype="torch.float16",
        kv_dtype=torch.bfloat16,  # type: ignore[arg-type]
        limits={"max_active_requests": 2},  # type: ignore[arg-type]
    )
    assert (options.target, options.drafter) == (str(Path("a") / "b"), "c")
    assert (options.dtype, options.drafter_dtype, options.kv_dtype) == ("bfloat16", "float16", "bfloat16")
    assert options.limits == EngineLimits(max_active_requests=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_dtype": "int8"}, "kv_dtype='int8' is not allowed"),
        ({"limits": 3}, "limits=3 is not allowed"),
        ({"limits": {"max_active_requests": 0}}, "max_active_requests=0"),
        ({"local_files_only": None}, "local_files_only=None is not allowed"),
        ({"chat_template": "yes"}, "chat_template='yes' is not allowed"),
        ({"target": MODEL}, "a loaded SimpleNamespace was given without its tokenizer"),
        ({"target": MODEL, "tokenizer": TOKENIZER, "dtype": "auto"}, "^dtype says how to load the target"),
        ({"drafter": MODEL, "drafter_device_map": "cpu"}, "^drafter_device_map says how to load the drafter"),
        ({"target": MODEL, "tokenizer": TOKENIZER, "drafter_revision": "r"}, "pass drafter="),
        ({"gguf_file": 3}, "gguf_file=3 is not allowed: gguf_file must be the name of a .gguf file"),
        ({"drafter_gguf_file": "x.bin"}, "drafter_gguf_file='x.bin' is not allowed"),
        ({"target": MODEL, "tokenizer": TOKENIZER, "gguf_file": "x.gguf"}, "^gguf_file says how to load the"),
        (
            {"drafter": MODEL, "drafter_gguf_file": "x.gguf"},
            "^drafter_gguf_file says how to load the drafter",
        ),
        (
            {"target": Path("a.gguf"), "gguf_file": "b.gguf"},
            "'a.gguf' is a GGUF file itself: leave gguf_file",
        ),
        ({"target": "a.GGUF", "drafter_gguf_file": "b.gguf"}, "'a.GGUF' is a GGUF file itself"),
        ({"drafter": "a.gguf", "drafter_gguf_file": "b.gguf"}, "'a.gguf' is a GGUF file itself"),
    ],
)
def test_values_that_are_not_allowed_or_contradict_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LoadingOptions(**{"target": "some/model", **arguments})


def test_changed_options_differ_from_their_defaults() -> None:
    given = {"target": "x", "dtype": None, "chat_template": True, "revision": "r", "temperature": 1}
    assert LoadingOptions.changed(given) == {"target": "x", "revision": "r"}
    assert LoadingOptions.changed({"chat_template": False}) == {"chat_template": False}


HOW = {"dtype": "float32", "device_map": "cpu", "quantization_config": "int8", "revision": "r"}


@pytest.mark.parametrize(
    ("arguments", "drafter"),
    [
        ({}, None),
        ({"drafter": "x", "quantization_config": None, "drafter_revision": "r"}, None),
        ({"drafter": "y"}, ModelSpec("y", "float32", "cpu")),
        ({"drafter": "y", "drafter_revision": "s"}, ModelSpec("y", "float32", "cpu", revision="s")),
        (
            {"drafter": "y", "drafter_dtype": "float16", "drafter_device_map": "meta"},
            ModelSpec("y", "float16", "meta"),
        ),
        ({"drafter": MODEL}, ModelSpec(MODEL)),  # type: ignore[arg-type]
        ({"drafter_quantization_config": 8}, ModelSpec("x", "float32", "cpu", 8, "r")),
        ({"drafter_dtype": "float16"}, ModelSpec("x", "float16", "cpu", None, "r")),
        ({"drafter_revision": "s"}, ModelSpec("x", "float32", "cpu", None, "s")),
        (
            {"gguf_file": "t.gguf", "drafter_dtype": "float16"},
            ModelSpec("x", "float16", "cpu", None, "r", gguf_file="t.gguf"),
        ),
        (
            {"gguf_file": "t.gguf", "drafter_gguf_file": "d.gguf"},
            ModelSpec("x", "float32", "cpu", None, "r", gguf_file="d.gguf"),
        ),
        (
            {"gguf_file": "t.gguf", "drafter": "x", "quantization_config": None, "drafter_revision": "r"},
            ModelSpec("x", "float32", "cpu", None, "r"),
        ),
        ({"gguf_file": "t.gguf", "drafter": "y.gguf"}, ModelSpec("y.gguf", "float32", "cpu")),
    ],
)
def test_the_drafter_has_the_target_s_dtype_and_device_unless_given(
    arguments: dict[str, Any], drafter: ModelSpec | None
) -> None:
    target_spec, drafter_spec = model_specs(LoadingOptions("x", **{**HOW, **arguments}))
    assert target_spec.source == "x"
    assert (target_spec.dtype, target_spec.device_map, target_spec.revision) == ("float32", "cpu", "r")
    assert drafter_spec == drafter


def test_both_models_share_the_kv_dtype_and_stay_offline() -> None:
    specs = model_specs(LoadingOptions("x", "y", kv_dtype="bfloat16", local_files_only=True))
    assert [(spec.kv_dtype, spec.local_files_only) for spec in specs if spec] == [("bfloat16", True)] * 2


def test_unknown_loading_options_of_a_pipeline_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"from_pretrained does not take dtpye \(did you mean dtype\?"
    ):
        RapidPipeline.from_pretrained("x", dtpye="float32")
    with pytest.raises(ConfigurationError, match="unknown option target: allowed are"):
        RapidPipeline.demo(target="x")
    for fixed in ({"dtype": "int3"}, {"device_map": "gpu9"}, {"tokenizer": 3}):
        with pytest.raises(ConfigurationError, match=f"unknown option {next(iter(fixed))}: allowed are"):
            RapidPipeline.demo(**fixed)


def test_the_signature_of_a_pipeline_shows_the_loading_options() -> None:
    parameters = inspect.signature(RapidPipeline.from_pretrained).parameters
    assert list(parameters)[:4] == ["target", "drafter", "retriever", "options"]
    assert parameters["chat_template"].default is True
    assert set(LoadingOptions.names()) <= set(parameters)
