"""``LlamaIndexChat``: LlamaIndex's chat and function calling over the pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from typing import Any, cast

from llama_index.core.agent.react.formatter import ReActChatFormatter
from llama_index.core.agent.react.output_parser import ReActOutputParser
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    MessageRole,
    ToolCallBlock,
)
from llama_index.core.chat_engine.types import AgentChatResponse
from llama_index.core.llms.callbacks import llm_chat_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool

from rapid_integrations.errors import ConfigurationError, ToolCallError
from rapid_integrations.hosts.base import RapidBase
from rapid_integrations.hosts.call import Call
from rapid_integrations.hosts.prompt_text import PromptText
from rapid_integrations.llama_index.events import EventReporter
from rapid_integrations.llama_index.messages import keep_messages, tool_definitions
from rapid_integrations.llama_index.responses import INVALID_CALLS, ChatAnswer
from rapid_integrations.prompts import PromptParts
from rapid_integrations.tools.formats import supports_tools
from rapid_integrations.tools.use import AnswerReader, ToolUse

_TOOL_NAMES = ("tools", "tool_choice", "tool_format", "allow_parallel_tool_calls")


@dataclass(frozen=True, slots=True)
class _ChatPrompt:
    text: PromptText
    tool_use: ToolUse | None
    parallel: bool


class LlamaIndexChat(RapidBase, FunctionCallingLLM):
    """The methods of ``FunctionCallingLLM``.

    ``chat`` and its variants also take ``tools`` (LlamaIndex's tools or OpenAI's definitions) and
    ``tool_choice`` (``"auto"``, ``"none"``, ``"required"``, or a name); ``chat_with_tools`` passes them.
    """

    @property
    def takes_tools(self) -> bool:
        """Whether the model's chat template supports tools. Loads the model."""
        if self._own_prompts or not self.pipeline.chat_template:
            return False
        return supports_tools(self.pipeline.tokenizer, self.tool_format)

    @property
    def _own_prompts(self) -> bool:
        return self.messages_to_prompt not in (None, keep_messages)

    # Calls

    def _reporting_call(self, arguments: dict[str, Any], prompt: str = "") -> Call:
        """A call that reports its events to LlamaIndex's event handlers."""
        attached = prompt.arguments if isinstance(prompt, PromptText) else {}
        call = self._parse_call({**attached, **arguments})
        return replace(call, on_event=EventReporter(call.on_event))

    def _chat_request(
        self, messages: Sequence[ChatMessage], arguments: Mapping[str, Any]
    ) -> tuple[_ChatPrompt, Call]:
        """The prompt and the call that the arguments of a chat call describe."""
        tools, choice, tool_format, parallel = map(arguments.get, _TOOL_NAMES)
        call = self._reporting_call({k: value for k, value in arguments.items() if k not in _TOOL_NAMES})
        tool_use = ToolUse.parse(tool_definitions(tools or ()), choice, tool_format or self.tool_format)
        if tool_use is not None:
            if self._own_prompts:
                raise ConfigurationError(
                    "tools were given, but messages_to_prompt replaces the model's chat template, which "
                    "would describe them to the model: give one of the two."
                )
            tool_use, options = tool_use.constrain_arguments(call.options)
            call = replace(call, options=options)
        return _ChatPrompt(keep_messages(messages), tool_use, parallel is not False), call

    def _parts(self, prompt: Any, call: Call) -> PromptParts:
        if not isinstance(prompt, _ChatPrompt):
            return super()._parts(prompt, call)
        parts = self._parts(prompt.text, call)
        return (
            parts
            if prompt.tool_use is None
            else prompt.tool_use.add_to_prompt(parts, self.pipeline.tokenizer)
        )

    def _answer(self, prompt: _ChatPrompt) -> ChatAnswer:
        reader = AnswerReader(prompt.tool_use, self.pipeline.tokenizer)
        return ChatAnswer(reader, self.model_name, parallel=prompt.parallel)

    # Chat

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The answer to ``messages``, which keep their roles, tool calls and results."""
        prompt, call = self._chat_request(messages, kwargs)
        (completion,) = self._complete([prompt], call)
        return self._answer(prompt).whole(completion)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """``chat`` without blocking the event loop."""
        prompt, call = self._chat_request(messages, kwargs)
        (completion,) = await self._acomplete([prompt], call)
        return self._answer(prompt).whole(completion)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """``chat`` piece by piece. The last response has an empty delta and the usage."""
        prompt, call = self._chat_request(messages, kwargs)

        def responses() -> ChatResponseGen:
            with closing(self._events(prompt, call)) as events:
                answer: ChatAnswer | None = None
                for event in events:
                    answer = answer or self._answer(prompt)
                    yield from answer.take(event)

        return responses()

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """``stream_chat`` without blocking the event loop."""
        prompt, call = self._chat_request(messages, kwargs)

        async def responses() -> ChatResponseAsyncGen:
            async with aclosing(self._aevents(prompt, call)) as events:
                answer: ChatAnswer | None = None
                async for event in events:
                    answer = answer or self._answer(prompt)
                    for response in answer.take(event):
                        yield response

        return responses()

    # Tools

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[Any],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Translate the arguments of ``chat_with_tools`` into those of ``chat``.

        ``tool_required`` and ``tool_choice`` force a call by writing its beginning for the model. If the tool
        is known, decoding of its arguments is constrained by its schema (extra ``structured``).
        """
        if isinstance(user_msg, str):
            user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
        if tool_choice is None and tool_required:
            tool_choice = "required"
        return {
            "messages": [*(chat_history or ()), *([] if user_msg is None else [user_msg])],
            "tools": tool_definitions(tools),
            "tool_choice": tool_choice,
            "allow_parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def predict_and_call(self, tools: Sequence[BaseTool], *args: Any, **kwargs: Any) -> AgentChatResponse:
        """Let the model choose a tool, and call it; see LlamaIndex for the arguments.

        A model without support for tools is prompted by text, as a ``ReActAgent`` does.
        """
        return super().predict_and_call(tools, *args, **self._with_react(kwargs))

    async def apredict_and_call(
        self, tools: Sequence[BaseTool], *args: Any, **kwargs: Any
    ) -> AgentChatResponse:
        """``predict_and_call`` without blocking the event loop."""
        return await super().apredict_and_call(tools, *args, **self._with_react(kwargs))

    def _with_react(self, arguments: dict[str, Any]) -> dict[str, Any]:
        # Without these two, LlamaIndex passes None to its ReAct agent, which refuses it.
        if self.takes_tools:
            return arguments
        defaults = {"react_chat_formatter": ReActChatFormatter(), "output_parser": ReActOutputParser()}
        return defaults | arguments

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The tool calls of an answer, or of the part of it that has arrived.

        Raises:
            ToolCallError: There is none, and ``error_on_no_tool_call`` is true.
        """
        selections = [
            ToolSelection(
                tool_id=block.tool_call_id or "",
                tool_name=block.tool_name,
                tool_kwargs=cast("dict[str, Any]", block.tool_kwargs),  # LlamaIndex parses a string
            )
            for block in response.message.blocks
            if isinstance(block, ToolCallBlock)
        ]
        if not selections and error_on_no_tool_call:
            invalid = response.additional_kwargs.get(INVALID_CALLS)
            why = f" It wrote an invalid call: {invalid[0]['error']}." if invalid else ""
            raise ToolCallError(
                f"the model was expected to call a tool, but wrote {response.message.content!r}.{why} Raise "
                "max_new_tokens if the answer was cut off, or ask for a call with tool_required=True."
            )
        return selections
