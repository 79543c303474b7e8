"""The format that an answer must have: a JSON schema, a regular expression or a list of choices.

:class:`OutputFormat` validates and normalises the request. :mod:`rapid_integrations.structured` turns it into
a grammar that constrains every token.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.validation import check

MAX_FORMAT_CHARS = 100_000
"""The maximum length of a schema, of a pattern, and of all choices together, in characters."""


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """The format of an answer. Every token is chosen among those that keep to it. At most one field is set.

    ``max_new_tokens`` and stop strings can still end an answer before it is complete.

    Attributes:
        json_schema: The answer is JSON that this schema describes: the schema's text, a dict, or a pydantic
            model class. It is kept as text. Properties are written in the schema's order, and objects of a
            pydantic model have no other properties. Constraints of a pydantic model that its validation does
            not check (distinct items of a set, existing paths) are left out. Default ``None``.
        regex: The whole answer matches this pattern, in Rust's syntax: no look-around, no back-references.
            Default ``None``.
        choices: The answer is one of these strings. Default ``None``.
    """

    json_schema: str | None = None
    regex: str | None = None
    choices: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Validate every field; normalise the schema to text and the choices to a tuple without repeats."""
        object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        check(self, regex=(self.regex is None or isinstance(self.regex, str), "a str or None"))
        choices: Any = self.choices
        if choices is not None:
            is_list = isinstance(choices, (list, tuple)) and len(choices) > 0
            valid = is_list and all(isinstance(choice, str) and choice for choice in choices)
            check(self, choices=(valid, "a list of one or more non-empty strings, or None"))
            object.__setattr__(self, "choices", tuple(dict.fromkeys(choices)))
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if len(given) > 1:
            raise ConfigurationError(f"{' and '.join(given)} contradict each other: give one of them.")
        for name, value in given.items():
            _require_short(name, sum(map(len, value)))
            _require_utf8(name, value)

    def __bool__(self) -> bool:
        """Whether a format is set."""
        return (self.json_schema, self.regex, self.choices) != (None, None, None)

    def override(self, **changes: Any) -> OutputFormat:
        """This format with ``changes``. A new format replaces the old one, whichever field that was in.

        Raises:
            ConfigurationError: A value is not allowed, or several formats are given.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        return OutputFormat(**given) if given else dataclasses.replace(self, **changes)


def _require_short(name: str, length: int) -> None:
    if length > MAX_FORMAT_CHARS:
        raise ConfigurationError(
            f"{name} has {length:,} characters; at most {MAX_FORMAT_CHARS:,} are allowed. Simplify it."
        )


def _require_utf8(name: str, value: Iterable[str]) -> None:
    try:
        "".join(value).encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"{name} has {error.object[error.start]!r}, half of a surrogate pair, which UTF-8 cannot encode: "
            "remove it or write the complete character."
        ) from error


def _schema_text(schema: Any) -> str | None:
    """A JSON schema as compact text. Its keys keep their order, which is the order in the answer."""
    if schema is None:
        return None
    described = schema
    try:
        if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
            described = validated_schema(schema.model_json_schema())
        elif isinstance(schema, str):
            _require_short("json_schema", len(schema))
            described = json.loads(schema)
        text = json.dumps(described, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ConfigurationError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # pydantic and deep nesting raise RuntimeError
        raise ConfigurationError(
            f"json_schema is not a JSON schema: {error}. Give a dict, the text of a JSON object, or a "
            "pydantic model class."
        ) from error
    if not isinstance(described, dict):
        shown = text if len(text) <= 80 else f"{text[:80]}…"
        raise ConfigurationError(
            f"json_schema={shown} is not allowed: json_schema must be a dict, the text of a JSON object, or "
            "a pydantic model class."
        )
    return text


# pydantic accepts any JSON string for these formats, and no grammar can check that a path exists.
_UNCHECKED_TEXT_FORMATS = ("binary", "password", "path", "file-path", "directory-path")


def validated_schema(schema: Any) -> Any:
    """The schema of a pydantic model (or of a tool's Python signature), reduced to what validation checks.

    Objects allow no additional properties, because the model would ignore them. Keywords that the model does
    not check are removed, because no grammar can enforce them and the request would be refused.
    """
    if isinstance(schema, list):
        return [validated_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    reduced: dict[str, Any] = {}
    for name, value in schema.items():
        if name in ("properties", "patternProperties", "$defs") and isinstance(value, dict):
            reduced[name] = {key: validated_schema(subschema) for key, subschema in value.items()}
        else:
            is_data = name in ("const", "enum", "default", "examples")
            reduced[name] = value if is_data else validated_schema(value)
    if reduced.get("type") == "object" and "properties" in reduced:
        reduced.setdefault("additionalProperties", False)
    # Repeated items of a set are harmless, unless removing them could leave fewer than minItems.
    if reduced.get("uniqueItems") and reduced.get("minItems", 0) <= 1:
        del reduced["uniqueItems"]
    if reduced.get("format") in _UNCHECKED_TEXT_FORMATS:
        del reduced["format"]
    return reduced
