"""LangChain's messages and tools as messages and tool definitions of a prompt.

The text LLM takes ``(role, text)`` pairs, the chat model also tool calls and their results.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    ToolMessage,
    convert_to_messages,
)
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.json import parse_partial_json
from typing_extensions import is_typeddict

from rapid_integrations.errors import ConfigurationError, PromptError
from rapid_integrations.prompts import Message, ToolCall
from rapid_integrations.tools.formats import CheckedTool

_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "tool"}
# Content blocks that repeat the message's tool_calls.
_CALL_BLOCKS = frozenset(("tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call"))
# The model does not see its earlier reasoning again, as in the chat templates of reasoning models.
_REASONING_BLOCKS = frozenset(("reasoning", "thinking"))


def message_pairs(messages: Sequence[Any]) -> list[tuple[str, str]]:
    """Text messages as ``(role, text)`` pairs.

    Raises:
        PromptError: A message contains something other than text, or its type has no role in a prompt.
    """
    pairs = []
    for message in convert_to_messages(messages):
        if getattr(message, "tool_calls", None):
            raise PromptError(
                f"a {message.type} message holds tool calls: RapidLLM takes text messages only, ChatRapid "
                "also takes tool calls."
            )
        pairs.append((_role(message), _text(message)))
    return pairs


def chat_messages(messages: Sequence[BaseMessage]) -> list[Message]:
    """Messages with their tool calls and results.

    Invalid tool calls (``invalid_tool_calls``) become the text that the model wrote.

    Raises:
        PromptError: A message contains something other than text and tool calls, or its type has no role.
    """
    converted = []
    for message in messages:
        if isinstance(message, AIMessage):
            has_calls = bool(message.tool_calls or message.invalid_tool_calls)
            ignored = _REASONING_BLOCKS | _CALL_BLOCKS if has_calls else _REASONING_BLOCKS
            texts = [_text(message, ignored)]
            texts += [_text_of_invalid(call["args"] or "") for call in message.invalid_tool_calls]
            calls = tuple(ToolCall(call["name"], call["args"], call["id"]) for call in message.tool_calls)
            text = "\n".join(text for text in texts if text)
            converted.append(Message.of("assistant", text, tool_calls=calls))
        elif isinstance(message, ToolMessage):
            tool_name = message.name or None
            converted.append(
                Message.of("tool", _text(message), tool_call_id=message.tool_call_id, name=tool_name)
            )
        else:
            name = message.name if message.type == "function" else None
            converted.append(Message.of(_role(message), _text(message), name=name))
    return converted


def invalid_arguments(text: str) -> str:
    """The ``args`` of an invalid tool call for the text that the model wrote.

    That is the text itself; or the text as a JSON string, if LangChain would otherwise repair it into
    arguments, or if it is a JSON string already.
    """
    try:
        repaired = parse_partial_json(text) if text else {}
    except ValueError:
        return text
    return json.dumps(text, ensure_ascii=False) if isinstance(repaired, dict | str) else text


def _text_of_invalid(arguments: str) -> str:
    """The inverse of :func:`invalid_arguments`."""
    try:
        text = json.loads(arguments)
    except ValueError:
        return arguments
    return text if isinstance(text, str) else arguments


def _role(message: BaseMessage) -> str:
    role = message.role if isinstance(message, ChatMessage) else _ROLES.get(message.type)
    if role is None:
        raise PromptError(
            f"a message of type {message.type!r} has no role in a prompt: use one of "
            f"{', '.join(sorted(_ROLES))}, or ChatMessage with a role."
        )
    return role


def _text(message: BaseMessage, ignored: Collection[str] = ()) -> str:
    """The text of a message; blocks of the ``ignored`` types are left out."""
    for block in message.content if isinstance(message.content, list) else ():
        kind = "text" if isinstance(block, str) else block.get("type", "unknown")
        if kind != "text" and kind not in ignored:
            raise PromptError(
                f"a {message.type} message holds a block of type {kind!r}: these models take text messages "
                "only. Give the block's text, or leave it out."
            )
    return str(message.text)


def tool_definitions(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Tools in any of LangChain's forms as definitions in OpenAI's format.

    Raises:
        ConfigurationError: A tool is built into a provider's service.
    """
    definitions = [convert_to_openai_tool(tool) for tool in tools]
    for tool, definition in zip(tools, definitions, strict=True):
        if "function" not in definition:
            raise ConfigurationError(
                f"{tool!r} is a provider's own tool: give a function, a pydantic class, a BaseTool, or a "
                "dict with name, description and parameters."
            )
    return [
        CheckedTool(definition) if _is_checked(tool) else definition
        for tool, definition in zip(tools, definitions, strict=True)
    ]


def _is_checked(tool: Any) -> bool:
    """Whether pydantic validates the arguments: by the tool itself, or a class made of its signature."""
    if isinstance(tool, BaseTool):
        return not isinstance(tool.args_schema, dict)
    return isinstance(tool, CheckedTool) or (callable(tool) and not is_typeddict(tool))
