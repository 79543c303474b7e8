"""``FaissVectorStore``: a LangChain vector store over FAISS, saved without pickle.

:mod:`~rapid_integrations.langchain.vector_store_files` reads and writes its files. ``as_retriever()`` makes
it a retriever for the package's LLMs.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance
from typing_extensions import override

from rapid_integrations.errors import ConfigurationError, RetrievalError
from rapid_integrations.langchain.vector_store_files import read_folder, unreadable, write_folder
from rapid_integrations.retrieval.embedding import Vectors, unit_vectors

Filter = Callable[[Document], bool] | Mapping[str, Any]

# Loading embeds so many documents again and compares the vectors with the stored ones.
_NUM_PROBES = 4
# The distance of two unit vectors with a cosine of 0.9. Another precision or batch size moves a vector much
# less, another model moves it much further.
_MAX_DISTANCE = 0.2**0.5


class FaissVectorStore(VectorStore):
    """Finds documents by the cosine similarity of embeddings, in an exact search on the CPU.

    Scores are cosines; larger is better. A ``filter`` is a predicate on documents, or a dict of metadata that
    a document must have. All methods may be called from several threads::

        store = FaissVectorStore.from_texts(texts, embeddings)
        store.save("my-index")
        store = FaissVectorStore.load("my-index", embeddings)

    Args:
        embedding: LangChain embeddings; all vectors must have one dimension.
    """

    def __init__(self, embedding: Embeddings) -> None:
        self._embedding = embedding
        self._index: Any = None  # made when the first vector gives the dimension
        self._documents: dict[int, Document] = {}  # by the key of their vector in the index
        self._keys: dict[str, int] = {}  # by the id of the document
        self._next_key = 0
        self._lock = threading.RLock()

    @property
    @override
    def embeddings(self) -> Embeddings:
        """The embeddings that make the vectors."""
        return self._embedding

    def __len__(self) -> int:
        return len(self._documents)

    # Adding and deleting

    @override
    def add_documents(
        self, documents: list[Document], ids: list[str] | None = None, **kwargs: Any
    ) -> list[str]:
        """Add documents. A document with an existing id replaces the old one.

        Args:
            documents: The documents.
            ids: Their ids; by default the documents' own ids, or new ones.
            **kwargs: No further arguments are allowed.

        Returns:
            Their ids.

        Raises:
            RetrievalError: The number of ids differs from that of documents, or the embeddings are not finite
                vectors of the store's dimension.
        """
        _refuse_arguments(kwargs)
        vectors = self._embedding.embed_documents([document.page_content for document in documents])
        return self._add(documents, ids, vectors)

    @override
    async def aadd_documents(
        self, documents: list[Document], ids: list[str] | None = None, **kwargs: Any
    ) -> list[str]:
        """:meth:`add_documents`, with the embeddings' asynchronous method."""
        _refuse_arguments(kwargs)
        vectors = await self._embedding.aembed_documents([document.page_content for document in documents])
        return self._add(documents, ids, vectors)

    def _add(self, documents: Sequence[Document], ids: Sequence[str] | None, vectors: Any) -> list[str]:
        if ids is not None and len(ids) != len(documents):
            raise RetrievalError(
                f"{len(ids)} ids were given for {len(documents)} documents: give one for each."
            )
        if not documents:
            return []
        given_ids = [document.id for document in documents] if ids is None else ids
        all_ids = [given_id or str(uuid.uuid4()) for given_id in given_ids]
        unit_rows = self._unit_rows(vectors, len(documents))
        # The last of several documents with the same id is kept.
        positions = {document_id: position for position, document_id in enumerate(all_ids)}
        with self._lock:
            if self._index is None:
                self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(unit_rows.shape[1]))
            self._check_dimension(unit_rows)
            self._remove(positions)
            keys = range(self._next_key, self._next_key + len(positions))
            self._next_key += len(positions)
            self._index.add_with_ids(unit_rows[list(positions.values())], np.asarray(keys, dtype=np.int64))
            for key, (document_id, position) in zip(keys, positions.items(), strict=True):
                self._documents[key] = _copy(documents[position], document_id)
                self._keys[document_id] = key
        return all_ids

    @override
    def delete(self, ids: Sequence[str] | None = None, **kwargs: Any) -> bool:
        """Delete documents; unknown ids are ignored. ``None`` deletes all."""
        _refuse_arguments(kwargs)
        with self._lock:
            self._remove(list(self._keys) if ids is None else ids)
        return True

    def _remove(self, ids: Iterable[str]) -> None:
        keys = [
            self._keys.pop(document_id) for document_id in dict.fromkeys(ids) if document_id in self._keys
        ]
        for key in keys:
            del self._documents[key]
        if keys:
            self._index.remove_ids(np.asarray(keys, dtype=np.int64))

    # Searching

    @override
    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents with these ids, in the same order; unknown ids are ignored."""
        with self._lock:
            keys = [self._keys[document_id] for document_id in ids if document_id in self._keys]
            return [_copy(self._documents[key]) for key in keys]

    def similarity_search_with_score_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        filter: Filter | None = None,
    ) -> list[tuple[Document, float]]:
        """The ``k`` documents nearest to a vector, best first, with their cosines.

        Raises:
            RetrievalError: The vector does not have the store's dimension.
            ConfigurationError: ``k`` is not positive.
        """
        return [(document, score) for document, score, _ in self._search(embedding, k, filter)]

    @override
    def similarity_search_with_score(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The ``k`` documents nearest to a question, best first, with their cosines."""
        return self.similarity_search_with_score_by_vector(self._embedding.embed_query(query), k, **kwargs)

    @override
    async def asimilarity_search_with_score(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """:meth:`similarity_search_with_score`, with the embeddings' asynchronous method."""
        vector = await self._embedding.aembed_query(query)
        return self.similarity_search_with_score_by_vector(vector, k, **kwargs)

    @override
    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The ``k`` documents nearest to a question, best first."""
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    @override
    async def asimilarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """:meth:`similarity_search`, with the embeddings' asynchronous method."""
        return [document for document, _ in await self.asimilarity_search_with_score(query, k, **kwargs)]

    @override
    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, **kwargs: Any
    ) -> list[Document]:
        """The ``k`` documents nearest to a vector, best first."""
        nearest = self.similarity_search_with_score_by_vector(embedding, k, **kwargs)
        return [document for document, _ in nearest]

    @override
    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """``k`` of the ``fetch_k`` nearest documents that are near the vector and unlike each other."""
        _refuse_arguments(kwargs)
        nearest = self._search(embedding, max(k, fetch_k), filter)
        if not nearest:
            return []
        vectors = [vector for _, _, vector in nearest]
        query = np.asarray(embedding, dtype=np.float32)
        chosen = maximal_marginal_relevance(query, vectors, lambda_mult=lambda_mult, k=k)
        return [nearest[i][0] for i in chosen]

    @override
    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """``k`` of the ``fetch_k`` nearest documents that are near the question and unlike each other."""
        vector = self._embedding.embed_query(query)
        return self.max_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, **kwargs)

    @override
    async def amax_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """:meth:`max_marginal_relevance_search`, with the embeddings' asynchronous method."""
        vector = await self._embedding.aembed_query(query)
        return self.max_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, **kwargs)

    @override
    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: min(max((cosine + 1) / 2, 0.0), 1.0)

    def _search(
        self, embedding: Any, k: int, filter: Filter | None
    ) -> list[tuple[Document, float, list[float]]]:
        """The ``k`` nearest documents that match ``filter``, with their cosines and vectors."""
        if k < 1:
            raise ConfigurationError(f"k={k} is not allowed: a search finds at least 1 document.")
        row = self._unit_rows([embedding], 1)
        with self._lock:
            if not self._documents:
                return []
            self._check_dimension(row)
            parameters = None
            if filter is not None:
                keys = [key for key, document in self._documents.items() if _matches(document, filter)]
                if not keys:
                    return []
                allowed = faiss.IDSelectorBatch(np.asarray(keys, dtype=np.int64))
                parameters = faiss.SearchParameters(sel=allowed)  # type: ignore[call-arg] # not in its stubs
                k = min(k, len(keys))
            scores, keys = self._index.search(row, min(k, len(self._documents)), params=parameters)
            return [
                (_copy(self._documents[key]), float(score), self._index.reconstruct(key).tolist())
                for key, score in zip(keys[0].tolist(), scores[0].tolist(), strict=True)
                if key >= 0
            ]

    def _unit_rows(self, vectors: Any, count: int) -> Vectors:
        return unit_vectors(vectors, count, type(self._embedding).__name__)

    def _check_dimension(self, rows: Any) -> None:
        if rows.shape[1] != self._index.d:
            raise RetrievalError(
                f"a vector has {rows.shape[1]} dimensions and the store {self._index.d}: use the embeddings "
                "that the store was made with."
            )

    # Building, saving and loading

    @classmethod
    @override
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> FaissVectorStore:
        """A store with these texts."""
        store = cls(embedding)
        store.add_texts(texts, metadatas, ids=ids, **kwargs)
        return store

    @classmethod
    @override
    async def afrom_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> FaissVectorStore:
        """:meth:`from_texts`, with the embeddings' asynchronous method."""
        store = cls(embedding)
        await store.aadd_texts(texts, metadatas, ids=ids, **kwargs)
        return store

    def save(self, folder: str | Path) -> None:
        """Write the store to ``folder``: a FAISS file with the vectors, and JSON with the documents.

        The new store replaces an existing one in one atomic step. A save that fails or is interrupted leaves
        the existing store intact.

        Raises:
            RetrievalError: The store is empty, or JSON cannot hold a document's metadata.
        """
        with self._lock:
            if not self._documents:
                raise RetrievalError("the store is empty: there is nothing to save.")
            documents = [
                {"key": key, "id": d.id, "text": d.page_content, "metadata": d.metadata}
                for key, d in self._documents.items()
            ]
            write_folder(Path(folder), self._index, documents)

    @classmethod
    def load(cls, folder: str | Path, embedding: Embeddings) -> FaissVectorStore:
        """Read a store that :meth:`save` wrote.

        Args:
            folder: The folder given to :meth:`save`.
            embedding: The embeddings that the store was made with. A few documents are embedded again and
                compared with the stored vectors.

        Raises:
            RetrievalError: A file is missing or damaged, the files disagree in count, keys or dimension, or
                the embeddings differ from those that the store was made with.
        """
        folder = Path(folder)
        index, entries = read_folder(folder)
        try:
            documents = {int(entry["key"]): _read_document(entry) for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise unreadable(folder, error) from error
        vector_keys = set(faiss.vector_to_array(index.id_map).tolist())
        keys = {document.id: key for key, document in documents.items() if document.id is not None}
        if vector_keys != set(documents) or len(keys) != len(vector_keys):
            raise RetrievalError(
                f"{folder} is damaged: the keys of its vectors and documents differ, or two documents have "
                "the same id. Build and save it again."
            )
        store = cls(embedding)
        store._index, store._documents, store._keys = index, documents, keys
        store._next_key = max(vector_keys) + 1
        store._check_embedding()
        return store

    def _check_embedding(self) -> None:
        """Raise if the embeddings give other vectors than the stored ones."""
        step = max(1, len(self._documents) // _NUM_PROBES)
        keys = list(self._documents)[::step][:_NUM_PROBES]
        texts = [self._documents[key].page_content for key in keys]
        rows = self._unit_rows(self._embedding.embed_documents(texts), len(texts))
        self._check_dimension(rows)
        for row, key in zip(rows, keys, strict=True):
            stored = self._index.reconstruct(key)
            if np.linalg.norm(row - stored) > _MAX_DISTANCE:
                raise RetrievalError(
                    f"{type(self._embedding).__name__} embeds a document of the store as another vector than "
                    f"the stored one (their cosine is {float(row @ stored):.2f}): load the store with the "
                    "embeddings that it was made with, or build it again."
                )


def _read_document(entry: Any) -> Document:
    document_id, text, metadata = entry["id"], entry["text"], entry["metadata"]
    if not isinstance(document_id, str) or not isinstance(text, str) or not isinstance(metadata, dict):
        raise ValueError(f"not a document: {entry!r:.80}")
    return Document(text, id=document_id, metadata=metadata)


def _copy(document: Document, document_id: str | None = None) -> Document:
    """A copy, because the caller may change a document's metadata."""
    return Document(document.page_content, id=document_id or document.id, metadata=dict(document.metadata))


def _matches(document: Document, filter: Filter) -> bool:
    if callable(filter):
        return bool(filter(_copy(document)))
    return all(
        name in document.metadata and document.metadata[name] == value for name, value in filter.items()
    )


def _refuse_arguments(arguments: Mapping[str, Any]) -> None:
    if arguments:
        raise ConfigurationError(f"FaissVectorStore does not take {', '.join(sorted(arguments))} here.")
