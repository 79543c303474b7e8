"""Options validate themselves where they are made; names are known or refused."""

import dataclasses
import datetime
import enum
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pydantic
import pytest

from rapid_integrations.config import (
    MAX_FORMAT_CHARS,
    EngineLimits,
    GenerationOptions,
    OutputFormat,
    RetrievalParams,
    SamplingParams,
    SpeculationParams,
)
from rapid_integrations.errors import ConfigurationError

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
    (OutputFormat, "json_schema", [[], "[]", "3", 3, True]),
    (OutputFormat, "regex", [3, ["a"]]),
    (OutputFormat, "choices", [(), [""], ["a", 1], "abc", {"a": 1}]),
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
def test_values_out_of_range_are_refused_with_what_is_allowed(kind, name, value) -> None:
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
def test_the_ends_of_the_ranges_are_allowed(kind, values) -> None:
    made = kind(**values)
    assert {name: getattr(made, name) for name in values} == values


def test_the_defaults_are_greedy_augmented_and_chosen_per_round() -> None:
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


def test_a_folder_may_be_a_path() -> None:
    assert EngineLimits(prefix_cache_dir=pathlib.Path("a")).prefix_cache_dir == "a"
    assert EngineLimits().prefix_cache_dir is None


def test_lossless_leaves_no_transfer_in_force() -> None:
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
def test_the_drafter_steers_where_the_rule_lets_it(speculation, steers) -> None:
    assert speculation.drafter_steers is steers


def test_the_retrieval_budget_is_the_published_one_unless_fixed() -> None:
    assert RetrievalParams().budget(1_000) == 4_096
    assert RetrievalParams().budget(24 * 4_096) == 4_096
    assert RetrievalParams().budget(120_000) == 5_000
    assert RetrievalParams().budget(24 * 4_096 + 1) == 4_097, "rounded up"
    assert RetrievalParams(max_tokens=300).budget(120_000) == 300


# Flat names ----------------------------------------------------------------------------------------------


def test_flat_names_reach_their_group() -> None:
    changes = {"temperature": 0.5, "transfer_strength": 20, "retrieval_max_tokens": 7, "timeout_s": 3}
    options = GenerationOptions().override(**changes)
    assert options.sampling == SamplingParams(temperature=0.5)
    assert options.speculation == SpeculationParams(transfer_strength=20)
    assert options.retrieval == RetrievalParams(max_tokens=7)
    assert options.timeout_s == 3
    assert options.override() is options
    assert options.override(timeout_s=None).timeout_s is None
    assert options.override(seed=1).sampling == SamplingParams(temperature=0.5, seed=1)


def test_flat_names_and_back() -> None:
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


def test_unknown_names_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^unknown options chunk_tokens, temprature: allowed are .*top_p"
    ):
        GenerationOptions().override(temprature=1, chunk_tokens=3)
    with pytest.raises(ConfigurationError, match=r"^unknown option min_tokens: "):
        GenerationOptions().override(min_tokens=3)
    with pytest.raises(ConfigurationError, match=r"^top_p=2 is not allowed"):
        GenerationOptions().override(top_p=2)


class Person(pydantic.BaseModel):
    name: str
    age: int


class TestOutputFormat:
    def test_a_schema_is_kept_as_canonical_text_in_its_own_order(self) -> None:
        schema = {"type": "object", "properties": {"b": {"const": "é"}, "a": {}}}
        text = '{"type":"object","properties":{"b":{"const":"é"},"a":{}}}'
        assert OutputFormat(json_schema=schema).json_schema == text
        assert OutputFormat(json_schema=json.dumps(schema, indent=2)).json_schema == text
        assert OutputFormat(json_schema=schema) == OutputFormat(json_schema=text)
        described = OutputFormat(json_schema=Person).json_schema
        assert described is not None
        assert json.loads(described) == {**Person.model_json_schema(), "additionalProperties": False}

    def test_a_model_s_objects_have_only_the_properties_that_it_reads(self) -> None:
        class Open(pydantic.BaseModel, extra="allow"):
            people: list[Person]
            properties: dict[str, int]

        described = json.loads(OutputFormat(json_schema=Open).json_schema)  # type: ignore[arg-type]
        assert described["additionalProperties"] is True
        assert described["$defs"]["Person"]["additionalProperties"] is False
        assert described["properties"]["properties"]["additionalProperties"] == {"type": "integer"}

    def test_keywords_that_a_model_does_not_check_are_left_out(self) -> None:
        class Kind(enum.Enum):
            A = "uniqueItems"

        class Loose(pydantic.BaseModel):
            tags: set[str]
            groups: list[frozenset[int]]
            data: bytes
            path: pathlib.Path
            found: pydantic.FilePath | pydantic.DirectoryPath
            key: pydantic.SecretStr
            format: str
            uniqueItems: bool  # a keyword's name
            kind: Kind
            seen: dict[str, Any] = {"format": "binary", "uniqueItems": True}

        described = OutputFormat(json_schema=Loose).json_schema  # type: ignore[arg-type]
        assert described is not None
        schema = json.loads(described)
        properties = schema["properties"]
        assert properties["tags"] == {"items": {"type": "string"}, "title": "Tags", "type": "array"}
        assert properties["groups"]["items"] == {"items": {"type": "integer"}, "type": "array"}
        assert properties["data"] == {"title": "Data", "type": "string"}
        assert properties["path"] == {"title": "Path", "type": "string"}
        assert properties["found"]["anyOf"] == [{"type": "string"}, {"type": "string"}]
        assert "format" not in properties["key"]
        assert properties["format"]["type"] == "string"
        assert properties["uniqueItems"]["type"] == "boolean"
        assert properties["seen"]["default"] == {"format": "binary", "uniqueItems": True}
        # Whoever gives a schema of their own means it.
        plain = {"type": "array", "uniqueItems": True, "items": {"format": "binary"}}
        assert json.loads(OutputFormat(json_schema=plain).json_schema) == plain  # type: ignore[arg-type]

    def test_keywords_that_a_model_checks_are_kept(self) -> None:
        class Strict(pydantic.BaseModel):
            pair: set[int] = pydantic.Field(min_length=2)
            id: pydantic.UUID4
            when: datetime.date

        properties = json.loads(OutputFormat(json_schema=Strict).json_schema)["properties"]  # type: ignore[arg-type]
        assert properties["pair"]["uniqueItems"] is True
        assert properties["id"]["format"] == "uuid4"
        assert properties["when"]["format"] == "date"

    def test_choices_are_kept_once_each_in_order(self) -> None:
        assert OutputFormat(choices=["b", "a", "b"]).choices == ("b", "a")

    def test_only_one_may_be_asked_for_at_a_time(self) -> None:
        with pytest.raises(ConfigurationError, match="json_schema and regex contradict each other"):
            GenerationOptions().override(json_schema={}, regex="a")

    def test_a_call_s_format_replaces_an_earlier_one_and_none_takes_it_back(self) -> None:
        options = GenerationOptions().override(regex="a+")
        assert options.output_format == OutputFormat(regex="a+")
        assert options.override(choices=("x",)).output_format == OutputFormat(choices=("x",))
        assert options.override(regex="b").output_format == OutputFormat(regex="b")
        assert options.override(temperature=1).output_format == OutputFormat(regex="a+")
        assert options.override(json_schema=None).output_format == OutputFormat(regex="a+")
        assert not options.override(regex=None).output_format
        assert OutputFormat(regex="")

    def test_plain_data_gives_the_options_back(self) -> None:
        options = GenerationOptions().override(json_schema=Person)
        assert GenerationOptions().override(**json.loads(json.dumps(options.flat()))) == options

    @pytest.mark.parametrize(
        "given",
        [
            {"json_schema": {"enum": ["x" * MAX_FORMAT_CHARS]}},
            {"json_schema": " " * MAX_FORMAT_CHARS + "{}"},
            {"regex": "a" * (MAX_FORMAT_CHARS + 1)},
            {"choices": ["a" * MAX_FORMAT_CHARS, "b"]},
        ],
    )
    def test_what_is_too_long_is_refused(self, given: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError, match=r"has 100,0\d\d characters; at most 100,000"):
            OutputFormat(**given)

    @pytest.mark.parametrize(
        "given",
        [
            {"json_schema": {"enum": ["a\ud800"]}},
            {"json_schema": '{"enum": ["a\\ud800"]}'},
            {"regex": "a\ud800|b"},
            {"choices": ["a", "b\ud800"]},
        ],
    )
    def test_half_of_a_surrogate_pair_is_refused(self, given: dict[str, Any]) -> None:
        with pytest.raises(
            ConfigurationError, match=rf"^{next(iter(given))} has '\\ud800', half of a surrogate"
        ):
            OutputFormat(**given)
        OutputFormat(choices=["\U0001f600"])

    @pytest.mark.parametrize(
        "schema", ["{", "[" * 50_000, {"a": {1, 2}}, {"a": NAN}, '{"a": NaN}', int, pydantic.BaseModel | None]
    )
    def test_what_is_no_schema_is_refused(self, schema: Any) -> None:
        with pytest.raises(ConfigurationError, match=r"json_schema"):
            OutputFormat(json_schema=schema)

    def test_a_model_without_a_schema_is_refused(self) -> None:
        class Caller(pydantic.BaseModel):
            call: Callable[[], int]

        with pytest.raises(ConfigurationError, match="is not a JSON schema"):
            OutputFormat(json_schema=Caller)  # type: ignore[arg-type]

    def test_an_answer_of_a_given_format_has_to_end(self) -> None:
        with pytest.raises(ConfigurationError, match="ignore_eos contradicts"):
            GenerationOptions().override(regex="a", ignore_eos=True)
