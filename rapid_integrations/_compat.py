"""LlamaIndex's ``resolve_llm`` must take an LLM that belongs to both frameworks as it is.

``resolve_llm`` stands behind ``Settings.llm = …``, ``as_query_engine(llm=…)`` and ``as_chat_engine(llm=…)``.
It asks ``isinstance(llm, BaseLanguageModel)`` first and wraps every LangChain model, even one that is
LlamaIndex's own already. No subclass can avoid that, so ``isinstance`` is shadowed in that one module. It can
go once ``resolve_llm`` asks for LlamaIndex's ``LLM`` first.
"""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import BaseLanguageModel
from llama_index.core.llms import utils
from llama_index.core.llms.llm import LLM


def _isinstance(instance: Any, kind: Any) -> bool:
    return isinstance(instance, kind) and not (kind is BaseLanguageModel and isinstance(instance, LLM))


def resolve_dual_llms() -> None:
    """Let ``resolve_llm`` return an LLM of both frameworks unwrapped. Calling it again changes nothing."""
    utils.isinstance = _isinstance  # type: ignore[attr-defined] # a module global shadows the builtin
