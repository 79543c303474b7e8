"""The parts of LangChain's model interface that the text LLM and the chat model share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from langchain_core.language_models.base import BaseLanguageModel, LangSmithParams, LanguageModelInput
from langchain_core.outputs import LLMResult
from langchain_core.prompt_values import PromptValue
from typing_extensions import override

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.events import Completion
from rapid_integrations.hosts.base import RapidBase, usage
from rapid_integrations.tokenization.encoding import encode_plain


class LangChainModel(RapidBase, BaseLanguageModel[Any]):
    """Identity, serialization, tracing and tokens of both :class:`RapidLLM` and :class:`ChatRapid`."""

    _ls_model_type: ClassVar[Literal["llm", "chat"]]

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self.describe()

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Configuration goes to JSON; weights never do."""
        return True

    def to_json(self) -> Any:
        """LangChain's JSON form. An LLM with loaded objects gives the form for unserializable ones."""
        try:
            config = self.to_config()
        except ConfigurationError as error:
            return {"lc": 1, "type": "not_implemented", "id": self.lc_id(), "repr": f"{self!r}: {error}"}
        return {"lc": 1, "type": "constructor", "id": self.lc_id(), "kwargs": config}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        sampling = self._parse_call(kwargs, stop).options.sampling
        params = LangSmithParams(
            ls_provider="rapid",
            ls_model_type=self._ls_model_type,
            ls_model_name=self.model_name,
            ls_temperature=float(sampling.temperature),
            ls_max_tokens=sampling.max_new_tokens,
        )
        if sampling.stop:
            params["ls_stop"] = list(sampling.stop)
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """The target's tokens of ``text``, without a chat template around them."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return encode_plain(text, self.pipeline.tokenizer)

    def _uncached(self) -> Self:
        """A copy without a cache, for calls with ``on_event``: a cached answer has no events."""
        copy = self.model_copy()
        copy.cache = False
        return copy

    if TYPE_CHECKING:  # BaseLLM and BaseChatModel each define it

        def _convert_input(self, model_input: LanguageModelInput) -> PromptValue: ...

    @override
    def generate_prompt(
        self,
        prompts: list[PromptValue],
        stop: list[str] | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer prompt values; the messages of chat prompts keep their roles."""
        converted = [self._convert_input(prompt) for prompt in prompts]
        parent: Any = super()  # BaseLLM or BaseChatModel, which mypy cannot know here
        result: LLMResult = parent.generate_prompt(converted, stop=stop, callbacks=callbacks, **kwargs)
        return result

    @override
    async def agenerate_prompt(
        self,
        prompts: list[PromptValue],
        stop: list[str] | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> LLMResult:
        """:meth:`generate_prompt` without blocking the event loop."""
        converted = [self._convert_input(prompt) for prompt in prompts]
        parent: Any = super()
        result: LLMResult = await parent.agenerate_prompt(converted, stop=stop, callbacks=callbacks, **kwargs)
        return result

    def _info(self, completion: Completion) -> dict[str, Any]:
        return {
            "finish_reason": completion.finish_reason,
            "model_name": self.model_name,
            "token_usage": usage(completion),
            "rapid": completion.stats.as_dict(),
        }
