"""Render a chat template, and separate the template's own text from the texts that it was given.

The template is rendered twice: with placeholders for all untrusted texts, which shows the template's own
text, and with the texts themselves, which shows whether the template trims them or escapes them as part of
JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rapid_integrations.errors import PromptError
from rapid_integrations.prompts.placeholders import Placeholders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rapid_integrations.prompts.messages import Message

Piece = tuple[str, bool]
"""A text of the rendered prompt, and whether it is trusted: the template's own."""

_CALL_ID = re.compile(r"[A-Za-z0-9]{9}")


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[Piece]:
    """Render the chat template of ``tokenizer``.

    If the template refuses the messages, it is rendered again with the system messages in front of the first
    user message.

    Args:
        messages: The conversation.
        tokenizer: A tokenizer with a chat template.
        tools: The definitions of the tools that the model may call.

    Returns:
        The pieces of the prompt in order; joined, they are its text.

    Raises:
        PromptError: The template refuses the messages, omits one, or does not support tools.
    """
    json_tools = [_to_json(tool) for tool in tools]
    chat = [_chat_message(message) for message in messages]
    attempts = [chat]
    if any(message["role"] == "system" for message in chat):
        attempts.append(_fold_system(chat))
    reason: object = None
    for attempt in attempts:
        try:
            pieces = _render_pieces(attempt, json_tools, tokenizer)
        except Exception as error:  # templates may raise any type
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


def _to_json(value: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(
            f"a tool definition or a tool call is not JSON ({error}): use strings, numbers, lists and dicts."
        ) from None


def _chat_message(message: Message) -> dict[str, Any]:
    """Convert a message to the format of chat templates."""
    chat: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        chat["tool_calls"] = [
            {
                "type": "function",
                "id": _short_id(call.id),
                "function": {"name": call.name, "arguments": _to_json(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        chat["tool_call_id"] = _short_id(message.tool_call_id)
    if message.name is not None:
        chat["name"] = message.name
    return chat


def _short_id(call_id: str | None) -> str:
    """Return an id of nine letters or digits, which Mistral's template requires and all others accept."""
    call_id = call_id or ""
    if _CALL_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def _fold_system(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the system messages in front of the first user message."""
    system = "\n\n".join(m["content"] for m in chat if m["role"] == "system" and m["content"].strip())
    rest = [message for message in chat if message["role"] != "system"]
    first_user = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if first_user is None:
        return [{"role": "user", "content": system}, *rest]
    content = rest[first_user]["content"]
    rest[first_user] = {**rest[first_user], "content": f"{system}\n\n{content}" if system else content}
    return rest


def _render_pieces(
    chat: Sequence[Mapping[str, Any]], tools: Sequence[Any], tokenizer: PreTrainedTokenizerBase
) -> list[Piece] | str:
    """Render with placeholders and put the texts back.

    Returns:
        The pieces, or a complaint if the template omits a required text.
    """

    def render_text(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> str:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=True,
        )
        return str(text)

    placeholders = Placeholders()
    rendered = render_text(
        [placeholders.in_message(message) for message in chat], [placeholders.in_tool(tool) for tool in tools]
    )
    for placeholder, complaint in placeholders.required.items():
        if placeholder not in rendered:
            return complaint
    texts = placeholders.texts
    split = re.split(f"({'|'.join(texts)})", rendered) if texts else [rendered]
    scaffolds, given_texts = split[::2], [texts[placeholder] for placeholder in split[1::2]]
    rendered_texts = _align(render_text(chat, tools), scaffolds, given_texts)
    pieces: list[Piece] = [(scaffolds[0], True)]
    for text, scaffold in zip(rendered_texts, scaffolds[1:], strict=True):
        pieces += [(text, False), (scaffold, True)]
    return pieces


def _align(rendered: str, scaffolds: list[str], texts: list[str]) -> list[str]:
    """Find the form that each text has in the rendered prompt: unchanged, trimmed, or escaped as JSON.

    Args:
        rendered: The prompt, rendered with the texts.
        scaffolds: The template's own text before, between and after the texts.
        texts: The texts in order, one fewer than ``scaffolds``.

    Returns:
        The texts in their rendered form. If the template changes a text in another way, all texts are
        unchanged, except those in quotes, which are escaped as JSON.
    """
    fallback = [
        _escaped(text) if before.endswith('"') and after.startswith('"') else text
        for text, before, after in zip(texts, scaffolds, scaffolds[1:], strict=False)
    ]
    if not rendered.startswith(scaffolds[0]):
        return fallback
    position = len(scaffolds[0])
    aligned = []
    for text, scaffold in zip(texts, scaffolds[1:], strict=True):
        for form in _forms(text):
            if rendered.startswith(form, position) and rendered.startswith(scaffold, position + len(form)):
                aligned.append(form)
                position += len(form) + len(scaffold)
                break
        else:
            return fallback
    return aligned if position == len(rendered) else fallback


def _forms(text: str) -> Iterator[str]:
    # A generator, because a document is long and its first form nearly always matches.
    plain = dict.fromkeys((text, text.strip(), text.rstrip(), text.lstrip()))
    yield from plain
    for form in plain:
        yield _escaped(form)
        yield _escaped(_escaped(form))
        yield json.dumps(form)[1:-1]


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
