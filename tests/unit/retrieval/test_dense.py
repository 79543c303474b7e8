from __future__ import annotations

import json
import sys

import faiss
import numpy as np
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from llama_index.core.base.embeddings.base import BaseEmbedding

from rapid_integrations.errors import ConfigurationError, RetrievalError
from rapid_integrations.retrieval import dense
from rapid_integrations.retrieval.base import Chunk, Retriever
from rapid_integrations.retrieval.dense import DenseIndex
from rapid_integrations.retrieval.embedding import as_embedder

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
def test_chunks_come_by_cosine(embeddings):
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


def test_a_saved_index_comes_back(tmp_path):
    index = DenseIndex(CHUNKS, Encoder())
    index.save(tmp_path / "index")
    loaded = DenseIndex.load(tmp_path / "index", Encoder())
    assert loaded.retrieve("barrels") == index.retrieve("barrels")
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["chunks.json", "index.faiss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 2}, "damaged"),
        ({"dimension": 3}, "damaged"),
        ({"chunks": [{"text": "a", "position": 0}]}, "damaged"),
        ({"chunks": [{"text": 1, "position": 0}]}, "no index that can be read"),
        ({"version": 99}, "version 99"),
    ],
)
def test_an_index_that_does_not_agree_with_itself_is_refused(tmp_path, change, message):
    DenseIndex(CHUNKS, Encoder()).save(tmp_path)
    described = json.loads((tmp_path / "chunks.json").read_text("utf-8"))
    (tmp_path / "chunks.json").write_text(json.dumps(described | change), "utf-8")
    with pytest.raises(RetrievalError, match=message):
        DenseIndex.load(tmp_path, Encoder())


@pytest.mark.parametrize("name", ["chunks.json", "index.faiss"])
def test_a_file_that_is_missing_or_broken_is_refused(tmp_path, name):
    DenseIndex(CHUNKS, Encoder()).save(tmp_path)
    (tmp_path / name).write_bytes(b"not an index")
    with pytest.raises(RetrievalError, match="no index that can be read"):
        DenseIndex.load(tmp_path, Encoder())
    (tmp_path / name).unlink()
    with pytest.raises(RetrievalError, match="no index that can be read"):
        DenseIndex.load(tmp_path, Encoder())


def test_other_embeddings_than_the_index_was_built_with(tmp_path):
    DenseIndex(CHUNKS, Encoder()).save(tmp_path)
    loaded = DenseIndex.load(tmp_path, DeterministicFakeEmbedding(size=5))
    with pytest.raises(RetrievalError, match=r"5 dimensions; the index has 26"):
        loaded.retrieve("salt")


def test_an_empty_index_is_not_saved(tmp_path):
    with pytest.raises(RetrievalError, match="nothing to save"):
        DenseIndex([], Encoder()).save(tmp_path)


@pytest.mark.parametrize("vectors", [[[1.0]], [[float("nan")] * 3] * 3, [1.0, 2.0, 3.0], [[], [], []]])
def test_embeddings_that_are_not_a_vector_a_text(vectors):
    class Broken:
        def encode(self, texts):
            return vectors

    with pytest.raises(RetrievalError, match="one vector of finite numbers a text"):
        DenseIndex(CHUNKS, Broken())


@pytest.mark.parametrize("embeddings", [None, 3, object(), Encoder])
def test_what_is_no_embeddings(embeddings):
    with pytest.raises(ConfigurationError, match="is not allowed"):
        as_embedder(embeddings)


def test_a_name_without_sentence_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigurationError, match=r"rapid-integrations\[embeddings\]"):
        as_embedder("BAAI/bge-m3")


def test_vectors_are_searched_on_a_gpu_where_faiss_has_one(monkeypatch, tmp_path):
    moves = []

    def to_gpu(index, ngpu):
        moves.append(("gpu", ngpu))
        return index

    def to_cpu(index):
        moves.append(("cpu", index.ntotal))
        return index

    monkeypatch.setattr(dense, "_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_gpu, raising=False)
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", to_cpu, raising=False)
    DenseIndex(CHUNKS, Encoder()).save(tmp_path)
    found = DenseIndex.load(tmp_path, Encoder()).retrieve("barrels of salt")
    assert found[0].text == "salt and barrels"
    assert moves == [("gpu", 1), ("cpu", 3), ("gpu", 1)]
