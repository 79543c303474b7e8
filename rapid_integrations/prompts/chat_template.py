"""A chat template's rendering, taken apart into the template's own text and the texts it was given.

The template is rendered with stand-ins for everything untrusted: the messages' texts, the strings of tool
calls and of tool definitions. Then the texts are put back, in the form that the template gives them: as they
are, trimmed, or escaped as part of JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rapid_integrations.errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rapid_integrations.prompts.messages import Message

Piece = tuple[str, bool]

# Templates ask for these, so they stand for themselves. Whatever else is in a definition is its author's.
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
_MAPS_OF_SCHEMAS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_PLAIN_VALUES = frozenset(("enum", "const", "default", "examples"))
_CALL_ID = re.compile(r"[A-Za-z0-9]{9}")


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[Piece]:
    """Render the chat template; its own text makes trusted pieces, what it was given untrusted ones.

    Raises:
        PromptError: The template refuses the messages, leaves one out, or takes no tools.
    """
    plain_tools = [_plain(tool) for tool in tools]
    chat = [_chat_message(message) for message in messages]
    reason: object = None
    for attempt in [chat, *([_fold_system(chat)] if any(m["role"] == "system" for m in chat) else [])]:
        try:
            pieces = _render_apart(attempt, plain_tools, tokenizer)
        except Exception as error:  # templates raise what they like
            reason = error
            continue
        if isinstance(pieces, list):
            return pieces
        reason = reason or pieces
    roles = ", ".join(message.role for message in messages)
    raise PromptError(
        f"the chat template of {tokenizer.name_or_path or 'the tokenizer'!r} refuses the messages "
        f"({roles}): {reason}. Change the messages, or pass chat_template=False."
    ) from (reason if isinstance(reason, Exception) else None)


def _plain(tool: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(tool))
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(
            f"a tool's definition is no JSON ({error}): give names, texts and numbers."
        ) from None


def _chat_message(message: Message) -> dict[str, Any]:
    """The message as templates take it. Ids become nine letters or digits, which every template takes."""
    chat: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        chat["tool_calls"] = [
            {
                "type": "function",
                "id": _plain_id(call.id),
                "function": {"name": call.name, "arguments": _plain(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        chat["tool_call_id"] = _plain_id(message.tool_call_id)
    if message.name is not None:
        chat["name"] = message.name
    return chat


def _plain_id(call_id: str | None) -> str:
    call_id = call_id or ""
    if _CALL_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def _fold_system(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = "\n\n".join(m["content"] for m in chat if m["role"] == "system" and m["content"].strip())
    rest = [message for message in chat if message["role"] != "system"]
    at = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if at is None:
        return [{"role": "user", "content": system}, *rest]
    content = rest[at]["content"]
    rest[at] = {**rest[at], "content": f"{system}\n\n{content}" if system else content}
    return rest


class _StandIns:
    """Draws stand-ins and remembers the texts they stand for.

    They are drawn anew each time, so no document can hold one, and are digits, so that no template's change
    of case alters them and JSON needs no escapes for them.

    Attributes:
        texts: Stand-in to text.
        needed: The stand-ins that the template must not leave out, and what it does if it does.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.needed: dict[str, str] = {}

    def draw(self, text: str, otherwise: str = "") -> str:
        """A stand-in for one text."""
        return self.draw_all([text], otherwise)[text]

    def draw_all(self, texts: Sequence[str], otherwise: str = "") -> dict[str, str]:
        """A stand-in for each text, in the same order when sorted: some templates sort names."""
        drawn = {text: text for text in texts}
        told = sorted(text for text in drawn if text.strip())
        numbers: set[int] = set()
        while len(numbers) < len(told):
            numbers.add(10**39 + secrets.randbelow(9 * 10**39))
        for text, number in zip(told, sorted(numbers), strict=True):
            drawn[text] = str(number)
            self.texts[drawn[text]] = text
            if otherwise:
                self.needed[drawn[text]] = otherwise
        return drawn

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A chat message with stand-ins."""
        # Some templates leave out what is said beside a call; models of their families say nothing there.
        otherwise = "" if "tool_calls" in message else "it leaves a message out"
        standing = dict(message, content=self.draw(message["content"], otherwise))
        if "name" in message:
            standing["name"] = self.draw(message["name"])
        if "tool_calls" in message:
            standing["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return standing

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        otherwise = "it leaves a tool call out"
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        drawn = self.draw_all(_collect(_replaced, arguments), otherwise)
        return {
            **call,
            "function": {
                "name": self.draw(name, otherwise),
                "arguments": _replaced(arguments, drawn.__getitem__),
            },
        }

    def tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """A tool's definition with stand-ins, one for equal texts: templates look names up in other lists."""
        drawn = self.draw_all(_collect(_schema, tool))
        standing: dict[str, Any] = _schema(tool, drawn.__getitem__)
        function = standing.get("function", standing)
        if isinstance(function, dict) and (name := function.get("name")) in self.texts:
            self.needed[name] = "it takes no tools"
        return standing


def _collect(replace: Callable[[Any, Callable[[str], str]], Any], value: Any) -> list[str]:
    """The texts that ``replace`` would replace in ``value``."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    replace(value, note)
    return found


def _replaced(value: Any, draw: Callable[[str], str]) -> Any:
    """``value`` with stand-ins for all its strings, keys included."""
    if isinstance(value, str):
        return draw(value)
    if isinstance(value, dict):
        return {draw(key): _replaced(item, draw) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, draw) for item in value]
    return value


def _schema(value: Any, draw: Callable[[str], str], *, names: bool = False) -> Any:
    """A tool's definition with stand-ins for all but the words of JSON Schema; ``names``: keys are names."""
    if isinstance(value, list):
        return [_schema(item, draw) for item in value]
    if not isinstance(value, dict):
        return draw(value) if isinstance(value, str) else value
    standing = {}
    for key, item in value.items():
        if names or key not in _SCHEMA_WORDS:
            standing[draw(key)] = _schema(item, draw)
        elif key == "type" and _is_type(item):
            standing[key] = item
        elif key in _PLAIN_VALUES:
            standing[key] = _replaced(item, draw)
        else:
            standing[key] = _schema(item, draw, names=key in _MAPS_OF_SCHEMAS)
    return standing


def _is_type(value: Any) -> bool:
    return all(
        isinstance(v, str) and v in _TYPE_WORDS for v in (value if isinstance(value, list) else [value])
    )


def _render_apart(
    chat: Sequence[Mapping[str, Any]], tools: Sequence[Any], tokenizer: PreTrainedTokenizerBase
) -> list[Piece] | str:
    """Render with stand-ins and put the texts back; what the template leaves out if it may not."""

    def rendered_with(messages: Sequence[Mapping[str, Any]], given_tools: Sequence[Any]) -> str:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(given_tools) or None,
            tokenize=False,
            add_generation_prompt=True,
        )
        return str(text)

    stand_ins = _StandIns()
    rendered = rendered_with(
        [stand_ins.message(message) for message in chat], [stand_ins.tool(tool) for tool in tools]
    )
    for stand_in, otherwise in stand_ins.needed.items():
        if stand_in not in rendered:
            return otherwise
    texts = stand_ins.texts
    split = re.split(f"({'|'.join(texts)})", rendered) if texts else [rendered]
    scaffolds, order = split[::2], [texts[stand_in] for stand_in in split[1::2]]
    filled = _as_the_template_has_them(rendered_with(chat, tools), scaffolds, order)
    pieces: list[Piece] = [(scaffolds[0], True)]
    for text, scaffold in zip(filled, scaffolds[1:], strict=True):
        pieces += [(text, False), (scaffold, True)]
    return pieces


def _as_the_template_has_them(rendered: str, scaffolds: list[str], texts: list[str]) -> list[str]:
    """The texts as they stand in the prompt rendered with them: trimmed, or escaped as JSON.

    A template that changes texts in another way gets them unchanged, but for those between quotes.
    """
    unaligned = [
        _escaped(text) if before.endswith('"') and after.startswith('"') else text
        for text, before, after in zip(texts, scaffolds, scaffolds[1:], strict=False)
    ]
    if not rendered.startswith(scaffolds[0]):
        return unaligned
    at = len(scaffolds[0])
    found = []
    for text, scaffold in zip(texts, scaffolds[1:], strict=True):
        for form in _forms(text):
            if rendered.startswith(form, at) and rendered.startswith(scaffold, at + len(form)):
                found.append(form)
                at += len(form) + len(scaffold)
                break
        else:
            return unaligned
    return found if at == len(rendered) else unaligned


def _forms(text: str) -> Iterator[str]:
    # One by one: a document is long, and nearly always stands as it is.
    plain = dict.fromkeys((text, text.strip(), text.rstrip(), text.lstrip()))
    yield from plain
    for form in plain:
        yield _escaped(form)
        yield _escaped(_escaped(form))
        yield json.dumps(form)[1:-1]


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
