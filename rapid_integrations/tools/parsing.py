"""Parsing answers: tool calls, text and reasoning, from a whole answer or from a stream. No text is lost."""

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
_ID_LENGTH = 9  # Mistral's templates require nine
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_BETWEEN_CALLS = re.compile(r"[\s;,]*")
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
    """Splits the text of an answer into parts. The division of the text into calls affects only text pieces.

    Args:
        tool_format: The model's format.
        start: The beginning of the answer that was written for the model; it is part of a tool call.
        tools: The tools that may be called. Their schemas give the types of arguments if the format has none.
    """

    def __init__(
        self, tool_format: ToolFormat, *, start: str = "", tools: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._template = _load(tool_format)
        self._tools: list[Any] = [dict(tool) for tool in tools]
        self._parser = ResponseParser(self._template, prefix=tool_format.generation_prompt, tools=self._tools)
        self._start = start
        self._field: str | None = None  # the one that is open
        for event in self._parser.initial_events:
            self._field = event["field"] if event["type"] != "region_close" else None
        self._raw = ""  # opening markup and text of the current call
        self._read = ""  # text that was parsed but does not belong to a field yet
        self._after_markup = False
        self._held: str | None = None  # whitespace after a call; None after other text

    def feed(self, text: str) -> list[AnswerPart]:
        """The parts that ``text`` completes. Text without markup is returned at once."""
        waiting, self._start = self._start + text, ""
        parts: list[AnswerPart] = []
        while waiting:
            # One character at a time, so that the text before a failure of the parser is known.
            character, waiting = waiting[0], waiting[1:]
            self._read += character
            try:
                events = self._parser.feed(character)
            except _PARSE_ERRORS as error:
                waiting = self._give_up(error, parts) + waiting
            else:
                self._take(events, parts)
        return _merged(parts)

    def flush(self) -> list[AnswerPart]:
        """The parts that the end of the answer completes. No text may be added afterwards."""
        parts = self.feed("")
        try:
            _, events = self._parser.finalize()
        except _PARSE_ERRORS as error:
            if rest := self._give_up(error, parts):
                return _merged([*parts, *self.feed(rest), *self.flush()])
        else:
            self._take(events, parts)
        return _merged(parts)

    def _take(self, events: Sequence[Mapping[str, Any]], parts: list[AnswerPart]) -> None:
        for event in events:
            match event["type"]:
                case "region_open":
                    self._field, self._raw, self._after_markup = event["field"], "", True
                case "region_chunk":
                    self._add(event["text"], parts)
                case "region_close":
                    if event["field"] == "tool_calls":
                        parts += _calls_of(event["value"], self._raw or self._read.strip())
                        self._held = ""
                        self._read = self._after_close(self._read)
                    self._field, self._after_markup = None, True

    def _add(self, text: str, parts: list[AnswerPart]) -> None:
        # Events do not contain markup. It precedes the first text of a field, which is the newest.
        start = self._read.rfind(text) if self._after_markup else 0
        markup, self._read = self._read[:start], self._read[start + len(text) :]
        self._after_markup = False
        if self._field == "tool_calls":
            self._raw += markup.lstrip() + text
        elif self._field in _REASONING_FIELDS:
            parts.append(AnswerText(text, "reasoning"))
        elif self._held is None:
            parts.append(AnswerText(text))
        else:
            self._held += text
            if self._held.strip():
                parts.append(AnswerText(self._held))
                self._held = None

    def _after_close(self, text: str) -> str:
        """The part of ``text`` after the closing markup of a call."""
        close = self._template.fields["tool_calls"].close_re
        found = close.search(text) if close is not None else None
        return text[found.end() :] if found else text

    def _give_up(self, error: Exception, parts: list[AnswerPart]) -> str:
        """Turn the text on which the parser failed into an invalid call or text; returns the unread rest."""
        rest = ""
        if self._field == "tool_calls":
            after = self._after_close(self._read)
            rest = after if after != self._read else ""
            written = self._raw + self._read[: len(self._read) - len(rest)]
            parts.append(InvalidToolCall(written.strip(), str(error)))
            self._held = ""
        elif self._read:
            parts.append(AnswerText(self._read))
        self._parser = ResponseParser(self._template, prefix="", tools=self._tools)
        self._field, self._raw, self._read, self._after_markup = None, "", "", False
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
    """The calls in the value of a field; ``raw`` is the field's text with its markup."""
    if not isinstance(value, str):
        return [call_of(item) for item in (value if isinstance(value, list) else [value])]
    calls: list[AnswerPart] = []
    at = _skip(value, 0)
    while at < len(value):
        try:
            decoded, end = _DECODER.raw_decode(value, at)
        except (ValueError, RecursionError) as error:
            if calls and value[at] not in "{[":
                return [*calls, AnswerText(value[at:])]
            rest = value[at:] if calls else raw
            return [*calls, InvalidToolCall(rest.strip(), f"not JSON: {error}")]
        calls += [call_of(item) for item in (decoded if isinstance(decoded, list) else [decoded])]
        at = _skip(value, end)
    return calls or [InvalidToolCall(raw.strip(), "it is empty")]


def _skip(text: str, at: int) -> int:
    between = _BETWEEN_CALLS.match(text, at)
    return between.end() if between else at


def call_of(item: Any) -> ToolCall | InvalidToolCall:
    """The tool call in an object of a model or a host, either flat or in OpenAI's format."""
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
    given = item.get("id") if isinstance(item.get("id"), str) else None
    return ToolCall(name, dict(arguments), given or new_call_id())


def _invalid(item: Any, error: str) -> InvalidToolCall:
    return InvalidToolCall(json.dumps(item, ensure_ascii=False), error)
