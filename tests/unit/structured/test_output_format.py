"""Output formats: validated, normalised to text, and at most one at a time."""

import datetime
import enum
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pydantic
import pytest

from rapid_integrations.config import GenerationOptions
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.structured.output_format import MAX_FORMAT_CHARS, OutputFormat


class Person(pydantic.BaseModel):
    name: str
    age: int


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("json_schema", value) for value in ([], "[]", "3", 3, True)),
        *(("regex", value) for value in (3, ["a"])),
        *(("choices", value) for value in ((), [""], ["a", 1], "abc", {"a": 1})),
    ],
)
def test_values_of_other_kinds_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{name}=.* is not allowed: {name} must be \S+"):
        OutputFormat(**{name: value})


def test_schema_is_kept_as_compact_text_in_its_order() -> None:
    schema = {"type": "object", "properties": {"b": {"const": "é"}, "a": {}}}
    text = '{"type":"object","properties":{"b":{"const":"é"},"a":{}}}'
    assert OutputFormat(json_schema=schema).json_schema == text
    assert OutputFormat(json_schema=json.dumps(schema, indent=2)).json_schema == text
    assert OutputFormat(json_schema=schema) == OutputFormat(json_schema=text)
    described = OutputFormat(json_schema=Person).json_schema
    assert described is not None
    assert json.loads(described) == {**Person.model_json_schema(), "additionalProperties": False}


def test_objects_of_a_pydantic_model_allow_no_additional_properties() -> None:
    class Open(pydantic.BaseModel, extra="allow"):
        people: list[Person]
        properties: dict[str, int]

    described = json.loads(OutputFormat(json_schema=Open).json_schema)  # type: ignore[arg-type]
    assert described["additionalProperties"] is True
    assert described["$defs"]["Person"]["additionalProperties"] is False
    assert described["properties"]["properties"]["additionalProperties"] == {"type": "integer"}


def test_keywords_that_a_pydantic_model_does_not_check_are_removed() -> None:
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
    # A plain JSON schema is not changed.
    plain = {"type": "array", "uniqueItems": True, "items": {"format": "binary"}}
    assert json.loads(OutputFormat(json_schema=plain).json_schema) == plain  # type: ignore[arg-type]


def test_keywords_that_a_pydantic_model_checks_are_kept() -> None:
    class Strict(pydantic.BaseModel):
        pair: set[int] = pydantic.Field(min_length=2)
        id: pydantic.UUID4
        when: datetime.date

    properties = json.loads(OutputFormat(json_schema=Strict).json_schema)["properties"]  # type: ignore[arg-type]
    assert properties["pair"]["uniqueItems"] is True
    assert properties["id"]["format"] == "uuid4"
    assert properties["when"]["format"] == "date"


def test_repeated_choices_are_dropped() -> None:
    assert OutputFormat(choices=["b", "a", "b"]).choices == ("b", "a")


def test_two_formats_contradict_each_other() -> None:
    with pytest.raises(ConfigurationError, match="json_schema and regex contradict each other"):
        GenerationOptions().override(json_schema={}, regex="a")


def test_a_new_format_replaces_the_old_one_and_none_removes_it() -> None:
    options = GenerationOptions().override(regex="a+")
    assert options.output_format == OutputFormat(regex="a+")
    assert options.override(choices=("x",)).output_format == OutputFormat(choices=("x",))
    assert options.override(regex="b").output_format == OutputFormat(regex="b")
    assert options.override(temperature=1).output_format == OutputFormat(regex="a+")
    assert options.override(json_schema=None).output_format == OutputFormat(regex="a+")
    assert not options.override(regex=None).output_format
    assert OutputFormat(regex="")


def test_options_survive_json() -> None:
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
def test_a_format_that_is_too_long_is_refused(given: dict[str, Any]) -> None:
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
def test_half_of_a_surrogate_pair_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{next(iter(given))} has '\\ud800', half of a surrogate"):
        OutputFormat(**given)
    OutputFormat(choices=["\U0001f600"])


@pytest.mark.parametrize(
    "schema",
    ["{", "[" * 50_000, {"a": {1, 2}}, {"a": float("nan")}, '{"a": NaN}', int, pydantic.BaseModel | None],
)
def test_a_value_that_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"json_schema"):
        OutputFormat(json_schema=schema)


def test_a_model_without_a_schema_is_refused() -> None:
    class Caller(pydantic.BaseModel):
        call: Callable[[], int]

    with pytest.raises(ConfigurationError, match="is not a JSON schema"):
        OutputFormat(json_schema=Caller)  # type: ignore[arg-type]


def test_a_format_excludes_ignore_eos() -> None:
    with pytest.raises(ConfigurationError, match="ignore_eos contradicts"):
        GenerationOptions().override(regex="a", ignore_eos=True)
