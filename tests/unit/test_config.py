"""Options validate themselves when they are made; unknown names are refused."""

import dataclasses
import pathlib
from typing import Any

import pytest

from rapid_integrations.config import (
    EngineLimits,
    GenerationOptions,
    RetrievalParams,
    SamplingParams,
    SpeculationParams,
)
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.structured.output_format import OutputFormat

NAN, INF = float("nan"), float("inf")

REFUSED: list[tuple[type, str, list[Any]]] = [
    (SamplingParams, "temperature", [-0.1, NAN, INF, "1", None, True]),
    (SamplingParams, "top_k", [0, -1, 1.5, True]),
    (SamplingParams, "top_p", [0, 1.01, -0.5, NAN, "x"]),
    (SamplingParams, "min_p", [-0.1, 1.1, NAN]),
    (SamplingParams, "repetition_penalty", [0, -1, INF, None]),
    (SamplingParams, "seed", [-1, 2**63, 1.0, True]),
    (SamplingParams, "max_new_tokens", [0, -5, 2.0, None]),
    (SamplingParams, "stop", ["", ("",), ("a", 3), (None,)]),
    (SpeculationParams, "acceptance", ["exact", None, ""]),
    (SpeculationParams, "transfer_strength", [-1, NAN, INF, None]),
    (SpeculationParams, "num_draft_tokens", [-1, 1.5, True, "auto"]),
    (SpeculationParams, "max_draft_tokens", [0, None]),
    (SpeculationParams, "tail_rule", ["both", None]),
    (SpeculationParams, "adaptive_transfer", ["yes", None, 1]),
    (SpeculationParams, "mixture_weight", [-0.1, 1.1, NAN, None, True]),
    (RetrievalParams, "chunk_tokens", [0, 1.0, None]),
    (RetrievalParams, "min_tokens", [0]),
    (RetrievalParams, "context_divisor", [0.5, NAN]),
    (RetrievalParams, "max_tokens", [0, 2.5]),
    (RetrievalParams, "min_score", [NAN, "high"]),
    (RetrievalParams, "timeout_s", [0, -1, None, INF]),
    (GenerationOptions, "timeout_s", [0, -1, NAN]),
    (EngineLimits, "max_active_requests", [0, 1.5]),
    (EngineLimits, "max_queued_requests", [0]),
    (EngineLimits, "prefill_chunk_tokens", [0]),
    (EngineLimits, "prefix_cache_bytes", [-1, None]),
    (EngineLimits, "prefix_cache_dir", ["", 3, b"x"]),
    (EngineLimits, "prefix_cache_dir_bytes", [0, None]),
]


@pytest.mark.parametrize(
    ("kind", "name", "value"), [(kind, name, value) for kind, name, values in REFUSED for value in values]
)
def test_a_value_out_of_range_raises_and_names_the_allowed_ones(kind, name, value) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"^{name}=.* is not allowed: {name} must be \S+"
    ) as refusal:
        kind(**{name: value})
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (SamplingParams, {"temperature": 0, "top_k": 1, "top_p": 1, "min_p": 0, "seed": 2**63 - 1}),
        (SamplingParams, {"top_p": 1e-9, "min_p": 1, "seed": 0, "max_new_tokens": 1}),
        (SpeculationParams, {"transfer_strength": 0, "num_draft_tokens": 0}),
        (RetrievalParams, {"context_divisor": 1, "min_score": -1}),
        (EngineLimits, {"prefix_cache_bytes": 0, "prefill_chunk_tokens": 1}),
    ],
)
def test_the_limits_of_a_range_are_allowed(kind, values) -> None:
    made = kind(**values)
    assert {name: getattr(made, name) for name in values} == values


def test_defaults_are_greedy_and_augmented_with_adaptive_draft_lengths() -> None:
    options = GenerationOptions()
    assert options.sampling.greedy
    assert options.speculation == SpeculationParams("augmented", 10.0, None, 32, "none", True)
    assert options.timeout_s is None


def test_options_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationOptions().sampling.temperature = 1.0  # type: ignore[misc]
    assert hash(EngineLimits()) == hash(EngineLimits())


@pytest.mark.parametrize(
    ("given", "kept"), [("END", ("END",)), (["a", "b"], ("a", "b")), ((), ()), (None, ())]
)
def test_stop_is_one_string_or_many(given, kept) -> None:
    assert SamplingParams(stop=given).stop == kept


def test_a_path_is_kept_as_text() -> None:
    assert EngineLimits(prefix_cache_dir=pathlib.Path("a")).prefix_cache_dir == "a"
    assert EngineLimits().prefix_cache_dir is None


def test_lossless_and_mixture_have_no_transfer() -> None:
    assert SpeculationParams("lossless", 10).effective_strength == 0
    assert SpeculationParams("augmented", 10).effective_strength == 10
    assert SpeculationParams("paper", 7).effective_strength == 7
    assert SpeculationParams("mixture", 7).effective_strength == 0


@pytest.mark.parametrize(
    ("speculation", "steers"),
    [
        (SpeculationParams("lossless", 10, mixture_weight=0.2), False),
        (SpeculationParams("augmented", 10), True),
        (SpeculationParams("augmented", 0, mixture_weight=0.2), False),
        (SpeculationParams("paper", 7), True),
        (SpeculationParams("mixture", 0, mixture_weight=0.9), True),
        (SpeculationParams("mixture", 10, mixture_weight=1), False),
    ],
)
def test_the_acceptance_rule_decides_whether_the_drafter_steers(speculation, steers) -> None:
    assert speculation.drafter_steers is steers


def test_the_retrieval_budget_follows_the_context_or_is_fixed() -> None:
    assert RetrievalParams().budget(1_000) == 768
    assert RetrievalParams().budget(24 * 768) == 768
    assert RetrievalParams().budget(24 * 768 + 1) == 769, "rounded up"
    assert RetrievalParams().budget(120_000) == 5_000, "as published"
    assert RetrievalParams(min_tokens=4_096).budget(1_000) == 4_096
    assert RetrievalParams(max_tokens=300).budget(120_000) == 300


# Flat names ----------------------------------------------------------------------------------------------


def test_flat_names_change_their_group() -> None:
    changes = {"temperature": 0.5, "transfer_strength": 20, "retrieval_max_tokens": 7, "timeout_s": 3}
    options = GenerationOptions().override(**changes)
    assert options.sampling == SamplingParams(temperature=0.5)
    assert options.speculation == SpeculationParams(transfer_strength=20)
    assert options.retrieval == RetrievalParams(max_tokens=7)
    assert options.timeout_s == 3
    assert options.override() is options
    assert options.override(timeout_s=None).timeout_s is None
    assert options.override(seed=1).sampling == SamplingParams(temperature=0.5, seed=1)


def test_flat_options_give_the_same_options() -> None:
    options = GenerationOptions().override(
        temperature=0.5,
        stop=["x"],
        acceptance="paper",
        num_draft_tokens=3,
        retrieval_min_score=0.2,
        timeout_s=9,
    )
    flat = options.flat()
    assert GenerationOptions.names() == flat.keys()
    assert GenerationOptions().override(**flat) == options


def test_every_field_has_a_flat_name() -> None:
    fields = sum(
        len(dataclasses.fields(kind))
        for kind in (SamplingParams, SpeculationParams, RetrievalParams, OutputFormat)
    )
    assert len(GenerationOptions.names()) == fields + 1


def test_an_unknown_name_raises_and_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^unknown options chunk_tokens, temprature: allowed are .*top_p"
    ):
        GenerationOptions().override(temprature=1, chunk_tokens=3)
    with pytest.raises(ConfigurationError, match=r"^unknown option min_tokens: "):
        GenerationOptions().override(min_tokens=3)
    with pytest.raises(ConfigurationError, match=r"^top_p=2 is not allowed"):
        GenerationOptions().override(top_p=2)
