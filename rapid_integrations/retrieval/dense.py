"""Cosine similarity over a document's chunks, in FAISS."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss

from rapid_integrations.errors import RetrievalError
from rapid_integrations.retrieval.base import Chunk
from rapid_integrations.retrieval.embedding import as_embedder

_VECTORS, _CHUNKS, _VERSION = "index.faiss", "chunks.json", 1


class DenseIndex:
    """Ranks chunks by cosine with the question's embedding: exact search, on the GPU where faiss has one.

    Args:
        chunks: What to search.
        embeddings: Anything :func:`~rapid_integrations.retrieval.embedding.as_embedder` takes.

    Raises:
        RetrievalError: The embeddings are not one finite vector a chunk.
        ConfigurationError: ``embeddings`` is not a kind that is known.
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
        """All chunks, best first, scored by cosine.

        Raises:
            RetrievalError: The question's vector has another dimension than the chunks'.
        """
        if self._index is None or not query.strip():
            return []
        vector = self._embedder.query(query)
        if vector.shape[1] != self._index.d:
            raise RetrievalError(
                f"{self._embedder.name!r} gives vectors of {vector.shape[1]} dimensions; the index has "
                f"{self._index.d}. Use the embeddings the index was built with."
            )
        scores, order = self._index.search(vector, len(self._chunks))
        return [
            Chunk(self._chunks[i].text, self._chunks[i].position, float(score))
            for i, score in zip(order[0].tolist(), scores[0].tolist(), strict=True)
            if i >= 0
        ]

    def save(self, folder: str | Path) -> None:
        """Write the index to ``folder``: FAISS's own file for the vectors, JSON for the chunks.

        Raises:
            RetrievalError: The index has no chunks.
        """
        if self._index is None:
            raise RetrievalError("the index has no chunks: there is nothing to save.")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        faiss.write_index(_to_cpu(self._index), str(folder / _VECTORS))
        described = {
            "version": _VERSION,
            "dimension": self._index.d,
            "count": len(self._chunks),
            "chunks": [{"text": chunk.text, "position": chunk.position} for chunk in self._chunks],
        }
        (folder / _CHUNKS).write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, embeddings: Any) -> DenseIndex:
        """Read an index that :meth:`save` wrote.

        Args:
            folder: Where it is.
            embeddings: The embeddings it was built with.

        Raises:
            RetrievalError: A file is missing or damaged, or the two disagree in count or dimension.
        """
        folder = Path(folder)
        try:
            described = json.loads((folder / _CHUNKS).read_text(encoding="utf-8"))
            chunks = [_read_chunk(entry) for entry in described["chunks"]]
            version, count, dimension = (described[key] for key in ("version", "count", "dimension"))
            index = faiss.read_index(str(folder / _VECTORS))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise RetrievalError(
                f"{folder} holds no index that can be read ({error}): it needs {_VECTORS} and {_CHUNKS}, "
                "as save() writes them."
            ) from error
        if version != _VERSION:
            raise RetrievalError(
                f"{folder} holds an index of version {version!r}; this package reads {_VERSION}."
            )
        if not (isinstance(index, faiss.IndexFlat) and index.metric_type == faiss.METRIC_INNER_PRODUCT):
            raise RetrievalError(
                f"{folder / _VECTORS} is no flat inner-product index: build and save it anew."
            )
        if not (index.ntotal == count == len(chunks) and index.d == dimension):
            raise RetrievalError(
                f"{folder} is damaged: {_CHUNKS} describes {count} vectors of {dimension} dimensions and has "
                f"{len(chunks)} chunks, {_VECTORS} has {index.ntotal} of {index.d}. Build and save it anew."
            )
        self = cls((), embeddings)
        self._chunks, self._index = chunks, _to_gpu(index)
        return self


def _read_chunk(entry: dict[str, Any]) -> Chunk:
    text, position = entry["text"], entry["position"]
    if not isinstance(text, str) or not (position is None or isinstance(position, int)):
        raise ValueError(f"not a chunk: {entry!r:.80}")
    return Chunk(text, position)


def _num_gpus() -> int:
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def _to_gpu(index: Any) -> Any:
    return faiss.index_cpu_to_all_gpus(index, ngpu=1) if _num_gpus() else index


def _to_cpu(index: Any) -> Any:
    return faiss.index_gpu_to_cpu(index) if _num_gpus() else index
