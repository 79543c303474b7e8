"""``LangChainLLM``: LangChain's ``BaseLLM`` over the pipeline.

LangChain calls ``_generate``, ``_stream`` and their asynchronous twins. Each parses the call's arguments,
reads the pipeline's events, and turns them into chunks. The sections of the class are numbered in this order,
as those of :mod:`~rapid_integrations.langchain.chat_model` are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any

from langchain_core.caches import BaseCache
from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
    Callbacks,
)
from langchain_core.exceptions import OutputParserException
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.llms import BaseLLM
from langchain_core.messages import BaseMessage
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.prompt_values import ChatPromptValue, PromptValue
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from typing_extensions import override

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.events import Completion, TextDelta, TextEvent
from rapid_integrations.hosts.base import usage
from rapid_integrations.langchain.base import LangChainModel
from rapid_integrations.langchain.cache import ExactCache
from rapid_integrations.langchain.messages import message_pairs
from rapid_integrations.langchain.prompts import RapidChatPromptValue
from rapid_integrations.langchain.structured_output import schema_and_parser
from rapid_integrations.prompts import PromptParts, encode_prompt
from rapid_integrations.validation import refuse_unknown

# Arguments of LangChain's calls that describe the run.
_RUN_NAMES = ("tags", "metadata", "run_name", "run_id")


class LangChainLLM(LangChainModel, BaseLLM):
    """The methods of ``BaseLLM``. :class:`~rapid_integrations.llm.RapidLLM` adds LlamaIndex's."""

    _ls_model_type = "llm"

    @property
    def _llm_type(self) -> str:
        return "rapid"

    # 1. The input: messages become a prompt text that keeps their roles

    def _convert_input(self, model_input: LanguageModelInput) -> PromptValue:
        value = super()._convert_input(model_input)
        if isinstance(value, ChatPromptValue) and not isinstance(value, RapidChatPromptValue):
            return RapidChatPromptValue(messages=value.messages)
        return value

    # 2. LangChain's entry points

    @override
    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Answer ``inputs`` together; with ``return_exceptions`` a failure concerns its own input only."""
        if return_exceptions:
            return Runnable.batch(self, inputs, config, return_exceptions=True, **kwargs)
        return super().batch(inputs, config, **kwargs)

    @override
    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Answer ``inputs`` together; with ``return_exceptions`` a failure concerns its own input only."""
        if return_exceptions:
            return await Runnable.abatch(self, inputs, config, return_exceptions=True, **kwargs)
        return await super().abatch(inputs, config, **kwargs)

    @override
    def _generate_helper(
        self,
        prompts: list[str],
        stop: list[str] | None,
        run_managers: list[CallbackManagerForLLMRun],
        **kwargs: Any,
    ) -> LLMResult:
        # LangChain passes only the first run manager to _generate; pass all of them.
        return super()._generate_helper(prompts, stop, run_managers, _run_managers=run_managers, **kwargs)

    @override
    async def _agenerate_helper(
        self,
        prompts: list[str],
        stop: list[str] | None,
        run_managers: list[AsyncCallbackManagerForLLMRun],
        **kwargs: Any,
    ) -> LLMResult:
        return await super()._agenerate_helper(
            prompts, stop, run_managers, _run_managers=run_managers, **kwargs
        )

    @override
    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        _run_managers: Sequence[CallbackManagerForLLMRun] = (),
        **kwargs: Any,
    ) -> LLMResult:
        managers = _run_managers or ([run_manager] if run_manager else [])

        def report(index: int, event: TextEvent) -> None:
            if index < len(managers) and (chunk := self._chunk(event)):
                managers[index].on_llm_new_token(chunk.text, chunk=chunk)

        return self._result(self._complete(prompts, self._parse_call(kwargs, stop), on_event=report))

    @override
    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        _run_managers: Sequence[AsyncCallbackManagerForLLMRun] = (),
        **kwargs: Any,
    ) -> LLMResult:
        managers = _run_managers or ([run_manager] if run_manager else [])

        async def report(index: int, event: TextEvent) -> None:
            if index < len(managers) and (chunk := self._chunk(event)):
                await managers[index].on_llm_new_token(chunk.text, chunk=chunk)

        call = self._parse_call(kwargs, stop)
        return self._result(await self._acomplete(prompts, call, on_event=report))

    @override
    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with closing(self._events(prompt, self._parse_call(kwargs, stop))) as events:
            for event in events:
                if chunk := self._chunk(event):
                    if run_manager:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    @override
    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        async with aclosing(self._aevents(prompt, self._parse_call(kwargs, stop))) as events:
            async for event in events:
                if chunk := self._chunk(event):
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    # 4. The answer: chunks of the events (3. The request is in hosts/base.py)

    def _chunk(self, event: TextEvent) -> GenerationChunk | None:
        """An event as a chunk. The last chunk has no text, but the finish reason and the statistics."""
        match event:
            case TextDelta(text=text):
                return GenerationChunk(text=text)
            case Completion():
                return GenerationChunk(text="", generation_info=self._info(event))
        return None

    def _result(self, completions: Sequence[Completion]) -> LLMResult:
        total = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        for completion in completions:
            for name, tokens in usage(completion).items():
                total[name] += tokens
        return LLMResult(
            generations=[[Generation(text=c.text, generation_info=self._info(c))] for c in completions],
            llm_output={"token_usage": total, "model_name": self.model_name},
        )

    # Structured output

    @override
    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """A runnable that answers with objects. Decoding is constrained by the schema.

        The prompt is not changed: it has to say what the answer should contain.

        Args:
            schema: A pydantic model (instances are returned), a TypedDict or a JSON schema (dicts are
                returned).
            include_raw: Return a dict of the text (``"raw"``), the object (``"parsed"``, ``None`` if parsing
                failed) and the ``"parsing_error"``, which is then not raised. Parsing fails for an answer
                that ``max_new_tokens`` cut off.
            **kwargs: No further arguments are allowed.

        Raises:
            ConfigurationError: The schema is not valid, or an argument is unknown.
        """
        refuse_unknown(kwargs, {"schema", "include_raw"}, "with_structured_output")
        text, parse = schema_and_parser(schema)

        def parse_with_raw(answer: str) -> dict[str, Any]:
            try:
                return {"raw": answer, "parsed": parse(answer), "parsing_error": None}
            except OutputParserException as error:
                return {"raw": answer, "parsed": None, "parsing_error": error}

        return self.bind(json_schema=text) | RunnableLambda(parse_with_raw if include_raw else parse)

    # Caching

    @override
    def generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer ``prompts`` together; see LangChain for the arguments."""
        cached = self._with_exact_cache(stop, kwargs)
        return BaseLLM.generate(cached, prompts, stop, callbacks, **kwargs)

    @override
    async def agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer ``prompts`` together without blocking the event loop; see LangChain for the arguments."""
        cached = self._with_exact_cache(stop, kwargs)
        return await BaseLLM.agenerate(cached, prompts, stop, callbacks, **kwargs)

    def _with_exact_cache(self, stop: list[str] | None, arguments: Mapping[str, Any]) -> LangChainLLM:
        """This LLM, or if a cache is used a copy with a cache that distinguishes all calls."""
        own_arguments = {name: value for name, value in arguments.items() if name not in _RUN_NAMES}
        call = self._parse_call(own_arguments, stop)
        if self.cache is False:
            return self
        if call.on_event is not None:
            return self._uncached()
        cache = self.cache if isinstance(self.cache, BaseCache) else get_llm_cache()
        if cache is None or isinstance(cache, ExactCache):
            return self
        copy = self.model_copy()
        copy.cache = ExactCache(cache, call)
        return copy

    # Tokens

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """The length of the target's prompt for ``messages``, chat template included.

        Raises:
            ConfigurationError: ``tools`` were given.
        """
        if tools:
            raise ConfigurationError("tools were given to RapidLLM, which takes text only.")
        parts = PromptParts.from_messages(message_pairs(messages))
        return len(encode_prompt(parts, self.pipeline.tokenizer, chat_template=self.pipeline.chat_template))
