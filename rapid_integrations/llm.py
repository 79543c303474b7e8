"""RapidLLM: one local LLM that LangChain and LlamaIndex both take as their own."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models.llms import BaseLLM
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import BasePromptTemplate

from rapid_integrations._compat import resolve_dual_llms
from rapid_integrations._model import RapidModel
from rapid_integrations.langchain import LangChainLLM
from rapid_integrations.llama_index import LlamaIndexLLM

resolve_dual_llms()


class RapidLLM(RapidModel, LangChainLLM, LlamaIndexLLM):  # type: ignore[misc] # to_json is LangChain's here
    """An LLM of both frameworks that drafts from retrieved chunks and answers over the whole document.

    Use it wherever either framework takes an LLM. Loading happens at the first use; LLMs over the same
    models share one engine. Every option of :class:`~rapid_integrations.config.GenerationOptions` is an
    argument here and of each call (``llm.invoke(prompt, temperature=0.7)``); ``query=``, ``context=``,
    ``retriever=`` and ``on_event=`` (hears every event of the pipeline's stream, past any cache) are
    arguments of calls too::

        llm = RapidLLM.from_pretrained("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct")
        llm.invoke("When does the lease end?", context=contract)

    For LlamaIndex it is a ``FunctionCallingLLM``: its agents call their tools where the model's chat template
    takes tools (``metadata.is_function_calling_model``, which loads it), and are ReAct agents elsewhere. For
    LangChain, :class:`~rapid_integrations.ChatRapid` takes tools.

    Raises:
        ConfigurationError: An argument is unknown, out of range, or contradicts another.
    """

    # The one method both frameworks call with different arguments.

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        """LangChain's ``stream(input, config)``, or LlamaIndex's ``stream(template, **variables)``."""
        return _owner(args, kwargs).stream(self, *args, **kwargs)

    def astream(self, *args: Any, **kwargs: Any) -> Any:
        """LangChain's ``astream(input, config)``, or LlamaIndex's ``astream(template, **variables)``."""
        return _owner(args, kwargs).astream(self, *args, **kwargs)


def _owner(args: tuple[Any, ...], kwargs: dict[str, Any]) -> type[BaseLLM] | type[LLM]:
    prompt = args[0] if args else kwargs.get("prompt")
    return LLM if isinstance(prompt, BasePromptTemplate) else BaseLLM
