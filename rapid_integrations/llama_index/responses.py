"""The pipeline's events as LlamaIndex's responses, including tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
    TextBlock,
    ThinkingBlock,
)

from rapid_integrations.events import Completion, TextDelta, TextEvent
from rapid_integrations.hosts.base import usage
from rapid_integrations.llama_index.messages import CALLS, call_blocks
from rapid_integrations.prompts import ToolCall
from rapid_integrations.tools.parsing import AnswerPart, AnswerText, InvalidToolCall
from rapid_integrations.tools.use import AnswerReader

if TYPE_CHECKING:
    from llama_index.core.base.llms.types import ContentBlock

INVALID_CALLS, SURPLUS_CALLS = "invalid_tool_calls", "surplus_tool_calls"


class CompletionAnswer:
    """Turns the events of one completion into responses.

    Args:
        model_name: The model name in the last response.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._text = ""

    def take(self, event: TextEvent) -> Iterator[CompletionResponse]:
        """The responses of an event. The last one has an empty delta and the usage."""
        match event:
            case TextDelta(text=delta):
                self._text += delta
                yield CompletionResponse(text=self._text, delta=delta)
            case Completion():
                response = self.whole(event)
                response.delta = ""
                yield response

    def whole(self, completion: Completion) -> CompletionResponse:
        """The answer in one piece."""
        raw, kwargs = _outcome(completion, completion.finish_reason, self._model_name)
        return CompletionResponse(text=completion.text, raw=raw, additional_kwargs=kwargs)


class ChatAnswer:
    """Turns the events of one chat answer into responses. They contain complete tool calls only.

    The text of an invalid call stays in the answer's text. The last response's ``additional_kwargs`` give its
    error (``invalid_tool_calls``), and the calls that were left out of a message with at most one call
    (``surplus_tool_calls``).

    Args:
        reader: Finds tool calls in the text.
        model_name: The model name in the last response.
        parallel: Whether the message may have several calls.
    """

    def __init__(self, reader: AnswerReader, model_name: str, *, parallel: bool) -> None:
        self._reader = reader
        self._model_name = model_name
        self._parallel = parallel
        self._text = self._thinking = ""
        self._calls: list[ToolCall] = []
        self._surplus: list[ToolCall] = []
        self._invalid: list[InvalidToolCall] = []

    def take(self, event: TextEvent) -> Iterator[ChatResponse]:
        """The responses of an event. The last one has an empty delta and the usage."""
        if parts := self._reader.take(event):
            text, thinking = len(self._text), len(self._thinking)
            self._add(parts)
            thought = self._thinking[thinking:]
            yield ChatResponse(
                message=self._message(),
                delta=self._text[text:],
                additional_kwargs={"thinking_delta": thought} if thought else {},
            )
        if isinstance(event, Completion):
            yield self._last(event)

    def whole(self, completion: Completion) -> ChatResponse:
        """The answer in one piece."""
        for event in (TextDelta(completion.text, completion.stats.completion_tokens), completion):
            self._add(self._reader.take(event))
        last = self._last(completion)
        last.delta = None
        return last

    def _add(self, parts: list[AnswerPart]) -> None:
        for part in parts:
            match part:
                case AnswerText(kind="reasoning"):
                    self._thinking += part.text
                case AnswerText():
                    self._text += part.text
                case ToolCall():
                    (self._calls if self._parallel or not self._calls else self._surplus).append(part)
                case InvalidToolCall():
                    self._invalid.append(part)
                    apart = "\n" if self._text and not self._text[-1].isspace() else ""
                    self._text += apart + part.text

    def _last(self, completion: Completion) -> ChatResponse:
        called = self._calls and completion.finish_reason == "stop"
        reason = "tool_calls" if called else completion.finish_reason
        raw, kwargs = _outcome(completion, reason, self._model_name)
        if self._invalid:
            kwargs[INVALID_CALLS] = [{"text": call.text, "error": call.error} for call in self._invalid]
        if self._surplus:
            kwargs[SURPLUS_CALLS] = list(map(_openai, self._surplus))
        return ChatResponse(message=self._message(), delta="", raw=raw, additional_kwargs=kwargs)

    def _message(self) -> ChatMessage:
        blocks: list[ContentBlock] = [ThinkingBlock(content=self._thinking)] if self._thinking else []
        if self._text or not self._calls:
            blocks.append(TextBlock(text=self._text))
        # Usage is not part of the message: LlamaIndex writes a message's additional_kwargs into later
        # prompts. The calls are, because its structured streams and memories look for them there.
        kwargs = {CALLS: list(map(_openai, self._calls))} if self._calls else {}
        return ChatMessage(
            role=MessageRole.ASSISTANT, blocks=[*blocks, *call_blocks(self._calls)], additional_kwargs=kwargs
        )


def _openai(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _outcome(
    completion: Completion, finish_reason: str, model_name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The finish reason and the statistics for a response's ``raw`` and ``additional_kwargs``."""
    counts, stats = usage(completion), completion.stats.as_dict()
    raw = {"model": model_name, "finish_reason": finish_reason, "usage": counts, "rapid": stats}
    return raw, {**counts, "finish_reason": finish_reason, "rapid": stats}
