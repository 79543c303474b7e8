"""A local LLM for LangChain and LlamaIndex that answers over whole long documents, fast (RAPID).

Importing the package imports neither torch nor a framework: a public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        UnsupportedModelError,
        VocabularyMismatchError,
    )
    from rapid_integrations.langchain_prompts import RapidChatPromptTemplate, RapidPromptTemplate
    from rapid_integrations.llm import RapidLLM
    from rapid_integrations.pipeline import Completion, PrefillProgress, RapidPipeline, TextDelta
    from rapid_integrations.prompts import PromptParts
    from rapid_integrations.retrieval.base import Chunk, Retriever

__all__ = [
    "Chunk",
    "Completion",
    "ConfigurationError",
    "ContextLengthError",
    "DeadlineExceededError",
    "DocumentError",
    "EngineClosedError",
    "EngineLimits",
    "EngineMemoryError",
    "GenerationError",
    "GenerationOptions",
    "OutputFormat",
    "PrefillProgress",
    "PromptError",
    "PromptParts",
    "QueueFullError",
    "RapidChatPromptTemplate",
    "RapidError",
    "RapidLLM",
    "RapidPipeline",
    "RapidPromptTemplate",
    "RapidStats",
    "RetrievalError",
    "RetrievalParams",
    "RetrievedChunk",
    "Retriever",
    "SamplingParams",
    "ShapeMismatchError",
    "SpeculationParams",
    "TextDelta",
    "UnsupportedModelError",
    "VocabularyMismatchError",
]

_MODULES = {
    "config": (
        "EngineLimits",
        "GenerationOptions",
        "OutputFormat",
        "RetrievalParams",
        "SamplingParams",
        "SpeculationParams",
    ),
    "engine.stats": ("RapidStats", "RetrievedChunk"),
    "langchain_prompts": ("RapidChatPromptTemplate", "RapidPromptTemplate"),
    "llm": ("RapidLLM",),
    "pipeline": ("Completion", "PrefillProgress", "RapidPipeline", "TextDelta"),
    "prompts": ("PromptParts",),
    "retrieval.base": ("Chunk", "Retriever"),
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
