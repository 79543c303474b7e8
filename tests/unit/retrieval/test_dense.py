"""Tests of the dense index."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from llama_index.core.base.embeddings.base import BaseEmbedding

from rapid_integrations.errors import RetrievalError
from rapid_integrations.retrieval import dense
from rapid_integrations.retrieval.base import Chunk, Retriever
from rapid_integrations.retrieval.dense import DenseIndex

CHUNKS = [Chunk("ships and tar", 0), Chunk("salt and barrels", 1), Chunk(" \n", 2), Chunk("captains", 3)]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letter_counts(text):
    return [float(text.count(letter)) for letter in LETTERS]


class LetterEmbedding(BaseEmbedding):
    """Counts letters, so that similar words have similar vectors."""

    def _get_query_embedding(self, query):
        return letter_counts(query)

    async def _aget_query_embedding(self, query):
        return letter_counts(query)

    def _get_text_embedding(self, text):
        return letter_counts(text)


class Encoder:
    def encode(self, texts):
        return np.array([letter_counts(text) for text in texts])


class TwoSidedEncoder(Encoder):
    def encode_query(self, text):
        return np.array(letter_counts(text))

    def encode_document(self, texts):
        return self.encode(texts)


@pytest.mark.parametrize("embeddings", [LetterEmbedding(), Encoder(), TwoSidedEncoder()])
def test_chunks_are_ranked_by_cosine(embeddings):
    index = DenseIndex(CHUNKS, embeddings)
    found = index.retrieve("barrels of salt")
    assert found[0].text == "salt and barrels"
    assert {chunk.position for chunk in found} == {0, 1, 3}
    a, b = np.array(letter_counts("barrels of salt")), np.array(letter_counts("salt and barrels"))
    assert found[0].score == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
    assert isinstance(index, Retriever)
    assert index.scores_are_cosine


def test_langchain_embeddings():
    index = DenseIndex(CHUNKS, DeterministicFakeEmbedding(size=16))
    found = index.retrieve("captains")
    assert found[0].position == 3
    assert found[0].score == pytest.approx(1, abs=1e-5)


def test_an_empty_index_and_an_empty_question_find_nothing():
    assert DenseIndex([], Encoder()).retrieve("salt") == []
    assert DenseIndex([Chunk("  ")], Encoder()).retrieve("salt") == []
    assert DenseIndex(CHUNKS, Encoder()).retrieve("  ") == []


def test_a_question_vector_of_another_dimension_raises():
    class Uneven(TwoSidedEncoder):
        def encode_query(self, text):
            return np.ones(5)

    with pytest.raises(RetrievalError, match=r"questions vectors of 5 dimensions and chunks vectors of 26"):
        DenseIndex(CHUNKS, Uneven()).retrieve("salt")


@pytest.mark.parametrize("vectors", [[[1.0]], [[float("nan")] * 3] * 3, [1.0, 2.0, 3.0], [[], [], []]])
def test_invalid_embeddings_raise(vectors):
    class Broken:
        def encode(self, texts):
            return vectors

    with pytest.raises(RetrievalError, match="one vector of finite numbers for each text"):
        DenseIndex(CHUNKS, Broken())


def test_the_index_moves_to_a_gpu_if_faiss_has_one(monkeypatch):
    moves = []

    def to_gpu(index, ngpu):
        moves.append(("gpu", ngpu, index.ntotal))
        return index

    monkeypatch.setattr(dense, "_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_gpu, raising=False)
    assert DenseIndex(CHUNKS, Encoder()).retrieve("barrels of salt")[0].text == "salt and barrels"
    assert moves == [("gpu", 1, 3)]
