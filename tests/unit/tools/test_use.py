import pytest

from rapid_integrations import ConfigurationError, GenerationOptions
from rapid_integrations.structured.output_format import MAX_FORMAT_CHARS
from rapid_integrations.tools.formats import CheckedTool
from rapid_integrations.tools.use import ToolUse


@pytest.mark.parametrize(
    ("parameters", "closed"),
    [
        ({"type": "object", "properties": {"a": {"type": "string"}}}, True),
        ({"properties": {}}, True),
        ({"type": "object"}, None),
        ({"properties": {}, "additionalProperties": True}, None),
        ({"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]}, None),
    ],
    ids=["named", "none", "anything", "more", "composed"],
)
def test_a_forced_call_has_only_declared_arguments(parameters, closed):
    definition = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    expected = {"type": "object", **parameters} | ({"additionalProperties": False} if closed else {})
    assert ToolUse.parse([definition], "f").forced_arguments == expected


def test_constraints_that_pydantic_checks_are_removed_from_the_schema():
    place = {"type": "object", "properties": {"names": {"type": "array", "uniqueItems": True}}}
    parameters = {"type": "object", "properties": {"file": {"type": "string", "format": "path"}, "at": place}}
    definition = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    loose = ToolUse.parse([definition], "f").forced_arguments
    assert loose == {**parameters, "additionalProperties": False}
    checked = ToolUse.parse([CheckedTool(definition)], "f").forced_arguments
    assert checked["properties"]["file"] == {"type": "string"}
    names = {"names": {"type": "array"}}
    assert checked["properties"]["at"] == {
        "type": "object",
        "properties": names,
        "additionalProperties": False,
    }
    assert definition["function"]["parameters"] is parameters  # the model reads the full schema
    assert parameters["properties"]["at"] is place


def test_the_error_for_a_long_schema_names_the_forced_tool():
    parameters = {"type": "object", "description": "x" * MAX_FORMAT_CHARS}
    definition = {"type": "function", "function": {"name": "search", "parameters": parameters}}
    with pytest.raises(
        ConfigurationError, match="the schema of the tool 'search', which must be called, is not"
    ):
        ToolUse.parse([definition], "any").constrain_arguments(GenerationOptions())


def test_a_forced_tool_without_parameters_has_no_arguments():
    schema = ToolUse.parse([{"type": "function", "function": {"name": "f"}}], "any").forced_arguments
    assert schema == {"type": "object", "properties": {}, "additionalProperties": False}
