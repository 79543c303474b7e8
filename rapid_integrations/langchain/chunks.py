"""The pipeline's events as LangChain's message chunks, including tool calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from rapid_integrations.events import Completion, TextEvent
from rapid_integrations.langchain.messages import invalid_arguments
from rapid_integrations.prompts import ToolCall
from rapid_integrations.tools.parsing import AnswerPart, AnswerText, InvalidToolCall, new_call_id
from rapid_integrations.tools.use import AnswerReader


class ChatAnswer:
    """Turns the events of one answer into chunks. A complete tool call is one chunk.

    Args:
        reader: Finds tool calls in the text.
        info: Returns the ``generation_info`` of the last chunk.
    """

    def __init__(self, reader: AnswerReader, info: Callable[[Completion], dict[str, Any]]) -> None:
        self._reader = reader
        self._info = info
        self._num_calls = 0  # valid and invalid ones
        self._has_valid_call = False
        self._errors: list[str] = []

    def take(self, event: TextEvent) -> Iterator[ChatGenerationChunk]:
        """The chunks that an event completes."""
        yield from map(self._part_chunk, self._reader.take(event))
        if isinstance(event, Completion):
            yield self._last_chunk(event)

    def result(self, chunks: Sequence[ChatGenerationChunk]) -> ChatResult:
        """All chunks as one message. Unlike chunks, it holds the errors of invalid calls."""
        whole = chunks[0] if len(chunks) == 1 else chunks[0] + list(chunks[1:])
        chunk = whole.message
        assert isinstance(chunk, AIMessageChunk)
        invalid = [
            {**call, "error": error}
            for call, error in zip(chunk.invalid_tool_calls, self._errors, strict=True)
        ]
        message = AIMessage(
            content=chunk.content,
            additional_kwargs=chunk.additional_kwargs,
            tool_calls=chunk.tool_calls,
            invalid_tool_calls=invalid,
            usage_metadata=chunk.usage_metadata,
        )
        return ChatResult(
            generations=[ChatGeneration(message=message, generation_info=whole.generation_info)]
        )

    def _part_chunk(self, part: AnswerPart) -> ChatGenerationChunk:
        match part:
            case AnswerText(text=text, kind="reasoning"):
                message = AIMessageChunk(content="", additional_kwargs={"reasoning_content": text})
            case AnswerText(text=text):
                message = AIMessageChunk(content=text)
            case ToolCall():
                self._has_valid_call = True
                arguments = json.dumps(part.arguments, ensure_ascii=False)
                message = self._call_chunk(part.name, arguments, part.id or new_call_id())
            case InvalidToolCall():
                self._errors.append(part.error)
                message = self._call_chunk(None, invalid_arguments(part.text), new_call_id())
        return ChatGenerationChunk(message=message)

    def _call_chunk(self, name: str | None, arguments: str, call_id: str) -> AIMessageChunk:
        chunk = tool_call_chunk(name=name, args=arguments, id=call_id, index=self._num_calls)
        self._num_calls += 1
        return AIMessageChunk(content="", tool_call_chunks=[chunk])

    def _last_chunk(self, completion: Completion) -> ChatGenerationChunk:
        info, stats = self._info(completion), completion.stats
        if self._has_valid_call and completion.finish_reason == "stop":
            info["finish_reason"] = "tool_calls"
        usage = UsageMetadata(
            input_tokens=stats.prompt_tokens,
            output_tokens=stats.completion_tokens,
            total_tokens=stats.prompt_tokens + stats.completion_tokens,
            input_token_details=InputTokenDetails(cache_read=stats.reused_prefix_tokens),
        )
        return ChatGenerationChunk(
            message=AIMessageChunk(content="", usage_metadata=usage, chunk_position="last"),
            generation_info=info,
        )
