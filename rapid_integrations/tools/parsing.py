"""Parsing of answers into text, reasoning and tool calls, from a whole answer or from a stream.

transformers' ``ResponseParser`` finds the fields of an answer by the format's response template. It raises an
error at a malformed call and discards text outside fields; :class:`AnswerParser` keeps both, as
:class:`InvalidToolCall` and as text.
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
_ID_LENGTH = 9  # the length that Mistral's chat templates require
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_SEPARATORS = re.compile(r"[\s;,]*")
_PARSE_ERRORS = (ValueError, KeyError, TypeError, RecursionError)


@dataclass(frozen=True, slots=True)
class AnswerText:
    """A piece of text of an answer."""

    text: str
    kind: Literal["text", "reasoning"] = "text"


@dataclass(frozen=True, slots=True)
class InvalidToolCall:
    """Text that begins as a tool call but is not a valid one.

    Attributes:
        text: The model's text, including the opening markup.
        error: The reason why it is invalid.
    """

    text: str
    error: str


AnswerPart = AnswerText | ToolCall | InvalidToolCall


class AnswerParser:
    """Splits an answer, which may arrive in pieces, into parts.

    The pieces in which an answer arrives change only how its text is divided, never its tool calls.

    Args:
        tool_format: The model's format.
        start: The beginning of a forced call, which is part of the prompt. It is parsed before the answer.
        tools: The tools that may be called. Their schemas give the types of arguments if the format has none.
    """

    def __init__(
        self, tool_format: ToolFormat, *, start: str = "", tools: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._template = _load(tool_format)
        self._tools: list[Any] = [dict(tool) for tool in tools]
        self._parser = ResponseParser(self._template, prefix=tool_format.generation_prompt, tools=self._tools)
        self._start = start
        self._field: str | None = None  # the open field
        for event in self._parser.initial_events:
            self._field = event["field"] if event["type"] != "region_close" else None
        self._call_text = ""  # the opening markup and the text of the current call
        self._unassigned = ""  # text that the parser received but has not assigned to a field yet
        self._after_markup = False
        self._text_after_call: str | None = None  # whitespace that follows a call; None after other text

    def feed(self, text: str) -> list[AnswerPart]:
        """The parts that ``text`` completes. Text without markup is returned at once."""
        waiting, self._start = self._start + text, ""
        parts: list[AnswerPart] = []
        while waiting:
            # One character at a time, so that the text before a failure of the parser is known.
            character, waiting = waiting[0], waiting[1:]
            self._unassigned += character
            try:
                events = self._parser.feed(character)
            except _PARSE_ERRORS as error:
                waiting = self._recover(error, parts) + waiting
            else:
                self._add_events(events, parts)
        return _merged(parts)

    def flush(self) -> list[AnswerPart]:
        """The parts that the end of the answer completes. No text may be added afterwards."""
        parts = self.feed("")
        try:
            _, events = self._parser.finalize()
        except _PARSE_ERRORS as error:
            if rest := self._recover(error, parts):
                return _merged([*parts, *self.feed(rest), *self.flush()])
        else:
            self._add_events(events, parts)
        return _merged(parts)

    def _add_events(self, events: Sequence[Mapping[str, Any]], parts: list[AnswerPart]) -> None:
        for event in events:
            match event["type"]:
                case "region_open":
                    self._field, self._call_text, self._after_markup = event["field"], "", True
                case "region_chunk":
                    self._add_text(event["text"], parts)
                case "region_close":
                    if event["field"] == "tool_calls":
                        parts += _calls_of(event["value"], self._call_text or self._unassigned.strip())
                        self._text_after_call = ""
                        after = self._after_close(self._unassigned)
                        self._unassigned = self._unassigned if after is None else after
                    self._field, self._after_markup = None, True

    def _add_text(self, text: str, parts: list[AnswerPart]) -> None:
        # Events do not contain markup. It precedes the first text of a field, which is the newest text.
        start = self._unassigned.rfind(text) if self._after_markup else 0
        markup, self._unassigned = self._unassigned[:start], self._unassigned[start + len(text) :]
        self._after_markup = False
        if self._field == "tool_calls":
            self._call_text += markup.lstrip() + text
        elif self._field in _REASONING_FIELDS:
            parts.append(AnswerText(text, "reasoning"))
        elif self._text_after_call is None:
            parts.append(AnswerText(text))
        else:
            self._text_after_call += text
            if self._text_after_call.strip():
                parts.append(AnswerText(self._text_after_call))
                self._text_after_call = None

    def _after_close(self, text: str) -> str | None:
        """The part of ``text`` after the closing markup of a call; ``None`` if it has none."""
        close = self._template.fields["tool_calls"].close_re
        match = close.search(text) if close is not None else None
        return text[match.end() :] if match else None

    def _recover(self, error: Exception, parts: list[AnswerPart]) -> str:
        """Make the text on which the parser failed an invalid call or plain text, and start a new parser.

        Returns:
            The text after a closed malformed call, which has to be parsed again.
        """
        rest = ""
        if self._field == "tool_calls":
            rest = self._after_close(self._unassigned) or ""
            if not self._call_text and rest == self._unassigned:
                rest = ""  # a close of no width before any text of the call would be parsed forever
            call = self._call_text + self._unassigned[: len(self._unassigned) - len(rest)]
            parts.append(InvalidToolCall(call.strip(), str(error)))
            self._text_after_call = ""
        elif self._unassigned:
            parts.append(AnswerText(self._unassigned))
        self._parser = ResponseParser(self._template, prefix="", tools=self._tools)
        self._field, self._call_text, self._unassigned, self._after_markup = None, "", "", False
        return rest


def parse_answer(
    text: str, tool_format: ToolFormat, *, start: str = "", tools: Sequence[Mapping[str, Any]] = ()
) -> list[AnswerPart]:
    """The parts of a complete answer; see :class:`AnswerParser`."""
    parser = AnswerParser(tool_format, start=start, tools=tools)
    return _merged([*parser.feed(text), *parser.flush()])


def new_call_id() -> str:
    """An id for a call, for formats without ids."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))


def _load(tool_format: ToolFormat) -> ResponseTemplate:
    template = load_response_template(dict(tool_format.response_template))
    if template.implicit is None:
        # Without this field, transformers would drop text outside all fields.
        fields = {**tool_format.response_template["fields"], "rest": {}}
        template = load_response_template({**tool_format.response_template, "fields": fields})
    # A missing field must not discard the rest of an answer.
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


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse_constant)


def _calls_of(value: Any, raw: str) -> list[AnswerPart]:
    """The calls in the value of a field.

    Args:
        value: Text with JSON, or the objects that the response template decoded.
        raw: The field's text with its markup, for calls that are invalid.
    """
    if not isinstance(value, str):
        return [call_of(item) for item in (value if isinstance(value, list) else [value])]
    calls: list[AnswerPart] = []
    at = _skip_separators(value, 0)
    while at < len(value):
        try:
            decoded, end = _DECODER.raw_decode(value, at)
        except (ValueError, RecursionError) as error:
            if calls and value[at] not in "{[":
                return [*calls, AnswerText(value[at:])]
            rest = value[at:] if calls else raw
            return [*calls, InvalidToolCall(rest.strip(), f"not JSON: {error}")]
        calls += [call_of(item) for item in (decoded if isinstance(decoded, list) else [decoded])]
        at = _skip_separators(value, end)
    return calls or [InvalidToolCall(raw.strip(), "it is empty")]


def _skip_separators(text: str, at: int) -> int:
    match = _SEPARATORS.match(text, at)
    return match.end() if match else at


def call_of(item: Any) -> ToolCall | InvalidToolCall:
    """The tool call in a decoded object: ``{"name", "arguments"}``, or OpenAI's ``{"function": {…}}``."""
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
