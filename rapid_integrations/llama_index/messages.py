"""LlamaIndex's messages and tools as messages and tool definitions of a prompt, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt as plain_messages
from llama_index.core.base.llms.types import (
    ChatMessage,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.tools.types import BaseTool
from pydantic import BaseModel

from rapid_integrations.errors import ConfigurationError, PromptError
from rapid_integrations.hosts.call import describe_type
from rapid_integrations.hosts.prompt_text import PromptText
from rapid_integrations.prompts import Message, ToolCall
from rapid_integrations.tools.formats import CheckedTool
from rapid_integrations.tools.parsing import InvalidToolCall, call_of

if TYPE_CHECKING:
    from llama_index.core.base.llms.types import ContentBlock

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}
CALL_ID, CALLS, NAME = "tool_call_id", "tool_calls", "name"
"""Keys of a message's ``additional_kwargs`` under which LlamaIndex stores parts of tool calls."""


def keep_messages(messages: Sequence[ChatMessage]) -> PromptText:
    """Messages as text that keeps them; the pipeline applies the chat template."""
    return PromptText(plain_messages(messages), messages=prompt_messages(messages))


def keep_completion(prompt: str) -> PromptText:
    """A completion prompt as text to which the pipeline applies the chat template."""
    return prompt if isinstance(prompt, PromptText) else PromptText(prompt)


def prompt_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Messages with their tool calls and results, without thinking blocks.

    Raises:
        PromptError: A message contains something other than text, thinking and tool calls, or an invalid
            call.
    """
    return [_prompt_message(message) for message in messages]


def _prompt_message(message: ChatMessage) -> Message:
    role = _ROLES.get(message.role, message.role.value)
    allowed: tuple[type[Any], ...] = (TextBlock,)
    if role == "assistant":
        allowed = (TextBlock, ThinkingBlock, ToolCallBlock)
    if other := [block for block in message.blocks if not isinstance(block, allowed)]:
        raise PromptError(
            f"a {message.role.value} message holds a {type(other[0]).__name__}: RapidLLM takes text, and "
            "tool calls in the assistant's messages."
        )
    kwargs = message.additional_kwargs
    if role == "assistant":
        return Message.of(role, message.content or "", tool_calls=tuple(_calls(message)))
    if role == "tool":
        return Message.of(
            role, message.content or "", tool_call_id=kwargs.get(CALL_ID), name=kwargs.get(NAME)
        )
    return Message.of(role, message.content or "")


def _calls(message: ChatMessage) -> Iterable[ToolCall]:
    blocks: list[Any] = [
        {"id": block.tool_call_id, "name": block.tool_name, "arguments": block.tool_kwargs or {}}
        for block in message.blocks
        if isinstance(block, ToolCallBlock)
    ]
    # Messages of LLMs that do not use blocks have their calls in OpenAI's format only.
    for given in blocks or message.additional_kwargs.get(CALLS) or ():
        item = given.model_dump() if isinstance(given, BaseModel) else given
        call = call_of(item)
        if isinstance(call, InvalidToolCall):
            raise PromptError(f"a message holds an invalid tool call ({call.error}): {call.text}.")
        yield replace(call, id=item.get("id"))


def host_message(message: Message) -> ChatMessage:
    """A prompt's message as a LlamaIndex message."""
    blocks: list[ContentBlock] = [TextBlock(text=message.text)]
    blocks += call_blocks(message.tool_calls)
    known = {CALL_ID: message.tool_call_id, NAME: message.name}
    return ChatMessage(
        role=message.role,
        blocks=blocks,
        additional_kwargs={key: value for key, value in known.items() if value is not None},
    )


def call_blocks(calls: Iterable[ToolCall]) -> list[ToolCallBlock]:
    """Tool calls as blocks of a LlamaIndex message."""
    return [
        ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=dict(call.arguments))
        for call in calls
    ]


def tool_definitions(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """LlamaIndex's tools, or definitions, as definitions in OpenAI's format.

    Raises:
        ConfigurationError: An item is neither a tool nor a definition.
    """
    return [_definition(tool) for tool in tools]


def _definition(tool: Any) -> dict[str, Any]:
    if isinstance(tool, BaseTool):
        # LlamaIndex would change the name to one that OpenAI accepts; keep the tool's own name.
        described = {
            "name": tool.metadata.get_name(),
            "description": tool.metadata.description,
            "parameters": tool.metadata.get_parameters_dict(),
        }
        return CheckedTool(type="function", function=described)
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigurationError(
            f"a tool is {describe_type(tool)}: give a LlamaIndex tool (FunctionTool.from_defaults(function), "
            '…) or a definition ({"type": "function", "function": {"name": …, …}}).'
        )
    return CheckedTool(tool) if isinstance(tool, CheckedTool) else dict(tool)
