"""Tests of the drafter's context: budget, order, threshold, time limit and fallback."""

from __future__ import annotations

import contextvars
import threading
import zlib

import pytest
from helpers.small_tokenizers import tokenizer_named
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.schema import TextNode

from rapid_integrations.config import RetrievalParams
from rapid_integrations.retrieval import Chunk, DrafterContext, as_retriever
from rapid_integrations.retrieval.deadline import MAX_ABANDONED
from rapid_integrations.tokenization.encoding import encode_plain

TOKENIZER = tokenizer_named("chatml")
PARAGRAPHS = [f"In the year {1600 + i} the keeper wrote of {name}." for i, name in enumerate(
    ["tar", "salt", "ropes", "whales", "lanterns", "anchors", "maps", "barrels"] * 6
)]  # fmt: skip
DOCUMENT = "\n\n".join(PARAGRAPHS)
QUESTION = "What happened in 1613 with anchors?"
SMALL = RetrievalParams(chunk_tokens=40, max_tokens=120)


def tokens(text):
    return len(encode_plain(text, TOKENIZER))


def finder(**options):
    return DrafterContext(tokenizer=TOKENIZER, **options)


class WordEmbedding:
    """Embeddings by word counts: texts that share words are similar."""

    def __init__(self):
        self.calls = 0

    def encode(self, texts):
        self.calls += 1
        vectors = []
        for text in texts:
            vector = [0.0] * 997
            for word in text.lower().replace(".", " ").replace("?", " ").split():
                vector[zlib.crc32(word.encode()) % 997] += 1
            vectors.append(vector)
        return vectors


@pytest.mark.parametrize("embeddings", [None, WordEmbedding()])
def test_the_best_chunks_of_the_context_in_document_order(embeddings):
    params = RetrievalParams(chunk_tokens=40, max_tokens=120, min_score=0.01)
    found = finder(embeddings=embeddings).find(QUESTION, DOCUMENT, params)
    assert found.fallback is None
    assert found.retriever == ("bm25" if embeddings is None else "dense")
    assert "1613" in found.text
    positions = [chunk.position for chunk in found.chunks]
    assert positions == sorted(positions)
    assert len(positions) > 1
    assert all(chunk.text in DOCUMENT and chunk.score is not None for chunk in found.chunks)
    assert found.text == "\n\n".join(chunk.text for chunk in found.chunks)
    assert tokens(found.text) <= 120
    assert found.seconds >= 0


def test_a_context_within_the_budget_needs_no_retrieval():
    found = finder().find(QUESTION, DOCUMENT, RetrievalParams(min_tokens=4096))
    assert (found.text, found.retriever, found.fallback) == (DOCUMENT, "context", None)
    assert [(chunk.text, chunk.position) for chunk in found.chunks] == [(DOCUMENT, 0)]


def test_no_context_and_no_retriever_give_an_empty_drafter_context():
    found = finder().find(QUESTION, "", SMALL)
    assert (found.text, found.chunks, found.retriever, found.fallback) == ("", (), "", None)


def test_without_context_the_drafter_reads_the_retrievers_chunks():
    found = finder(retriever=as_retriever(lambda query: ["one", "two"])).find(QUESTION, "", SMALL)
    assert found.text == "one\n\ntwo"
    assert [chunk.position for chunk in found.chunks] == [None, None]
    assert found.fallback is None


def test_without_a_question_the_drafter_reads_start_and_end():
    found = finder().find("  ", DOCUMENT, SMALL)
    assert found.fallback == "the prompt has no question to retrieve with"
    assert_is_start_and_end(found)


def assert_is_start_and_end(found):
    head, tail = found.chunks
    assert DOCUMENT.startswith(head.text)
    assert DOCUMENT.endswith(tail.text)
    assert (head.position, tail.position) == (0, len(DOCUMENT) - len(tail.text))
    assert 100 <= tokens(found.text) <= 125


def test_the_budget_grows_with_the_context():
    text = "\n\n".join(f"On day {i} the keeper slept." for i in range(200))
    params = RetrievalParams(chunk_tokens=16, min_tokens=10, context_divisor=4)
    found = finder().find("keeper", text, params)
    assert tokens(text) / 5 < tokens(found.text) <= tokens(text) / 4 + 1


def test_a_hosts_chunks_are_located_and_put_in_document_order():
    chunks = [PARAGRAPHS[9], "not in the document", PARAGRAPHS[2], f" {PARAGRAPHS[5]}\n"]
    found = finder().find(
        QUESTION, DOCUMENT, SMALL, retriever=as_retriever(lambda query: [Document(text) for text in chunks])
    )
    assert [chunk.text for chunk in found.chunks] == [*(PARAGRAPHS[i] for i in (2, 5, 9)), chunks[1]]
    expected = [*(DOCUMENT.index(PARAGRAPHS[i]) for i in (2, 5, 9)), None]
    assert [chunk.position for chunk in found.chunks] == expected


def test_the_budget_is_filled_with_the_best_chunks_first():
    budget = tokens(PARAGRAPHS[20]) + tokens(PARAGRAPHS[3]) + 2
    found = finder().find(
        QUESTION,
        DOCUMENT,
        RetrievalParams(max_tokens=budget),
        retriever=as_retriever(lambda query: [PARAGRAPHS[20], PARAGRAPHS[3], PARAGRAPHS[0]]),
    )
    assert [chunk.text for chunk in found.chunks] == [PARAGRAPHS[3], PARAGRAPHS[20]]


def test_duplicate_chunks_are_used_once():
    found = finder(retriever=as_retriever(lambda query: ["a", "a ", "b", "a", " "])).find(QUESTION, "", SMALL)
    assert [chunk.text for chunk in found.chunks] == ["a", "b"]


def test_a_first_chunk_larger_than_the_budget_is_cut():
    found = finder(retriever=as_retriever(lambda query: [DOCUMENT])).find(
        QUESTION, DOCUMENT, RetrievalParams(max_tokens=17)
    )
    assert found.fallback is None
    assert DOCUMENT.startswith(found.text)
    assert 12 <= tokens(found.text) <= 17


def test_a_chunk_that_does_not_fit_is_skipped_for_a_smaller_one():
    found = finder(retriever=as_retriever(lambda query: ["first", DOCUMENT, "third"])).find(
        QUESTION, "", RetrievalParams(max_tokens=40)
    )
    assert found.text == "first\n\nthird"


@pytest.mark.parametrize(
    ("min_score", "expected"), [(None, "low\n\nhigh\n\nunscored"), (0.5, "high\n\nunscored")]
)
def test_a_hosts_scores_are_filtered_only_if_a_threshold_is_set(min_score, expected):
    retriever = as_retriever(lambda query: [("low", 0.1), ("high", 0.9), "unscored"])
    params = RetrievalParams(min_score=min_score)
    assert finder(retriever=retriever).find(QUESTION, "", params).text == expected


def test_the_built_in_dense_index_has_the_published_threshold():
    built_in = finder(embeddings=WordEmbedding())
    unlike = "zebra quagga okapi tapir"
    assert built_in.find(unlike, DOCUMENT, SMALL).fallback == "dense found nothing"
    params = RetrievalParams(chunk_tokens=40, max_tokens=120, min_score=-1.0)
    assert built_in.find(unlike, DOCUMENT, params).fallback is None


def test_nothing_found_falls_back_to_start_and_end():
    found = finder().find("zebra", DOCUMENT, SMALL)
    assert (found.retriever, found.fallback) == ("bm25", "bm25 found nothing")
    assert_is_start_and_end(found)
    assert finder(retriever=as_retriever(lambda query: [])).find("q", "", SMALL).text == ""


class Raising(BaseRetriever):
    def _get_relevant_documents(self, query, *, run_manager):
        raise OSError("the store\nis down")


def test_a_retriever_that_fails_falls_back():
    found = finder(retriever=as_retriever(Raising())).find(QUESTION, DOCUMENT, SMALL)
    assert found.fallback == "Raising failed: OSError: the store is down"
    assert found.retriever == "Raising"
    assert_is_start_and_end(found)


def test_a_retriever_that_returns_no_chunks_falls_back():
    found = finder(retriever=as_retriever(lambda query: 3)).find(QUESTION, DOCUMENT, SMALL)
    assert "returned int" in found.fallback


def test_a_retriever_that_exits_falls_back():
    def leave(query):
        raise SystemExit(3)

    found = finder(retriever=as_retriever(leave)).find(QUESTION, DOCUMENT, SMALL)
    assert found.fallback == "leave failed: RuntimeError: SystemExit: 3"


def test_failing_embeddings_fall_back_and_are_retried():
    class Flaky(WordEmbedding):
        def encode(self, texts):
            if not self.calls:
                self.calls += 1
                raise OSError("busy")
            return super().encode(texts)

    built_in = finder(embeddings=Flaky())
    assert built_in.find(QUESTION, DOCUMENT, SMALL).fallback == "dense failed: OSError: busy"
    assert built_in.find(QUESTION, DOCUMENT, SMALL).fallback is None


def test_a_slow_retriever_is_abandoned():
    release = threading.Event()

    class Slow(BaseRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            release.wait()
            raise OSError("raised after the time limit")

    params = RetrievalParams(max_tokens=120, timeout_s=0.01)
    slow = finder(retriever=as_retriever(Slow()))
    try:
        found = slow.find(QUESTION, DOCUMENT, params)
        assert found.fallback == "Slow took longer than 0.01 s"
        assert_is_start_and_end(found)
        for _ in range(MAX_ABANDONED):
            last = slow.find(QUESTION, DOCUMENT, params)
        assert last.fallback == "Slow was not asked: 8 earlier calls are still running"
        assert sum(thread.name == "rapid-retrieval" for thread in threading.enumerate()) == 8
    finally:
        release.set()
    for thread in threading.enumerate():
        if thread.name == "rapid-retrieval":
            thread.join()
    assert slow.find(QUESTION, DOCUMENT, params).fallback.startswith("Slow failed: OSError")


def test_a_document_is_indexed_once_for_many_questions():
    embeddings = WordEmbedding()
    built_in = finder(embeddings=embeddings)
    for year in (1601, 1613, 1620):
        assert str(year) in built_in.find(f"What happened in {year}?", DOCUMENT, SMALL).text
    assert embeddings.calls == 1 + 3
    built_in.find("What in 1601?", DOCUMENT, RetrievalParams(chunk_tokens=20, max_tokens=120))
    assert embeddings.calls == 2 + 4


def test_many_threads_index_a_document_once():
    embeddings = WordEmbedding()
    built_in = finder(embeddings=embeddings)
    together = threading.Barrier(6)
    results = []

    def ask():
        together.wait()
        results.append(built_in.find(QUESTION, DOCUMENT, SMALL))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert embeddings.calls == 1 + 6
    assert len({found.text for found in results}) == 1
    assert all(found.fallback is None for found in results)


def test_the_least_recently_used_document_is_dropped():
    embeddings = WordEmbedding()
    built_in = finder(embeddings=embeddings)
    for i in range(9):
        built_in.find(QUESTION, f"{DOCUMENT} {i}", SMALL)
    before = embeddings.calls
    built_in.find(QUESTION, f"{DOCUMENT} 8", SMALL)
    assert embeddings.calls == before + 1
    built_in.find(QUESTION, f"{DOCUMENT} 0", SMALL)
    assert embeddings.calls == before + 3


def test_a_retriever_of_a_call_replaces_the_default_retriever():
    own, other = as_retriever(lambda query: ["own"]), as_retriever(lambda query: ["other"])
    built_in = finder(retriever=own)
    assert built_in.find(QUESTION, DOCUMENT, SMALL).text == "own"
    assert built_in.find(QUESTION, DOCUMENT, SMALL, retriever=other).text == "other"


def test_a_langchain_vector_store():
    store = InMemoryVectorStore.from_texts(PARAGRAPHS, DeterministicFakeEmbedding(size=8))
    found = finder(retriever=as_retriever(store)).find(PARAGRAPHS[7], DOCUMENT, RetrievalParams())
    assert found.retriever == "InMemoryVectorStore"
    assert PARAGRAPHS[7] in [chunk.text for chunk in found.chunks]
    assert len(found.chunks) == 4
    assert [c.position for c in found.chunks] == sorted(DOCUMENT.index(c.text) for c in found.chunks)


def test_a_llama_index_index():
    nodes = [TextNode(text=text) for text in PARAGRAPHS]
    index = VectorStoreIndex(nodes, embed_model=MockEmbedding(embed_dim=4))
    found = finder(retriever=as_retriever(index)).find(QUESTION, DOCUMENT, RetrievalParams())
    assert found.retriever == "VectorStoreIndex"
    assert len(found.chunks) == 2
    assert all(chunk.text in PARAGRAPHS and chunk.score is not None for chunk in found.chunks)


def test_context_variables_reach_the_retriever():
    run = contextvars.ContextVar("run", default="none")
    run.set("traced")
    found = finder(retriever=as_retriever(lambda query: [Chunk(run.get())])).find(QUESTION, "", SMALL)
    assert found.text == "traced"
