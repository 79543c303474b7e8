"""Finding the drafter's context: the passages of a long document that the drafter reads."""

from rapid_integrations.retrieval.adapters import as_retriever
from rapid_integrations.retrieval.base import Chunk, Retriever
from rapid_integrations.retrieval.context import DrafterContext, RetrievedContext

__all__ = ["Chunk", "DrafterContext", "RetrievedContext", "Retriever", "as_retriever"]
