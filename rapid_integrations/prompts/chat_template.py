"""Chat template rendering that keeps the template's own text apart from the texts of the prompt.

:func:`render` renders the template twice. The first rendering has a random placeholder for each untrusted
text (messages, strings of tool calls and of tool definitions), so that all other text is the template's own.
The second has the texts themselves and shows the form that the template gives each of them: unchanged,
trimmed, or escaped as part of JSON.
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

# Templates read these words, so they are not replaced. All other strings of a definition are untrusted.
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
    """Render the chat template into trusted pieces (its own text) and untrusted ones (the given texts).

    Raises:
        PromptError: The template refuses the messages, omits one, or does not support tools.
    """
    plain_tools = [_plain(tool) for tool in tools]
    chat = [_chat_message(message) for message in messages]
    attempts = [chat]
    if any(message["role"] == "system" for message in chat):
        attempts.append(_fold_system(chat))
    reason: object = None
    for attempt in attempts:
        try:
            pieces = _render_pieces(attempt, plain_tools, tokenizer)
        except Exception as error:  # a template may raise any error
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
            f"a tool's definition is not JSON ({error}): give names, texts and numbers."
        ) from None


def _chat_message(message: Message) -> dict[str, Any]:
    """The message as a dictionary for the template. Ids become nine letters or digits, which all allow."""
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
    """Move the system messages to the beginning of the first user message."""
    system = "\n\n".join(m["content"] for m in chat if m["role"] == "system" and m["content"].strip())
    rest = [message for message in chat if message["role"] != "system"]
    at = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if at is None:
        return [{"role": "user", "content": system}, *rest]
    content = rest[at]["content"]
    rest[at] = {**rest[at], "content": f"{system}\n\n{content}" if system else content}
    return rest


class _Placeholders:
    """Replaces texts by placeholders.

    Placeholders are random, so that a document cannot contain one. They consist of digits, so that a template
    that changes case does not alter them and JSON does not escape them.

    Attributes:
        texts: The texts by placeholder.
        needed: The placeholders that the template must not omit, each with the error message if it does.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.needed: dict[str, str] = {}

    def draw(self, text: str, if_missing: str = "") -> str:
        """A placeholder for a text."""
        return self.draw_all([text], if_missing)[text]

    def draw_all(self, texts: Sequence[str], if_missing: str = "") -> dict[str, str]:
        """A placeholder for each text that is not only whitespace.

        Placeholders sort in the order of their texts, because some templates sort names.
        """
        drawn = {text: text for text in texts}
        visible = sorted(text for text in drawn if text.strip())
        numbers: set[int] = set()
        while len(numbers) < len(visible):
            numbers.add(10**39 + secrets.randbelow(9 * 10**39))
        for text, number in zip(visible, sorted(numbers), strict=True):
            drawn[text] = str(number)
            self.texts[drawn[text]] = text
            if if_missing:
                self.needed[drawn[text]] = if_missing
        return drawn

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A chat message with placeholders for its texts."""
        # Some templates omit text beside a tool call, which models of their families do not write.
        if_missing = "" if "tool_calls" in message else "it omits a message"
        substituted = dict(message, content=self.draw(message["content"], if_missing))
        if "name" in message:
            substituted["name"] = self.draw(message["name"])
        if "tool_calls" in message:
            substituted["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return substituted

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        if_missing = "it omits a tool call"
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        drawn = self.draw_all(_collect(_substitute, arguments), if_missing)
        return {
            **call,
            "function": {
                "name": self.draw(name, if_missing),
                "arguments": _substitute(arguments, drawn.__getitem__),
            },
        }

    def tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """A tool's definition with placeholders. Equal texts get one placeholder: templates compare names."""
        drawn = self.draw_all(_collect(_substitute_schema, tool))
        substituted: dict[str, Any] = _substitute_schema(tool, drawn.__getitem__)
        function = substituted.get("function", substituted)
        if isinstance(function, dict) and (name := function.get("name")) in self.texts:
            self.needed[name] = "it takes no tools"
        return substituted


def _collect(substitute: Callable[[Any, Callable[[str], str]], Any], value: Any) -> list[str]:
    """The texts that ``substitute`` replaces in ``value``."""
    texts: list[str] = []

    def note(text: str) -> str:
        texts.append(text)
        return text

    substitute(value, note)
    return texts


def _substitute(value: Any, draw: Callable[[str], str]) -> Any:
    """``value`` with placeholders for all strings, including keys."""
    if isinstance(value, str):
        return draw(value)
    if isinstance(value, dict):
        return {draw(key): _substitute(item, draw) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, draw) for item in value]
    return value


def _substitute_schema(value: Any, draw: Callable[[str], str], *, names: bool = False) -> Any:
    """A tool's definition with placeholders for all strings except the words of JSON Schema.

    Args:
        value: The definition, or a part of it.
        draw: Returns the placeholder of a text.
        names: Whether the keys of ``value`` are names of properties, which are replaced too.
    """
    if isinstance(value, list):
        return [_substitute_schema(item, draw) for item in value]
    if not isinstance(value, dict):
        return draw(value) if isinstance(value, str) else value
    substituted = {}
    for key, item in value.items():
        if names or key not in _SCHEMA_WORDS:
            substituted[draw(key)] = _substitute_schema(item, draw)
        elif key == "type" and _is_type(item):
            substituted[key] = item
        elif key in _PLAIN_VALUES:
            substituted[key] = _substitute(item, draw)
        else:
            substituted[key] = _substitute_schema(item, draw, names=key in _MAPS_OF_SCHEMAS)
    return substituted


def _is_type(value: Any) -> bool:
    return all(
        isinstance(v, str) and v in _TYPE_WORDS for v in (value if isinstance(value, list) else [value])
    )


def _render_pieces(
    chat: Sequence[Mapping[str, Any]], tools: Sequence[Any], tokenizer: PreTrainedTokenizerBase
) -> list[Piece] | str:
    """Render the template once with placeholders and once with the texts.

    Returns:
        The pieces, or an error message if the template omits a placeholder that it must not omit.
    """

    def rendered_with(messages: Sequence[Mapping[str, Any]], given_tools: Sequence[Any]) -> str:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(given_tools) or None,
            tokenize=False,
            add_generation_prompt=True,
        )
        return str(text)

    placeholders = _Placeholders()
    rendered = rendered_with(
        [placeholders.message(message) for message in chat], [placeholders.tool(tool) for tool in tools]
    )
    for placeholder, if_missing in placeholders.needed.items():
        if placeholder not in rendered:
            return if_missing
    texts = placeholders.texts
    split = re.split(f"({'|'.join(texts)})", rendered) if texts else [rendered]
    scaffolds, order = split[::2], [texts[placeholder] for placeholder in split[1::2]]
    forms = _forms_in(rendered_with(chat, tools), scaffolds, order)
    pieces: list[Piece] = [(scaffolds[0], True)]
    for text, scaffold in zip(forms, scaffolds[1:], strict=True):
        pieces += [(text, False), (scaffold, True)]
    return pieces


def _forms_in(rendered: str, scaffolds: list[str], texts: list[str]) -> list[str]:
    """The texts in the form that they have in ``rendered``: unchanged, trimmed, or escaped as JSON.

    If the template changes texts in another way, they are returned unchanged, except that texts between
    quotes are escaped.

    Args:
        rendered: The template's output with the texts.
        scaffolds: The template's own text before, between and after the texts.
        texts: The texts in the order of their occurrence.
    """
    unaligned = [
        _escaped(text) if before.endswith('"') and after.startswith('"') else text
        for text, before, after in zip(texts, scaffolds, scaffolds[1:], strict=False)
    ]
    if not rendered.startswith(scaffolds[0]):
        return unaligned
    at = len(scaffolds[0])
    forms = []
    for text, scaffold in zip(texts, scaffolds[1:], strict=True):
        for form in _forms(text):
            if rendered.startswith(form, at) and rendered.startswith(scaffold, at + len(form)):
                forms.append(form)
                at += len(form) + len(scaffold)
                break
        else:
            return unaligned
    return forms if at == len(rendered) else unaligned


def _forms(text: str) -> Iterator[str]:
    # A generator, because a document is long and nearly always unchanged.
    plain = dict.fromkeys((text, text.strip(), text.rstrip(), text.lstrip()))
    yield from plain
    for form in plain:
        yield _escaped(form)
        yield _escaped(_escaped(form))
        yield json.dumps(form)[1:-1]


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
