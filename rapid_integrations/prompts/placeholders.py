"""Placeholders for untrusted text while a chat template is rendered.

The texts of messages, and the strings of tool calls and tool definitions, are replaced by random numbers
before rendering. Whatever else appears in the rendered prompt is the template's own text.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Templates test for these words of JSON Schema, so they are kept. All other strings of a definition are
# untrusted.
_SCHEMA_WORDS = frozenset((
    "type", "function", "name", "description", "parameters", "strict", "return", "properties", "required",
    "items", "prefixItems", "enum", "const", "default", "examples", "title", "format", "pattern", "nullable",
    "anyOf", "allOf", "oneOf", "not", "additionalProperties", "patternProperties", "propertyNames",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength",
    "minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties", "$ref", "$defs", "definitions",
))  # fmt: skip
_TYPE_WORDS = frozenset(
    ("function", "object", "array", "string", "number", "integer", "boolean", "null", "any")
)
_KEYS_WITH_NAMED_SCHEMAS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_KEYS_WITH_VALUES = frozenset(("enum", "const", "default", "examples"))


class Placeholders:
    """Creates placeholders and remembers the text that each replaces.

    A placeholder is a new random number each time, so that no document can contain it. It consists of digits,
    which no template changes and JSON does not escape.

    Attributes:
        texts: The replaced text of each placeholder.
        required: The placeholders that the template must not omit, each with the complaint to raise if it
            does.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.required: dict[str, str] = {}

    def in_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a chat message with placeholders for its texts."""
        # Some templates omit the text beside a tool call; models of their families write none there.
        complaint = "" if "tool_calls" in message else "it leaves a message out"
        replaced = dict(message, content=self._create(message["content"], complaint))
        if "name" in message:
            replaced["name"] = self._create(message["name"])
        if "tool_calls" in message:
            replaced["tool_calls"] = [self._in_call(call) for call in message["tool_calls"]]
        return replaced

    def in_tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """Return a tool definition with placeholders.

        Equal texts get the same placeholder, because templates look up names of properties in ``required``.
        """
        placeholders = self._create_all(_strings(_replace_in_schema, tool))
        replaced: dict[str, Any] = _replace_in_schema(tool, placeholders.__getitem__)
        function = replaced.get("function", replaced)
        if isinstance(function, dict) and (name := function.get("name")) in self.texts:
            self.required[name] = "it does not support tools"
        return replaced

    def _in_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        complaint = "it leaves a tool call out"
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        placeholders = self._create_all(_strings(_replace_all, arguments), complaint)
        function = {
            "name": self._create(name, complaint),
            "arguments": _replace_all(arguments, placeholders.__getitem__),
        }
        return {**call, "function": function}

    def _create(self, text: str, complaint: str = "") -> str:
        return self._create_all([text], complaint)[text]

    def _create_all(self, texts: Sequence[str], complaint: str = "") -> dict[str, str]:
        """Create a placeholder for each text but whitespace, which maps to itself.

        Placeholders sort in the order of their texts, because some templates sort names.
        """
        placeholders = {text: text for text in texts}
        in_order = sorted(text for text in placeholders if text.strip())
        numbers: set[int] = set()
        while len(numbers) < len(in_order):
            numbers.add(10**39 + secrets.randbelow(9 * 10**39))
        for text, number in zip(in_order, sorted(numbers), strict=True):
            placeholder = placeholders[text] = str(number)
            self.texts[placeholder] = text
            if complaint:
                self.required[placeholder] = complaint
        return placeholders


def _strings(replace: Callable[[Any, Callable[[str], str]], Any], value: Any) -> list[str]:
    """Collect the strings that ``replace`` would replace in ``value``."""
    strings: list[str] = []

    def collect(text: str) -> str:
        strings.append(text)
        return text

    replace(value, collect)
    return strings


def _replace_all(value: Any, replacement: Callable[[str], str]) -> Any:
    """Replace all strings of a JSON value, including keys."""
    if isinstance(value, str):
        return replacement(value)
    if isinstance(value, dict):
        return {replacement(key): _replace_all(item, replacement) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_all(item, replacement) for item in value]
    return value


def _replace_in_schema(value: Any, replacement: Callable[[str], str], *, keys_are_names: bool = False) -> Any:
    """Replace all strings of a tool definition except the words of JSON Schema.

    Args:
        value: The definition or a part of it.
        replacement: Returns the string that replaces a string.
        keys_are_names: Whether the keys of ``value`` are names of properties or definitions, not schema
            words.
    """
    if isinstance(value, list):
        return [_replace_in_schema(item, replacement) for item in value]
    if not isinstance(value, dict):
        return replacement(value) if isinstance(value, str) else value
    replaced = {}
    for key, item in value.items():
        if keys_are_names or key not in _SCHEMA_WORDS:
            replaced[replacement(key)] = _replace_in_schema(item, replacement)
        elif key == "type" and _is_type(item):
            replaced[key] = item
        elif key in _KEYS_WITH_VALUES:
            replaced[key] = _replace_all(item, replacement)
        else:
            named = key in _KEYS_WITH_NAMED_SCHEMAS
            replaced[key] = _replace_in_schema(item, replacement, keys_are_names=named)
    return replaced


def _is_type(value: Any) -> bool:
    types = value if isinstance(value, list) else [value]
    return all(isinstance(name, str) and name in _TYPE_WORDS for name in types)
