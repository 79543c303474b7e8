"""Adapters from the retrievers of LangChain and LlamaIndex, and from plain callables, to :class:`Retriever`.

No framework is imported: objects are recognised by the names of their base classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rapid_integrations.errors import ConfigurationError, RetrievalError
from rapid_integrations.retrieval.base import Chunk, Retriever

_ALLOWED = (
    "a LangChain BaseRetriever or VectorStore, a LlamaIndex BaseRetriever or index, an object with name, "
    "scores_are_cosine and retrieve(query, context, max_tokens=...), or a function from a query to chunks"
)


@dataclass(frozen=True, slots=True)
class HostRetriever:
    """Adapts a host's retriever, or a function, to :class:`~rapid_integrations.retrieval.base.Retriever`.

    Attributes:
        name: The name of the class or function.
        call: Maps a query to the host's result.
        scores_are_cosine: Always false: the meaning of a host's scores is unknown.
    """

    name: str
    call: Callable[[str], Any]
    scores_are_cosine: bool = False

    def retrieve(self, query: str, context: str, *, max_tokens: int) -> Sequence[Chunk]:
        """Call the host's retriever and convert its result.

        Raises:
            RetrievalError: The result is not a sequence of chunks.
        """
        return read_chunks(self.call(query), self.name)


def as_retriever(obj: Any) -> Retriever:
    """Make a :class:`~rapid_integrations.retrieval.base.Retriever` of a retriever of any supported type.

    Args:
        obj: A LangChain ``BaseRetriever`` (or any runnable from a query to documents) or ``VectorStore``; a
            LlamaIndex ``BaseRetriever`` or index; an object that implements
            :class:`~rapid_integrations.retrieval.base.Retriever`; or a callable ``query -> chunks``. A chunk
            is a string, a :class:`~rapid_integrations.retrieval.base.Chunk`, a document or node of either
            framework, or a pair of one of these and its score.

    Raises:
        ConfigurationError: The type is not supported.
        RetrievalError: ``as_retriever()`` of a vector store or index failed.
    """
    if obj is None or isinstance(obj, (str, bytes, type)):
        raise ConfigurationError(f"retriever={obj!r} is not allowed: a retriever is {_ALLOWED}.")
    name = type(obj).__name__
    if call := _retriever_call(obj):
        return HostRetriever(name, call)
    if isinstance(obj, Retriever) and isinstance(obj.name, str):
        return obj
    if callable(getattr(obj, "as_retriever", None)):
        try:
            inner = obj.as_retriever()
        except Exception as error:
            raise RetrievalError(f"{name}.as_retriever() failed: {_one_line(error)}") from error
        call = _retriever_call(inner)
        return HostRetriever(name, call) if call else as_retriever(inner)
    if inherits(obj, "langchain_core", "Runnable"):
        return HostRetriever(name, obj.invoke)
    if callable(obj):
        return HostRetriever(getattr(obj, "__name__", name), obj)
    raise ConfigurationError(f"retriever={name} is not allowed: a retriever is {_ALLOWED}.")


def inherits(obj: Any, package: str, base: str) -> bool:
    """Whether ``obj`` has a base class of this name from this package, without importing the package."""
    return any(
        cls.__name__ == base and cls.__module__.split(".", 1)[0] == package for cls in type(obj).__mro__
    )


def _retriever_call(obj: Any) -> Callable[[str], Any] | None:
    for package, method in (("langchain_core", "invoke"), ("llama_index", "retrieve")):
        if inherits(obj, package, "BaseRetriever"):
            call: Callable[[str], Any] = getattr(obj, method)
            return call
    return None


def read_chunks(found: Any, name: str) -> list[Chunk]:
    """Convert the result of a host's retriever.

    Raises:
        RetrievalError: The result is not a sequence, or contains an item that is not a chunk.
    """
    if isinstance(found, (str, Chunk)):
        found = [found]
    if not isinstance(found, Iterable) or isinstance(found, dict):
        if hasattr(found, "close") and hasattr(found, "__await__"):
            found.close()  # otherwise Python warns that the coroutine was never awaited
        raise RetrievalError(
            f"{name} returned {type(found).__name__}: expected is a sequence of strings, documents, nodes or "
            "chunks."
        )
    return [_read_chunk(item, name) for item in found]


def _read_chunk(item: Any, name: str) -> Chunk:
    if isinstance(item, Chunk):
        return item
    if isinstance(item, str):
        return Chunk(item)
    if isinstance(item, (tuple, list)) and len(item) == 2:
        chunk = _read_chunk(item[0], name)
        return Chunk(chunk.text, chunk.position, _score(item[1], name))
    if isinstance(text := getattr(item, "page_content", None), str):
        return Chunk(text)
    if (node := getattr(item, "node", None)) is not None:
        return Chunk(_read_chunk(node, name).text, score=_score(getattr(item, "score", None), name))
    if callable(content := getattr(item, "get_content", None)) and isinstance(text := content(), str):
        return Chunk(text)
    raise RetrievalError(
        f"{name} returned a {type(item).__name__} among its chunks: a chunk is a string, a Chunk, a "
        "document or node of LangChain or LlamaIndex, or a pair of one of these and its score."
    )


def _score(score: Any, name: str) -> float | None:
    try:
        return None if score is None else float(score)
    except (TypeError, ValueError) as error:
        raise RetrievalError(f"{name} returned the score {score!r}: a score is a number or None.") from error


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
