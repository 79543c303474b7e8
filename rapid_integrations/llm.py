"""RapidLLM: one local LLM class that is both a LangChain ``BaseLLM`` and a LlamaIndex ``LLM``.

The methods are in :mod:`rapid_integrations.langchain.llm` and :mod:`rapid_integrations.llama_index.llm`. This
module combines them, and resolves the two conflicts between the frameworks.
"""

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


# First conflict: LlamaIndex's ``resolve_llm`` (called by ``Settings.llm = …``, ``as_query_engine(llm=…)`` and
# ``as_chat_engine(llm=…)``) wraps every LangChain model, even one that is already a LlamaIndex ``LLM``. A
# subclass cannot prevent that, so ``isinstance`` is shadowed in that one module of LlamaIndex. Remove this
# when ``resolve_llm`` tests for LlamaIndex's ``LLM`` first.
utils.isinstance = _isinstance  # type: ignore[attr-defined] # a module global shadows the builtin


class RapidLLM(RapidModel, LangChainLLM, LlamaIndexLLM):  # type: ignore[misc] # to_json is LangChain's here
    """An LLM of both frameworks that drafts from retrieved chunks and answers over the whole document.

    Use it wherever either framework accepts an LLM. The models are loaded at the first use; LLMs over the
    same models share one engine. Every option of :class:`~rapid_integrations.config.GenerationOptions` is an
    argument of the constructor and of each call (``llm.invoke(prompt, temperature=0.7)``). Calls also accept
    ``query=``, ``context=``, ``retriever=`` and ``on_event=``, a function that receives every event of the
    pipeline's stream and bypasses caches::

        llm = RapidLLM.from_pretrained("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct")
        llm.invoke("When does the lease end?", context=contract)

    For LlamaIndex it is a ``FunctionCallingLLM``. LlamaIndex's agents call tools through it if the model's
    chat template supports tools (``metadata.is_function_calling_model``, which loads the model); otherwise
    they are ReAct agents. For tools in LangChain use :class:`~rapid_integrations.ChatRapid`.

    Raises:
        ConfigurationError: An argument is unknown, not allowed, or contradicts another.
    """

    @classmethod
    @override
    def get_lc_namespace(cls) -> list[str]:
        """The module path under which LangChain stores the class; part of the stored format."""
        return ["rapid_integrations", "llm"]

    # Second conflict: both frameworks have methods of these names with different arguments.

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        """LangChain's ``stream(input, config)``, or LlamaIndex's ``stream(template, **variables)``."""
        return _framework_class(args, kwargs).stream(self, *args, **kwargs)

    def astream(self, *args: Any, **kwargs: Any) -> Any:
        """LangChain's ``astream(input, config)``, or LlamaIndex's ``astream(template, **variables)``."""
        return _framework_class(args, kwargs).astream(self, *args, **kwargs)


def _framework_class(args: tuple[Any, ...], kwargs: dict[str, Any]) -> type[BaseLLM] | type[LLM]:
    prompt = args[0] if args else kwargs.get("prompt")
    return LLM if isinstance(prompt, BasePromptTemplate) else BaseLLM
