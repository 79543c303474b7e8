"""Finding what of a long document the drafter reads. Imports no host framework."""

from rapid_integrations.retrieval.base import Chunk, Retriever
from rapid_integrations.retrieval.context import DrafterContext, RetrievedContext
from rapid_integrations.retrieval.hosts import as_retriever

__all__ = ["Chunk", "DrafterContext", "RetrievedContext", "Retriever", "as_retriever"]
