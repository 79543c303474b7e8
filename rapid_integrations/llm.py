"""RapidLLM: one local LLM that LangChain and LlamaIndex both take as their own."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import BaseLanguageModel
from langchain_core.language_models.llms import BaseLLM
from llama_index.core.llms import utils
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import BasePromptTemplate
from typing_extensions import override

from rapid_integrations.hosts.model import RapidModel
from rapid_integrations.langchain.llm import LangChainLLM
from rapid_integrations.llama_index.llm import LlamaIndexLLM


def _isinstance(instance: Any, kind: Any) -> bool:
    return isinstance(instance, kind) and not (kind is BaseLanguageModel and isinstance(instance, LLM))


# LlamaIndex's ``resolve_llm``, which ``Settings.llm = …``, ``as_query_engine(llm=…)`` and
# ``as_chat_engine(llm=…)`` call, wraps every LangChain model, even one that is LlamaIndex's own LLM already.
# A subclass cannot prevent that, so ``isinstance`` is shadowed in that one module. This can go when
# ``resolve_llm`` tests for LlamaIndex's ``LLM`` first.
utils.isinstance = _isinstance  # type: ignore[attr-defined] # a module global shadows the builtin


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

    @classmethod
    @override
    def get_lc_namespace(cls) -> list[str]:
        """The module that LangChain's loader imports the class from."""
        return ["rapid_integrations", "llm"]

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
