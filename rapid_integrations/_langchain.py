"""What LangChain asks of a language model, be it for text or for chat."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from langchain_core.language_models.base import BaseLanguageModel, LangSmithParams

from rapid_integrations._base import RapidBase, usage
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.pipeline import Completion
from rapid_integrations.text import encode_plain


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
        """LangChain's JSON form; an LLM that holds loaded objects gives one that says why it is none."""
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

    def _info(self, completion: Completion) -> dict[str, Any]:
        return {
            "finish_reason": completion.finish_reason,
            "model_name": self.model_name,
            "token_usage": usage(completion),
            "rapid": completion.stats.as_dict(),
        }
