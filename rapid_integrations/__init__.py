"""A local LLM for LangChain and LlamaIndex that answers over whole long documents, fast (RAPID).

Importing the package imports neither torch nor a framework: a public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rapid_integrations.chat import ChatRapid
    from rapid_integrations.config import (
        EngineLimits,
        GenerationOptions,
        OutputFormat,
        RetrievalParams,
        SamplingParams,
        SpeculationParams,
    )
    from rapid_integrations.engine.stats import RapidStats, RetrievedChunk
    from rapid_integrations.errors import (
        ConfigurationError,
        ContextLengthError,
        DeadlineExceededError,
        DocumentError,
        EngineClosedError,
        EngineMemoryError,
        GenerationError,
        PromptError,
        QueueFullError,
        RapidError,
        RetrievalError,
        ShapeMismatchError,
        ToolCallError,
        UnsupportedModelError,
        VocabularyMismatchError,
    )
    from rapid_integrations.langchain_chain import create_rapid_chain
    from rapid_integrations.langchain_faiss import FaissVectorStore
    from rapid_integrations.langchain_prompts import RapidChatPromptTemplate, RapidPromptTemplate
    from rapid_integrations.llama_index_events import RapidDecodeEvent, RapidPrefillEvent, RapidRetrievalEvent
    from rapid_integrations.llm import RapidLLM
    from rapid_integrations.pipeline import Completion, PrefillProgress, RapidPipeline, TextDelta
    from rapid_integrations.prompts import PromptParts
    from rapid_integrations.query_engine import RapidQueryEngine
    from rapid_integrations.retrieval.base import Chunk, Retriever
    from rapid_integrations.retrieval.context import RetrievedContext

__all__ = [
    "ChatRapid",
    "Chunk",
    "Completion",
    "ConfigurationError",
    "ContextLengthError",
    "DeadlineExceededError",
    "DocumentError",
    "EngineClosedError",
    "EngineLimits",
    "EngineMemoryError",
    "FaissVectorStore",
    "GenerationError",
    "GenerationOptions",
    "OutputFormat",
    "PrefillProgress",
    "PromptError",
    "PromptParts",
    "QueueFullError",
    "RapidChatPromptTemplate",
    "RapidDecodeEvent",
    "RapidError",
    "RapidLLM",
    "RapidPipeline",
    "RapidPrefillEvent",
    "RapidPromptTemplate",
    "RapidQueryEngine",
    "RapidRetrievalEvent",
    "RapidStats",
    "RetrievalError",
    "RetrievalParams",
    "RetrievedChunk",
    "RetrievedContext",
    "Retriever",
    "SamplingParams",
    "ShapeMismatchError",
    "SpeculationParams",
    "TextDelta",
    "ToolCallError",
    "UnsupportedModelError",
    "VocabularyMismatchError",
    "create_rapid_chain",
]

_MODULES = {
    "chat": ("ChatRapid",),
    "config": (
        "EngineLimits",
        "GenerationOptions",
        "OutputFormat",
        "RetrievalParams",
        "SamplingParams",
        "SpeculationParams",
    ),
    "engine.stats": ("RapidStats", "RetrievedChunk"),
    "langchain_chain": ("create_rapid_chain",),
    "langchain_faiss": ("FaissVectorStore",),
    "langchain_prompts": ("RapidChatPromptTemplate", "RapidPromptTemplate"),
    "llama_index_events": ("RapidDecodeEvent", "RapidPrefillEvent", "RapidRetrievalEvent"),
    "llm": ("RapidLLM",),
    "pipeline": ("Completion", "PrefillProgress", "RapidPipeline", "TextDelta"),
    "prompts": ("PromptParts",),
    "query_engine": ("RapidQueryEngine",),
    "retrieval.base": ("Chunk", "Retriever"),
    "retrieval.context": ("RetrievedContext",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("rapid-integrations")
    elif name in __all__:
        # Everything that has no other home is an error.
        value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
