"""LlamaIndex: the LLM, the query engine over whole documents, and the events of an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rapid_integrations.lazy_names import load_lazily

if TYPE_CHECKING:
    from rapid_integrations.llama_index.events import (
        RapidDecodeEvent,
        RapidPrefillEvent,
        RapidRetrievalEvent,
    )
    from rapid_integrations.llama_index.llm import LlamaIndexLLM, RapidMetadata
    from rapid_integrations.llama_index.query_engine import RapidQueryEngine

__all__ = [
    "LlamaIndexLLM",
    "RapidDecodeEvent",
    "RapidMetadata",
    "RapidPrefillEvent",
    "RapidQueryEngine",
    "RapidRetrievalEvent",
]

__getattr__, __dir__ = load_lazily(
    __name__,
    {
        "events": ("RapidDecodeEvent", "RapidPrefillEvent", "RapidRetrievalEvent"),
        "llm": ("LlamaIndexLLM", "RapidMetadata"),
        "query_engine": ("RapidQueryEngine",),
    },
)
