"""``ChatRapid``: LangChain's chat model on the same engine, with tools and structured output.

LangChain calls ``_generate``, ``_stream`` and their asynchronous twins. Each turns messages and arguments
into a prompt and a call (``_request``), reads the pipeline's events, and turns them into chunks
(:mod:`~rapid_integrations.langchain.chunks`). The sections of the class are numbered in this order.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompt_values import ChatPromptValue, PromptValue
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_core.tools import BaseTool
from typing_extensions import override

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.hosts.base import is_pipeline
from rapid_integrations.hosts.call import Call, identity
from rapid_integrations.hosts.model import RapidModel
from rapid_integrations.langchain.base import LangChainModel
from rapid_integrations.langchain.chunks import ChatAnswer
from rapid_integrations.langchain.messages import chat_messages, tool_definitions
from rapid_integrations.langchain.prompts import RapidChatPromptValue, RapidPromptValue
from rapid_integrations.langchain.structured_output import schema_and_parser, tool_call_parser, with_raw
from rapid_integrations.prompts import Message, PromptParts, encode_prompt
from rapid_integrations.tools.formats import CheckedTool, supports_tools
from rapid_integrations.tools.use import AnswerReader, ToolUse, normalised_choice

# The key of a message's ``additional_kwargs`` with the prompt's query and context.
_SEGMENTS_KEY = "rapid_parts"

_TOOL_NAMES = ("tools", "tool_choice", "tool_format")
StructuredMethod = Literal["function_calling", "json_schema", "json_mode"]


@dataclass(frozen=True, slots=True)
class _ChatPrompt:
    messages: Sequence[BaseMessage]
    tool_use: ToolUse | None


class ChatRapid(RapidModel, LangChainModel, BaseChatModel):
    """A LangChain chat model that drafts from retrieved chunks and answers over the whole document.

    It takes all arguments of :class:`~rapid_integrations.RapidLLM`. Messages keep their roles, tool calls and
    results. Tools need a model with a chat template that supports them::

        chat = ChatRapid.from_pretrained("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct")
        chat.bind_tools([search]).invoke("When does the lease end?", context=contract)

    The query is the last user message, also while tools are being called. The context is the given one (a
    variable of a :class:`~rapid_integrations.RapidChatPromptTemplate`, ``context=``, or text in tags), else
    the long text in a user or system message, else the longest result of a tool.

    Attributes:
        tool_format: The format of tool calls: ``"hermes"``, ``"llama3"`` or ``"mistral"``; ``None`` derives
            it from the tokenizer.
        streaming: Whether ``invoke`` streams too, so that callbacks receive tokens. With ``False``,
            ``stream`` answers in one piece (LangChain's meaning); ``None`` changes neither.

    Raises:
        ConfigurationError: An argument is unknown, out of range, or contradicts another.
    """

    _ls_model_type: ClassVar[Literal["llm", "chat"]] = "chat"
    _own_arguments: ClassVar[tuple[str, ...]] = (*_TOOL_NAMES, "stream")  # LangChain passes "stream" on

    streaming: bool | None = None

    @property
    def _llm_type(self) -> str:
        return "chat-rapid"

    @classmethod
    @override
    def get_lc_namespace(cls) -> list[str]:
        """The module that LangChain's loader imports the class from."""
        return ["rapid_integrations", "chat"]

    @override
    def _resolve_model_profile(self) -> ModelProfile:
        profile = ModelProfile(
            text_inputs=True, text_outputs=True, image_inputs=False, audio_inputs=False, video_inputs=False,
            pdf_inputs=False, image_outputs=False, audio_outputs=False, video_outputs=False,
            temperature=True, structured_output=False,
        )  # fmt: skip
        if is_pipeline(self.target):  # otherwise the models would have to be loaded
            profile["max_input_tokens"] = self.target.context_window
            profile["tool_calling"] = profile["tool_choice"] = self.target.chat_template and supports_tools(
                self.target.tokenizer, self.tool_format
            )
        return profile

    # 1. The input: a template's prompt becomes messages

    @override
    def _convert_input(self, model_input: LanguageModelInput) -> PromptValue:
        value = super()._convert_input(model_input)
        if not isinstance(value, RapidChatPromptValue | RapidPromptValue):
            return value
        # LangChain passes on messages only, so the last one carries the query and the context.
        segments = {name: text for name in ("query", "context") if (text := getattr(value, name)) is not None}
        *earlier, last = value.to_messages()
        extended = {**last.additional_kwargs, _SEGMENTS_KEY: segments}
        return ChatPromptValue(messages=[*earlier, last.model_copy(update={"additional_kwargs": extended})])

    # 2. LangChain's entry points

    @override
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        prompt, call = self._request(messages, stop, kwargs)
        answer = self._new_answer(prompt)
        return answer.result(list(self._chunks(answer, prompt, call)))

    @override
    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        prompt, call = self._request(messages, stop, kwargs)
        answer = await asyncio.to_thread(self._new_answer, prompt)
        return answer.result([chunk async for chunk in self._achunks(answer, prompt, call)])

    @override
    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        prompt, call = self._request(messages, stop, kwargs)
        return self._chunks(self._new_answer(prompt), prompt, call)

    @override
    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        prompt, call = self._request(messages, stop, kwargs)
        answer = await asyncio.to_thread(self._new_answer, prompt)
        async with aclosing(self._achunks(answer, prompt, call)) as chunks:
            async for chunk in chunks:
                yield chunk

    # 3. The request: a prompt, a Call, and the prompt in parts

    def _request(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, arguments: Mapping[str, Any]
    ) -> tuple[_ChatPrompt, Call]:
        """The prompt and the call that LangChain's arguments describe, with the tools among them."""
        tools, choice, tool_format = map(arguments.get, _TOOL_NAMES)
        tool_use = ToolUse.parse(tool_definitions(tools or ()), choice, tool_format or self.tool_format)
        call = self._parse_call(arguments, stop)
        if tool_use is not None:
            tool_use, options = tool_use.constrain_arguments(call.options)
            call = replace(call, options=options)
        return _ChatPrompt(messages, tool_use), call

    @override
    def _parts(self, prompt: Any, call: Call) -> PromptParts:
        """The messages, query and context, the tools' definitions, and the beginning of a forced call."""
        assert isinstance(prompt, _ChatPrompt)
        segments: dict[str, str] = {}
        for message in prompt.messages:
            segments = message.additional_kwargs.get(_SEGMENTS_KEY) or segments
        messages = chat_messages(prompt.messages)
        if self.system_prompt and not any(message.role == "system" for message in messages):
            messages = [Message.of("system", self.system_prompt), *messages]
        parts = PromptParts.from_messages(
            messages,
            query=segments.get("query") if call.query is None else call.query,
            context=segments.get("context") if call.context is None else call.context,
        )
        if prompt.tool_use is None:
            return parts
        return prompt.tool_use.add_to_prompt(parts, self.pipeline.tokenizer)

    # 4. The answer: chunks of the events

    def _new_answer(self, prompt: _ChatPrompt) -> ChatAnswer:
        return ChatAnswer(AnswerReader(prompt.tool_use, self.pipeline.tokenizer), self._info)

    def _chunks(self, answer: ChatAnswer, prompt: _ChatPrompt, call: Call) -> Generator[ChatGenerationChunk]:
        with closing(self._events(prompt, call)) as events:
            for event in events:
                yield from answer.take(event)

    async def _achunks(
        self, answer: ChatAnswer, prompt: _ChatPrompt, call: Call
    ) -> AsyncGenerator[ChatGenerationChunk]:
        async with aclosing(self._aevents(prompt, call)) as events:
            async for event in events:
                for chunk in answer.take(event):
                    yield chunk

    # Tools and structured output

    @override
    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with tools that it may call.

        Args:
            tools: Functions, pydantic classes, tools, or definitions.
            tool_choice: ``None`` and ``"auto"`` leave the choice to the model; ``"none"`` and ``False`` offer
                no tool; ``"any"``, ``"required"`` and ``True`` force a call; a name forces a call of that
                tool. To force a call, the beginning of the answer is written for the model. If the tool is
                known, decoding of its arguments is constrained by its schema (extra ``structured``).
            **kwargs: Further arguments of a call.

        Raises:
            ConfigurationError: The choice names no tool, or an argument is unknown. Raised by a call: it also
                asks for a ``json_schema``, a ``regex`` or ``choices``, or the schema of the forced tool
                cannot constrain decoding (simplify it, or leave the choice to the model).
        """
        definitions = tool_definitions(tools)
        normalised_choice(tool_choice, [definition["function"]["name"] for definition in definitions])
        self._parse_call({name: value for name, value in kwargs.items() if not name.startswith("ls_")})
        chosen = {} if tool_choice is None else {"tool_choice": tool_choice}
        return self.bind(tools=definitions, **chosen, **kwargs)

    @override
    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        method: StructuredMethod = "function_calling",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """A runnable that answers with data that match a schema.

        Args:
            schema: A pydantic class, a ``TypedDict``, or a JSON schema, which needs a title for
                ``"function_calling"``.
            method: ``"function_calling"``: the data are the arguments of a forced tool call; for models with
                a chat template that supports tools. ``"json_schema"``: the data are text, and decoding is
                constrained by the schema; for any model (extra ``structured``). ``"json_mode"``: text
                constrained to any JSON object, which may not match the schema. The last two do not change the
                prompt.
            include_raw: Answer with a dict of the message (``"raw"``), the data (``"parsed"``) and the error
                (``"parsing_error"``) instead of the data alone.
            strict: Accepted for compatibility; a pydantic class always validates the data.
            **kwargs: Further arguments of a call.

        Raises:
            ConfigurationError: The method or an argument is unknown.
        """
        if method not in get_args(StructuredMethod):
            raise ConfigurationError(
                f"method={method!r} is unknown: take one of {', '.join(get_args(StructuredMethod))}."
            )
        caller: Runnable[LanguageModelInput, Any]
        trace: dict[str, Any] = {"kwargs": {"method": method}, "schema": schema}
        if method == "function_calling":
            (trace["schema"],) = tool_definitions([schema])
            name = trace["schema"]["function"]["name"]
            caller = self.bind_tools([schema], tool_choice=name, ls_structured_output_format=trace, **kwargs)
            parser = tool_call_parser(schema, name)
        else:
            self._parse_call(kwargs)
            text, parse = schema_and_parser(schema)
            constraint = text if method == "json_schema" else '{"type":"object"}'
            caller = self.bind(json_schema=constraint, ls_structured_output_format=trace, **kwargs)
            parser = RunnableLambda(lambda message: parse(str(message.text)))
        return with_raw(caller, parser) if include_raw else caller | parser

    # Tokens and caching

    @override
    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """The length of the target's prompt for ``messages`` and ``tools``, chat template included."""
        parts = self._parts(*self._request(messages, None, {"tools": tools}))
        return len(encode_prompt(parts, self.pipeline.tokenizer, chat_template=self.pipeline.chat_template))

    @override
    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        # LangChain's own key does not distinguish loaded models and retrievers.
        tools = {name: _as_json(kwargs.get(name)) for name in _TOOL_NAMES}
        tools["checked"] = [isinstance(tool, CheckedTool) for tool in kwargs.get("tools") or ()]
        return json.dumps([self.describe(), self._parse_call(kwargs, stop).identity(), tools], sort_keys=True)

    @override
    def _generate_with_cache(self, *args: Any, **kwargs: Any) -> ChatResult:
        model = self if kwargs.get("on_event") is None else self._uncached()
        return BaseChatModel._generate_with_cache(model, *args, **kwargs)

    @override
    async def _agenerate_with_cache(self, *args: Any, **kwargs: Any) -> ChatResult:
        model = self if kwargs.get("on_event") is None else self._uncached()
        return await BaseChatModel._agenerate_with_cache(model, *args, **kwargs)


def _as_json(value: Any) -> Any:
    """Tools and tool choices as plain JSON data."""
    return json.loads(json.dumps(value, default=identity, sort_keys=True))
