"""The LlamaIndex face: its LLM's methods over the pipeline."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from llama_index.core.base.llms.generic_utils import messages_to_prompt as plain_messages
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.llms.llm import CompletionToPromptCallable, MessagesToPromptCallable
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.types import Model, PydanticProgramMode
from pydantic import Field, PrivateAttr, computed_field

from rapid_integrations._base import RapidBase, usage
from rapid_integrations._call import Call
from rapid_integrations._prompt_text import (
    CONTEXT_NAMES,
    QUERY_NAMES,
    PromptText,
    find_segments,
    value_text,
)
from rapid_integrations.errors import PromptError
from rapid_integrations.llama_index_events import EventReporter
from rapid_integrations.pipeline import Completion, TextDelta, TextEvent
from rapid_integrations.prompts import PromptParts
from rapid_integrations.structured import can_constrain

if TYPE_CHECKING:
    from llama_index.core.program.utils import FlexibleModel

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}


def keep_messages(messages: Sequence[ChatMessage]) -> str:
    """Messages as text that still knows them; the chat template is applied by the pipeline."""
    return PromptText(plain_messages(messages), messages=message_pairs(messages))


def keep_completion(prompt: str) -> str:
    """A completion prompt as text to which the pipeline applies the chat template."""
    return prompt if isinstance(prompt, PromptText) else PromptText(prompt)


class RapidMetadata(LLMMetadata):
    """LlamaIndex's metadata of an LLM, which is LangChain's tracing metadata at the same time.

    LlamaIndex reads attributes; LangChain reads items. Asking for ``context_window`` loads the models.
    """

    context_window: ClassVar[Any]  # type: ignore[misc] # drops the field, so that the property below counts
    _llm: Any = PrivateAttr()
    _trace: dict[str, Any] = PrivateAttr()

    @classmethod
    def of(cls, llm: LlamaIndexLLM, trace: dict[str, Any]) -> RapidMetadata:
        """The metadata of ``llm``; ``trace`` holds LangChain's items."""
        self = cls(num_output=llm.max_new_tokens, is_chat_model=False, model_name=llm.model_name)
        self._llm, self._trace = llm, trace
        return self

    @computed_field  # type: ignore[prop-decorator, no-redef] # pydantic's way; the annotation drops the field
    @property
    def context_window(self) -> int:  # type: ignore[override] # a field there, and read only by LlamaIndex
        """The tokens a prompt and its answer may have together."""
        return int(self._llm.pipeline.context_window)

    def keys(self) -> Any:
        """The names of LangChain's items."""
        return self._trace.keys()

    def get(self, key: str, default: Any = None) -> Any:
        """One of LangChain's items."""
        return self._trace.get(key, default)

    def __getitem__(self, key: str) -> Any:
        return self._trace[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._trace[key] = value

    def __contains__(self, key: object) -> bool:
        return key in self._trace


class LlamaIndexLLM(RapidBase, CustomLLM):
    """LlamaIndex's methods. :class:`~rapid_integrations.llm.RapidLLM` adds LangChain's.

    ``messages_to_prompt`` and ``completion_to_prompt`` replace the model's chat template, for LangChain's
    calls too: what they return is given to the model as it is.
    """

    messages_to_prompt: MessagesToPromptCallable = Field(default=keep_messages, exclude=True)
    completion_to_prompt: CompletionToPromptCallable = Field(default=keep_completion, exclude=True)
    trace_metadata: dict[str, Any] = Field(default_factory=dict, alias="metadata", exclude=True)

    metadata: ClassVar[Any]  # drops LangChain's field, so that the property below counts

    @property  # type: ignore[no-redef] # see above
    def metadata(self) -> RapidMetadata:
        """Context window, output length and name for LlamaIndex; tracing metadata for LangChain."""
        return RapidMetadata.of(self, self.trace_metadata)

    @classmethod
    def class_name(cls) -> str:
        """The name LlamaIndex stores this class under."""
        return "RapidLLM"

    def to_payload(self) -> dict[str, Any]:
        """What LlamaIndex's events say about this LLM. Loads nothing."""
        return {"class_name": self.class_name(), **self.describe()}

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """LlamaIndex's plain-data form, which ``from_dict`` takes.

        Raises:
            ConfigurationError: This LLM holds an object that plain data cannot.
        """
        return {**self.to_config(), "class_name": self.class_name()}

    def json(self, **kwargs: Any) -> str:
        """LlamaIndex's JSON form, which ``from_json`` takes."""
        return json.dumps(self.to_dict(), **kwargs)

    # Prompts

    def _parts(self, prompt: str, call: Call) -> PromptParts:
        """One request's prompt, through the user's own prompt functions where there are any."""
        text = prompt if isinstance(prompt, PromptText) else PromptText(prompt)
        own = None
        if text.raw:
            pass
        elif text.messages is None and self.completion_to_prompt not in (None, keep_completion):
            own = self._extend_prompt(self.completion_to_prompt(str(text)))
        elif text.messages is not None and self.messages_to_prompt not in (None, keep_messages):
            messages = [ChatMessage(role=role, content=content) for role, content in text.messages]
            has_system = any(message.role == MessageRole.SYSTEM for message in messages)
            own = self.messages_to_prompt(messages if has_system else self._extend_messages(messages))
        if own is not None:
            text = PromptText(own, query=text.query, context=text.context, raw=True)
        return super()._parts(text, call)

    def _reported(self, arguments: dict[str, Any], prompt: str = "") -> Call:
        """A call that LlamaIndex's event handlers hear about."""
        hidden = prompt.arguments if isinstance(prompt, PromptText) else {}
        call = self._parse_call({**hidden, **arguments})
        return replace(call, on_event=EventReporter(call.on_event))

    def _get_prompt(self, prompt: BasePromptTemplate, **prompt_args: Any) -> PromptText:
        """The formatted template with its query and context attached.

        ``prompt.kwargs`` holds what the synthesizers formatted partially, usually the query.
        """
        variables = {**prompt.kwargs, **prompt_args}
        found = find_segments(prompt._map_function_vars(variables) if prompt.function_mappings else variables)
        arguments = {
            name: value_text(value) if name in (*QUERY_NAMES, *CONTEXT_NAMES) else value
            for name, value in prompt_args.items()
        }
        formatted = prompt.format(
            llm=self, messages_to_prompt=keep_messages, completion_to_prompt=keep_completion, **arguments
        )
        if isinstance(formatted, PromptText) and formatted.messages is not None:
            messages = [ChatMessage(role=role, content=text) for role, text in formatted.messages]
            if self.output_parser is not None:
                messages = self.output_parser.format_messages(messages)
            return PromptText(plain_messages(messages), messages=message_pairs(messages), **found)
        text = formatted if self.output_parser is None else self.output_parser.format(formatted)
        if self.query_wrapper_prompt is not None:
            text = self.query_wrapper_prompt.format(query_str=text)
        return PromptText(text, **found)

    def _extend_prompt(self, formatted_prompt: str) -> str:
        """The system prompt in front of text that is formatted for the model already."""
        return f"{self.system_prompt}\n\n{formatted_prompt}" if self.system_prompt else formatted_prompt

    # Completion

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The answer to ``prompt``; ``formatted`` says that a chat template was applied already."""
        (completion,) = self._complete([_as_given(prompt, formatted)], self._reported(kwargs, prompt))
        return self._response(completion.text, completion=completion)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """``complete`` without blocking the event loop."""
        prompts = [_as_given(prompt, formatted)]
        (completion,) = await self._acomplete(prompts, self._reported(kwargs, prompt))
        return self._response(completion.text, completion=completion)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """``complete`` piece by piece; the last response, whose delta is empty, has the usage."""
        return self._responses(_as_given(prompt, formatted), self._reported(kwargs, prompt))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """``stream_complete`` without blocking the event loop."""
        return self._aresponses(_as_given(prompt, formatted), self._reported(kwargs, prompt))

    # Chat

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The answer to ``messages``, which keep their roles."""
        (completion,) = self._complete([keep_messages(messages)], self._reported(kwargs))
        return _as_chat(self._response(completion.text, completion=completion))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """``chat`` without blocking the event loop."""
        (completion,) = await self._acomplete([keep_messages(messages)], self._reported(kwargs))
        return _as_chat(self._response(completion.text, completion=completion))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """``chat`` piece by piece; the last response, whose delta is empty, has the usage."""
        prompt, call = keep_messages(messages), self._reported(kwargs)

        def responses() -> ChatResponseGen:
            with closing(self._responses(prompt, call)) as completions:
                for response in completions:
                    yield _as_chat(response)

        return responses()

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """``stream_chat`` without blocking the event loop."""
        prompt, call = keep_messages(messages), self._reported(kwargs)

        async def responses() -> ChatResponseAsyncGen:
            async with aclosing(self._aresponses(prompt, call)) as completions:
                async for response in completions:
                    yield _as_chat(response)

        return responses()

    # Structured output: under the schema's constraint where llguidance is installed. ``json_schema=None`` in
    # ``llm_kwargs`` leaves it to the prompt.

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """LlamaIndex's structured prediction, with the query and context kept apart."""
        llm, llm_kwargs = self._constrained(output_cls, prompt, prompt_args, llm_kwargs)
        return cast("Model", CustomLLM.structured_predict(llm, output_cls, prompt, llm_kwargs, **prompt_args))

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """``structured_predict`` without blocking the event loop."""
        llm, llm_kwargs = self._constrained(output_cls, prompt, prompt_args, llm_kwargs)
        answer = await CustomLLM.astructured_predict(llm, output_cls, prompt, llm_kwargs, **prompt_args)
        return cast("Model", answer)

    def stream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Model | FlexibleModel, None, None]:
        """``structured_predict`` piece by piece: what is known of the object so far, the whole one last."""
        llm, llm_kwargs = self._constrained(output_cls, prompt, prompt_args, llm_kwargs)
        yield from CustomLLM.stream_structured_predict(llm, output_cls, prompt, llm_kwargs, **prompt_args)

    async def astream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Model | FlexibleModel, None]:
        """``stream_structured_predict`` without blocking the event loop."""
        llm, llm_kwargs = self._constrained(output_cls, prompt, prompt_args, llm_kwargs)
        return await CustomLLM.astream_structured_predict(llm, output_cls, prompt, llm_kwargs, **prompt_args)

    def _constrained(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        prompt_args: dict[str, Any],
        llm_kwargs: dict[str, Any] | None,
    ) -> tuple[LlamaIndexLLM, dict[str, Any]]:
        """The LLM and the arguments that a structured prediction is decoded with."""
        llm_kwargs = _with_segments(prompt, prompt_args, llm_kwargs)
        textual = (PydanticProgramMode.DEFAULT, PydanticProgramMode.LLM)
        if self.pydantic_program_mode not in textual or not can_constrain():
            return self, llm_kwargs
        llm = self.model_copy(update={"pydantic_program_mode": PydanticProgramMode.LLM})
        return llm, {"json_schema": output_cls, **llm_kwargs}

    # Responses

    def _responses(self, prompt: str, call: Call) -> CompletionResponseGen:
        text = ""
        with closing(self._events(prompt, call)) as events:
            for event in events:
                if response := self._event_response(text, event):
                    text = response.text
                    yield response

    async def _aresponses(self, prompt: str, call: Call) -> CompletionResponseAsyncGen:
        text = ""
        async with aclosing(self._aevents(prompt, call)) as events:
            async for event in events:
                if response := self._event_response(text, event):
                    text = response.text
                    yield response

    def _event_response(self, text: str, event: TextEvent) -> CompletionResponse | None:
        match event:
            case TextDelta(text=delta):
                return CompletionResponse(text=text + delta, delta=delta)
            case Completion():
                return self._response(event.text, completion=event, delta="")
        return None

    def _response(self, text: str, *, completion: Completion, delta: str | None = None) -> CompletionResponse:
        counts = usage(completion)
        stats = completion.stats.as_dict()
        return CompletionResponse(
            text=text,
            delta=delta,
            raw={
                "model": self.model_name,
                "finish_reason": completion.finish_reason,
                "usage": counts,
                "rapid": stats,
            },
            additional_kwargs={**counts, "finish_reason": completion.finish_reason, "rapid": stats},
        )


def _as_given(prompt: str, formatted: bool) -> PromptText:
    # A template's prompt is "formatted" too, but not for the model: it waits for the chat template.
    return prompt if isinstance(prompt, PromptText) else PromptText(prompt, raw=formatted)


def _as_chat(response: CompletionResponse) -> ChatResponse:
    # Usage stays out of the message: LlamaIndex writes a message's additional_kwargs into later prompts.
    return ChatResponse(
        message=ChatMessage(role=MessageRole.ASSISTANT, content=response.text),
        delta=response.delta,
        raw=response.raw,
        additional_kwargs=response.additional_kwargs,
    )


def _with_segments(
    prompt: BasePromptTemplate, prompt_args: dict[str, Any], llm_kwargs: dict[str, Any] | None
) -> dict[str, Any]:
    found = {k: v for k, v in find_segments({**prompt.kwargs, **prompt_args}).items() if v is not None}
    return {**found, **(llm_kwargs or {})}


def message_pairs(messages: Sequence[ChatMessage]) -> list[tuple[str, str]]:
    """LlamaIndex messages as ``(role, text)``.

    Raises:
        PromptError: A message holds something other than text.
    """
    for message in messages:
        if other := [block for block in message.blocks if not isinstance(block, TextBlock)]:
            raise PromptError(
                f"a {message.role.value} message holds a {type(other[0]).__name__}: RapidLLM takes text only."
            )
    return [(_ROLES.get(m.role, m.role.value), m.content or "") for m in messages]
