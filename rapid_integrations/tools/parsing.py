"""Parse an answer, complete or streamed, into text and tool calls, without losing any of its text.

The ``ResponseParser`` of transformers finds the fields of an answer. :class:`AnswerParser` decodes the tool
calls in them, and turns everything that cannot be parsed into text or an :class:`InvalidToolCall`.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import ResponseTemplate, load_response_template

from rapid_integrations.prompts import ToolCall
from rapid_integrations.tools.formats import ToolFormat

_ID_CHARACTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9  # required by Mistral's templates
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_CALL_SEPARATOR = re.compile(r"[\s;,]*")
_PARSE_ERRORS = (ValueError, KeyError, TypeError, RecursionError)


@dataclass(frozen=True, slots=True)
class AnswerText:
    """A run of an answer's text, either for the user or the model's reasoning."""

    text: str
    kind: Literal["text", "reasoning"] = "text"


@dataclass(frozen=True, slots=True)
class InvalidToolCall:
    """A text that begins like a tool call but is not valid.

    Attributes:
        text: The text that the model wrote, including its opening markup.
        error: The reason why it is not valid.
    """

    text: str
    error: str


AnswerPart = AnswerText | ToolCall | InvalidToolCall


class AnswerParser:
    """Takes the text of an answer and returns its parts; tool calls do not depend on how the text is split.

    Args:
        tool_format: The format of the model.
        start: The beginning of a forced call, which is part of the prompt and not of the answer.
        tools: The definitions of the tools. Their schemas determine the types of arguments in formats without
            types.
    """

    def __init__(
        self, tool_format: ToolFormat, *, start: str = "", tools: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._template = _load(tool_format)
        self._tools: list[Any] = [dict(tool) for tool in tools]
        self._parser = ResponseParser(self._template, prefix=tool_format.generation_prompt, tools=self._tools)
        self._start = start
        self._field: str | None = None  # the name of the open field
        for event in self._parser.initial_events:
            self._field = event["field"] if event["type"] != "region_close" else None
        self._raw_call = ""  # the opening markup and the text of the open call
        self._pending = ""  # text that the parser has read, but not yet assigned to a field
        self._after_markup = False
        # Whitespace after a call, dropped unless text follows. None before the first call and after text.
        self._space_after_call: str | None = None

    def feed(self, text: str) -> list[AnswerPart]:
        """Take the next text of the answer and return the parts that it completes."""
        remaining, self._start = self._start + text, ""
        parts: list[AnswerPart] = []
        while remaining:
            # By single characters: if the parser fails, the text before the character is already returned.
            character, remaining = remaining[0], remaining[1:]
            self._pending += character
            try:
                events = self._parser.feed(character)
            except _PARSE_ERRORS as error:
                remaining = self._recover(error, parts) + remaining
            else:
                self._apply(events, parts)
        return _merged(parts)

    def flush(self) -> list[AnswerPart]:
        """Return the parts that the end of the answer completes. No text may be fed after it."""
        parts = self.feed("")
        try:
            _, events = self._parser.finalize()
        except _PARSE_ERRORS as error:
            if rest := self._recover(error, parts):
                return _merged([*parts, *self.feed(rest), *self.flush()])
        else:
            self._apply(events, parts)
        return _merged(parts)

    def _apply(self, events: Sequence[Mapping[str, Any]], parts: list[AnswerPart]) -> None:
        for event in events:
            match event["type"]:
                case "region_open":
                    self._field, self._raw_call, self._after_markup = event["field"], "", True
                case "region_chunk":
                    self._add(event["text"], parts)
                case "region_close":
                    if event["field"] == "tool_calls":
                        parts += _calls_of(event["value"], self._raw_call or self._pending.strip())
                        self._space_after_call = ""
                        after = self._after_close(self._pending)
                        self._pending = self._pending if after is None else after
                    self._field, self._after_markup = None, True

    def _add(self, text: str, parts: list[AnswerPart]) -> None:
        # No event contains the markup: it is the pending text before the first text of a field.
        start = self._pending.rfind(text) if self._after_markup else 0
        markup, self._pending = self._pending[:start], self._pending[start + len(text) :]
        self._after_markup = False
        if self._field == "tool_calls":
            self._raw_call += markup.lstrip() + text
        elif self._field in _REASONING_FIELDS:
            parts.append(AnswerText(text, "reasoning"))
        elif self._space_after_call is None:
            parts.append(AnswerText(text))
        else:
            self._space_after_call += text
            if self._space_after_call.strip():
                parts.append(AnswerText(self._space_after_call))
                self._space_after_call = None

    def _after_close(self, text: str) -> str | None:
        """Return the part of ``text`` after the closing markup of a call, or ``None`` if it has none."""
        close = self._template.fields["tool_calls"].close_re
        match = close.search(text) if close is not None else None
        return text[match.end() :] if match else None

    def _recover(self, error: Exception, parts: list[AnswerPart]) -> str:
        """Turn the text that the parser failed on into an invalid call or plain text, and start a new parser.

        Returns:
            The pending text after the call, to be fed again.
        """
        rest = ""
        if self._field == "tool_calls":
            rest = self._after_close(self._pending) or ""
            if not self._raw_call and rest == self._pending:
                rest = ""  # a close of no width before any text of the call would be parsed forever
            written = self._raw_call + self._pending[: len(self._pending) - len(rest)]
            parts.append(InvalidToolCall(written.strip(), str(error)))
            self._space_after_call = ""
        elif self._pending:
            parts.append(AnswerText(self._pending))
        self._parser = ResponseParser(self._template, prefix="", tools=self._tools)
        self._field, self._raw_call, self._pending, self._after_markup = None, "", "", False
        return rest


def parse_answer(
    text: str, tool_format: ToolFormat, *, start: str = "", tools: Sequence[Mapping[str, Any]] = ()
) -> list[AnswerPart]:
    """Parse a complete answer; the arguments are those of :class:`AnswerParser`."""
    parser = AnswerParser(tool_format, start=start, tools=tools)
    return _merged([*parser.feed(text), *parser.flush()])


def new_call_id() -> str:
    """Return a random id for a call whose format has none."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))


def _load(tool_format: ToolFormat) -> ResponseTemplate:
    template = load_response_template(dict(tool_format.response_template))
    if template.implicit is None:
        # Without an implicit field, transformers drops text outside all fields.
        fields = {**tool_format.response_template["fields"], "rest": {}}
        template = load_response_template({**tool_format.response_template, "fields": fields})
    # A missing required field would make the parser fail for the whole answer.
    return replace(
        template, fields={name: replace(field, optional=True) for name, field in template.fields.items()}
    )


def _merged(parts: Sequence[AnswerPart]) -> list[AnswerPart]:
    merged: list[AnswerPart] = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, AnswerText) and isinstance(last, AnswerText) and part.kind == last.kind:
            merged[-1] = AnswerText(last.text + part.text, part.kind)
        else:
            merged.append(part)
    return merged


def _raise_for_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_raise_for_constant)


def _calls_of(value: Any, raw: str) -> list[AnswerPart]:
    """Decode the calls in the field ``tool_calls``.

    Args:
        value: The field's value: its text, or objects if the response template has a parser for it.
        raw: The text of the field with its opening markup, for error messages.
    """
    if not isinstance(value, str):
        return [call_of(item) for item in (value if isinstance(value, list) else [value])]
    calls: list[AnswerPart] = []
    position = _skip_separator(value, 0)
    while position < len(value):
        try:
            decoded, end = _DECODER.raw_decode(value, position)
        except (ValueError, RecursionError) as error:
            if calls and value[position] not in "{[":
                return [*calls, AnswerText(value[position:])]
            rest = value[position:] if calls else raw
            return [*calls, InvalidToolCall(rest.strip(), f"not JSON: {error}")]
        calls += [call_of(item) for item in (decoded if isinstance(decoded, list) else [decoded])]
        position = _skip_separator(value, end)
    return calls or [InvalidToolCall(raw.strip(), "it is empty")]


def _skip_separator(text: str, position: int) -> int:
    separator = _CALL_SEPARATOR.match(text, position)
    return separator.end() if separator else position


def call_of(item: Any) -> ToolCall | InvalidToolCall:
    """Convert a JSON object, written by a model or passed by a host, to a call.

    Args:
        item: ``{"name": …, "arguments": …}``, ``"parameters"`` instead of ``"arguments"``, or OpenAI's
            ``{"function": {…}}``. Arguments may be encoded as a JSON string.
    """
    function = item.get("function") if isinstance(item, Mapping) else None
    call = function if isinstance(function, Mapping) else item
    if not isinstance(call, Mapping):
        return _invalid(item, "it is not an object")
    name = call.get("name")
    if not isinstance(name, str) or not name:
        return _invalid(item, "it names no tool")
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = _DECODER.decode(arguments)
        except (ValueError, RecursionError) as error:
            return _invalid(item, f"its arguments are not JSON: {error}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        return _invalid(item, "its arguments are not an object")
    call_id = item.get("id") if isinstance(item.get("id"), str) else None
    return ToolCall(name, dict(arguments), call_id or new_call_id())


def _invalid(item: Any, error: str) -> InvalidToolCall:
    return InvalidToolCall(json.dumps(item, ensure_ascii=False), error)
