"""A local LLM for LangChain and LlamaIndex that answers over whole long documents, fast (RAPID).

Importing the package imports neither torch nor a framework: each public name is loaded at its first use.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rapid_integrations.lazy_names import load_lazily

if TYPE_CHECKING:
    from rapid_integrations.config import (
        EngineLimits,
        GenerationOptions,
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
    from rapid_integrations.events import Completion, PrefillProgress, TextDelta
    from rapid_integrations.langchain import (
        ChatRapid,
        FaissVectorStore,
        RapidChatPromptTemplate,
        RapidPromptTemplate,
        create_rapid_chain,
    )
    from rapid_integrations.llama_index import (
        RapidDecodeEvent,
        RapidPrefillEvent,
        RapidQueryEngine,
        RapidRetrievalEvent,
    )
    from rapid_integrations.llm import RapidLLM
    from rapid_integrations.pipeline import RapidPipeline
    from rapid_integrations.prompts import PromptParts
    from rapid_integrations.retrieval import Chunk, RetrievedContext, Retriever
    from rapid_integrations.structured.output_format import OutputFormat

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

_load, __dir__ = load_lazily(
    __name__,
    {
        "config": (
            "EngineLimits",
            "GenerationOptions",
            "RetrievalParams",
            "SamplingParams",
            "SpeculationParams",
        ),
        "engine.stats": ("RapidStats", "RetrievedChunk"),
        "errors": (
            "ConfigurationError",
            "ContextLengthError",
            "DeadlineExceededError",
            "DocumentError",
            "EngineClosedError",
            "EngineMemoryError",
            "GenerationError",
            "PromptError",
            "QueueFullError",
            "RapidError",
            "RetrievalError",
            "ShapeMismatchError",
            "ToolCallError",
            "UnsupportedModelError",
            "VocabularyMismatchError",
        ),
        "events": ("Completion", "PrefillProgress", "TextDelta"),
        "langchain": (
            "ChatRapid",
            "FaissVectorStore",
            "RapidChatPromptTemplate",
            "RapidPromptTemplate",
            "create_rapid_chain",
        ),
        "llama_index": (
            "RapidDecodeEvent",
            "RapidPrefillEvent",
            "RapidQueryEngine",
            "RapidRetrievalEvent",
        ),
        "llm": ("RapidLLM",),
        "structured.output_format": ("OutputFormat",),
        "pipeline": ("RapidPipeline",),
        "prompts": ("PromptParts",),
        "retrieval": ("Chunk", "RetrievedContext", "Retriever"),
    },
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("rapid-integrations")
    return _load(name)
