"""One interface for the embedding models of both frameworks and of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rapid_integrations.errors import ConfigurationError, RetrievalError

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Embedder:
    """Turns texts into vectors.

    Attributes:
        name: The name of the model or the class.
        embed_documents: Maps texts to one vector each.
        embed_query: Maps a question to a vector.
    """

    name: str
    embed_documents: Callable[[list[str]], Any]
    embed_query: Callable[[str], Any]

    def documents(self, texts: Sequence[str]) -> Vectors:
        """``[texts, dimension]`` float32, each of length 1."""
        return unit_vectors(self.embed_documents(list(texts)), len(texts), self.name)

    def query(self, text: str) -> Vectors:
        """``[1, dimension]`` float32 of length 1."""
        return unit_vectors([self.embed_query(text)], 1, self.name)


def unit_vectors(vectors: Any, count: int, name: str) -> Vectors:
    """Normalise vectors to length 1: ``[count, dimension]`` float32. Zero vectors stay zero.

    Args:
        vectors: The output of embeddings, in any form that numpy converts to an array.
        count: The expected number of vectors.
        name: The name of the embeddings, for messages.

    Raises:
        RetrievalError: The output is not one vector of finite numbers for each text.
    """
    array = np.asarray(vectors, dtype=np.float32)
    if array.ndim != 2 or len(array) != count or not array.size or not np.isfinite(array).all():
        raise RetrievalError(
            f"the embeddings {name!r} gave an array of shape {array.shape} for {count} texts: expected is "
            "one vector of finite numbers for each text."
        )
    length = np.linalg.norm(array, axis=1, keepdims=True)
    return np.ascontiguousarray(array / np.where(length > 0, length, 1), dtype=np.float32)


def as_embedder(embeddings: Any) -> Embedder:
    """Make an :class:`Embedder` of embeddings of any supported type.

    Args:
        embeddings: LangChain ``Embeddings``, a LlamaIndex ``BaseEmbedding``, an object with
            ``encode(texts)``, or the name or folder of a sentence-transformers model.

    Raises:
        ConfigurationError: The type is not supported, or a name was given and sentence-transformers is not
            installed.
    """
    if isinstance(embeddings, Embedder):
        return embeddings
    if isinstance(embeddings, str):
        return _sentence_transformer(embeddings)
    name = type(embeddings).__name__
    if _has(embeddings, "embed_documents", "embed_query"):
        return Embedder(name, embeddings.embed_documents, embeddings.embed_query)
    if _has(embeddings, "get_text_embedding_batch", "get_query_embedding"):
        return Embedder(name, embeddings.get_text_embedding_batch, embeddings.get_query_embedding)
    if _has(embeddings, "encode_document", "encode_query"):
        return Embedder(name, embeddings.encode_document, embeddings.encode_query)
    if _has(embeddings, "encode"):
        return Embedder(name, embeddings.encode, lambda text: embeddings.encode([text])[0])
    raise ConfigurationError(
        f"embeddings={name} is not allowed: give LangChain Embeddings, a LlamaIndex BaseEmbedding, an object "
        "with encode(texts), or the name of a sentence-transformers model."
    )


def _has(obj: Any, *methods: str) -> bool:
    return not isinstance(obj, type) and all(callable(getattr(obj, method, None)) for method in methods)


def _sentence_transformer(name: str) -> Embedder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigurationError(
            f"embeddings={name!r} names a sentence-transformers model, and that package is not installed: "
            "pip install 'rapid-integrations[embeddings]', or pass an embeddings object."
        ) from error
    model = as_embedder(SentenceTransformer(name))
    return Embedder(name, model.embed_documents, model.embed_query)
