"""``LlamaIndexLLM``: LlamaIndex's LLM over the pipeline (metadata, prompts, completion, prediction).

Chat and tools are in :mod:`~rapid_integrations.llama_index.chat`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, ClassVar, cast

from llama_index.core.base.llms.types import (
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.llms.llm import LLM, CompletionToPromptCallable, MessagesToPromptCallable
from llama_index.core.program.utils import get_program_for_llm
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.types import BasePydanticProgram, Model, PydanticProgramMode
from pydantic import Field, PrivateAttr, computed_field

from rapid_integrations.hosts.call import Call
from rapid_integrations.hosts.prompt_text import (
    CONTEXT_NAMES,
    QUERY_NAMES,
    PromptText,
    find_segments,
    value_text,
)
from rapid_integrations.llama_index.chat import LlamaIndexChat
from rapid_integrations.llama_index.messages import host_message, keep_completion, keep_messages
from rapid_integrations.llama_index.prompts import KeptPrompt
from rapid_integrations.llama_index.responses import CompletionAnswer
from rapid_integrations.prompts import PromptParts
from rapid_integrations.structured.grammar import can_constrain

if TYPE_CHECKING:
    from llama_index.core.program.utils import FlexibleModel


class RapidMetadata(LLMMetadata):
    """LlamaIndex's metadata of an LLM, and LangChain's tracing metadata in the same object.

    LlamaIndex reads attributes; LangChain reads items. Reading ``context_window`` or
    ``is_function_calling_model`` loads the models.
    """

    context_window: ClassVar[Any]  # type: ignore[misc] # removes the field, so that the property below is used
    is_function_calling_model: ClassVar[Any]  # type: ignore[misc] # as above
    _llm: Any = PrivateAttr()
    _trace: dict[str, Any] = PrivateAttr()

    @classmethod
    def of(cls, llm: LlamaIndexLLM, trace: dict[str, Any]) -> RapidMetadata:
        """The metadata of ``llm``; ``trace`` holds LangChain's items."""
        self = cls(num_output=llm.max_new_tokens, is_chat_model=False, model_name=llm.model_name)
        self._llm, self._trace = llm, trace
        return self

    @computed_field  # type: ignore[prop-decorator, no-redef] # required by pydantic; the annotation removed the field
    @property
    def context_window(self) -> int:  # type: ignore[override] # a field there, and read only by LlamaIndex
        """The maximum number of tokens of a prompt and its answer together."""
        return int(self._llm.pipeline.context_window)

    @computed_field  # type: ignore[prop-decorator, no-redef] # as above
    @property
    def is_function_calling_model(self) -> bool:  # type: ignore[override] # as above
        """Whether the model supports tools. LlamaIndex's agents choose their strategy by it."""
        return bool(self._llm.takes_tools)

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


class LlamaIndexLLM(LlamaIndexChat):
    """LlamaIndex's methods. :class:`~rapid_integrations.llm.RapidLLM` adds LangChain's.

    ``messages_to_prompt`` and ``completion_to_prompt`` replace the model's chat template, also in
    LangChain's calls: the model gets the text that they return.
    """

    messages_to_prompt: MessagesToPromptCallable = Field(default=keep_messages, exclude=True)
    completion_to_prompt: CompletionToPromptCallable = Field(default=keep_completion, exclude=True)
    trace_metadata: dict[str, Any] = Field(default_factory=dict, alias="metadata", exclude=True)

    metadata: ClassVar[Any]  # removes LangChain's field, so that the property below is used

    @property  # type: ignore[no-redef] # see above
    def metadata(self) -> RapidMetadata:
        """Context window, output length and name for LlamaIndex; tracing metadata for LangChain."""
        return RapidMetadata.of(self, self.trace_metadata)

    @classmethod
    def class_name(cls) -> str:
        """The name by which LlamaIndex stores this class."""
        return "RapidLLM"

    def to_payload(self) -> dict[str, Any]:
        """The description of this LLM in LlamaIndex's events. Does not load the models."""
        return {"class_name": self.class_name(), **self.describe()}

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """LlamaIndex's plain-data form, which ``from_dict`` takes.

        Raises:
            ConfigurationError: This LLM holds an object that cannot be plain data.
        """
        return {**self.to_config(), "class_name": self.class_name()}

    def json(self, **kwargs: Any) -> str:
        """LlamaIndex's JSON form, which ``from_json`` takes."""
        return json.dumps(self.to_dict(), **kwargs)

    # Prompts

    def _parts(self, prompt: Any, call: Call) -> PromptParts:
        """The prompt of a request, formatted by the user's own prompt functions if they are set."""
        if not isinstance(prompt, str):
            return super()._parts(prompt, call)
        text = prompt if isinstance(prompt, PromptText) else PromptText(prompt)
        formatted = None
        if text.raw:
            pass
        elif text.messages is None and self.completion_to_prompt not in (None, keep_completion):
            formatted = self._extend_prompt(self.completion_to_prompt(str(text)))
        elif text.messages is not None and self.messages_to_prompt not in (None, keep_messages):
            messages = list(map(host_message, text.messages))
            has_system = any(message.role == MessageRole.SYSTEM for message in messages)
            formatted = self.messages_to_prompt(messages if has_system else self._extend_messages(messages))
        if formatted is not None:
            text = PromptText(formatted, query=text.query, context=text.context, raw=True)
        return super()._parts(text, call)

    def _get_prompt(self, prompt: BasePromptTemplate, **prompt_args: Any) -> PromptText:
        """The formatted template with its query and context attached.

        ``prompt.kwargs`` holds variables that a synthesizer has already set, usually the query.
        """
        variables = {**prompt.kwargs, **prompt_args}
        segments = find_segments(
            prompt._map_function_vars(variables) if prompt.function_mappings else variables
        )
        arguments = {
            name: value_text(value) if name in (*QUERY_NAMES, *CONTEXT_NAMES) else value
            for name, value in prompt_args.items()
        }
        formatted = prompt.format(
            llm=self, messages_to_prompt=keep_messages, completion_to_prompt=keep_completion, **arguments
        )
        if isinstance(formatted, PromptText) and formatted.messages is not None:
            messages = list(map(host_message, formatted.messages))
            if self.output_parser is not None:
                messages = self.output_parser.format_messages(messages)
            kept = keep_messages(messages)
            return PromptText(kept, messages=kept.messages, **segments)
        text = formatted if self.output_parser is None else self.output_parser.format(formatted)
        if self.query_wrapper_prompt is not None:
            text = self.query_wrapper_prompt.format(query_str=text)
        return PromptText(text, **segments)

    def _extend_prompt(self, formatted_prompt: str) -> str:
        """Put the system prompt before text that is already formatted for the model."""
        return f"{self.system_prompt}\n\n{formatted_prompt}" if self.system_prompt else formatted_prompt

    # Completion

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The answer to ``prompt``; ``formatted`` means that a chat template has been applied."""
        (completion,) = self._complete([_as_given(prompt, formatted)], self._reporting_call(kwargs, prompt))
        return CompletionAnswer(self.model_name).whole(completion)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """``complete`` without blocking the event loop."""
        prompts = [_as_given(prompt, formatted)]
        (completion,) = await self._acomplete(prompts, self._reporting_call(kwargs, prompt))
        return CompletionAnswer(self.model_name).whole(completion)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """``complete`` piece by piece. The last response has an empty delta and the usage."""
        return self._responses(_as_given(prompt, formatted), self._reporting_call(kwargs, prompt))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """``stream_complete`` without blocking the event loop."""
        return self._aresponses(_as_given(prompt, formatted), self._reporting_call(kwargs, prompt))

    # Structured output is text, constrained by the schema where llguidance is installed. With
    # ``json_schema=None`` in ``llm_kwargs`` only the prompt asks for it. Under
    # ``PydanticProgramMode.FUNCTION`` it is a tool call.

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """LlamaIndex's structured prediction, with query and context kept apart."""
        llm, kept, llm_kwargs = self._constrained(output_cls, prompt, prompt_args, llm_kwargs)
        return cast("Model", LLM.structured_predict(llm, output_cls, kept, llm_kwargs, **prompt_args))

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """``structured_predict`` without blocking the event loop."""
        llm, kept, llm_kwargs = self._constrained(output_cls, prompt, prompt_args, llm_kwargs)
        answer = await LLM.astructured_predict(llm, output_cls, kept, llm_kwargs, **prompt_args)
        return cast("Model", answer)

    def stream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Model | FlexibleModel, None, None]:
        """``structured_predict`` piece by piece: partial objects, and at last the complete one."""
        llm, kept, llm_kwargs = self._constrained(output_cls, prompt, prompt_args, llm_kwargs)
        yield from LLM.stream_structured_predict(llm, output_cls, kept, llm_kwargs, **prompt_args)

    async def astream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Model | FlexibleModel, None]:
        """``stream_structured_predict`` without blocking the event loop."""
        llm, kept, llm_kwargs = self._constrained(output_cls, prompt, prompt_args, llm_kwargs)
        return await LLM.astream_structured_predict(llm, output_cls, kept, llm_kwargs, **prompt_args)

    def _constrained(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        prompt_args: dict[str, Any],
        llm_kwargs: dict[str, Any] | None,
    ) -> tuple[LlamaIndexLLM, Any, dict[str, Any]]:
        """The LLM, the template and the arguments of a structured prediction."""
        llm_kwargs = _with_segments(prompt, prompt_args, llm_kwargs)
        if self.pydantic_program_mode not in (PydanticProgramMode.DEFAULT, PydanticProgramMode.LLM):
            return self, prompt, llm_kwargs
        llm = self.model_copy(update={"pydantic_program_mode": PydanticProgramMode.LLM})
        if can_constrain():
            llm_kwargs = {"json_schema": output_cls, **llm_kwargs}
        return llm, KeptPrompt.of(prompt), llm_kwargs

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        return self._program(output_cls, prompt).stream_call(llm_kwargs=llm_kwargs, **prompt_args)

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        return await self._program(output_cls, prompt).astream_call(llm_kwargs=llm_kwargs, **prompt_args)

    def _program(self, output_cls: type[Model], prompt: PromptTemplate) -> BasePydanticProgram[Model]:
        # LlamaIndex's streams do not force the call; its other predictions do.
        mode = self.pydantic_program_mode
        forced = {"tool_choice": "any"} if mode == PydanticProgramMode.FUNCTION else {}
        return get_program_for_llm(output_cls, prompt, self, mode, **forced)

    # Responses

    def _responses(self, prompt: str, call: Call) -> CompletionResponseGen:
        answer = CompletionAnswer(self.model_name)
        with closing(self._events(prompt, call)) as events:
            for event in events:
                yield from answer.take(event)

    async def _aresponses(self, prompt: str, call: Call) -> CompletionResponseAsyncGen:
        answer = CompletionAnswer(self.model_name)
        async with aclosing(self._aevents(prompt, call)) as events:
            async for event in events:
                for response in answer.take(event):
                    yield response


def _as_given(prompt: str, formatted: bool) -> PromptText:
    # LlamaIndex calls a template's prompt "formatted" too, but the chat template has not been applied to it.
    return prompt if isinstance(prompt, PromptText) else PromptText(prompt, raw=formatted)


def _with_segments(
    prompt: BasePromptTemplate, prompt_args: dict[str, Any], llm_kwargs: dict[str, Any] | None
) -> dict[str, Any]:
    segments = find_segments({**prompt.kwargs, **prompt_args})
    known = {name: value for name, value in segments.items() if value is not None}
    return {**known, **(llm_kwargs or {})}
