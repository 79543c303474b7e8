"""Ranking a document's chunks by the cosine similarity of embeddings, with FAISS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import faiss

from rapid_integrations.errors import RetrievalError
from rapid_integrations.retrieval.base import Chunk
from rapid_integrations.retrieval.embedding import as_embedder


class DenseIndex:
    """Ranks chunks by cosine similarity to the question, in an exact search, on a GPU if faiss has one.

    Args:
        chunks: The chunks to search.
        embeddings: Any embeddings that :func:`~rapid_integrations.retrieval.embedding.as_embedder` takes.

    Raises:
        RetrievalError: The embeddings are not one finite vector for each chunk.
        ConfigurationError: The type of ``embeddings`` is not supported.
    """

    name = "dense"
    scores_are_cosine = True

    def __init__(self, chunks: Sequence[Chunk], embeddings: Any) -> None:
        self._embedder = as_embedder(embeddings)
        self._chunks = [chunk for chunk in chunks if chunk.text.strip()]
        self._index: Any = None
        if self._chunks:
            vectors = self._embedder.documents([chunk.text for chunk in self._chunks])
            index = faiss.IndexFlatIP(vectors.shape[1])
            index.add(vectors)
            self._index = _to_gpu(index)

    def retrieve(self, query: str, context: str = "", *, max_tokens: int = 0) -> list[Chunk]:
        """All chunks, best first, with cosine similarities as scores.

        Raises:
            RetrievalError: The question's vector has another dimension than the chunks'.
        """
        if self._index is None or not query.strip():
            return []
        vector = self._embedder.query(query)
        if vector.shape[1] != self._index.d:
            raise RetrievalError(
                f"{self._embedder.name!r} gives questions vectors of {vector.shape[1]} dimensions and chunks "
                f"vectors of {self._index.d}: use embeddings with the same dimension for both."
            )
        scores, order = self._index.search(vector, len(self._chunks))
        return [
            Chunk(self._chunks[i].text, self._chunks[i].position, float(score))
            for i, score in zip(order[0].tolist(), scores[0].tolist(), strict=True)
            if i >= 0
        ]


def _num_gpus() -> int:
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def _to_gpu(index: Any) -> Any:
    return faiss.index_cpu_to_all_gpus(index, ngpu=1) if _num_gpus() else index
