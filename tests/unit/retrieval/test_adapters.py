"""Tests of the adapters from hosts' retrievers."""

from __future__ import annotations

import subprocess
import sys

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever as LlamaRetriever
from llama_index.core.schema import NodeWithScore, TextNode

from rapid_integrations.errors import ConfigurationError, RetrievalError
from rapid_integrations.retrieval import Chunk, as_retriever
from rapid_integrations.retrieval.base import Retriever
from rapid_integrations.retrieval.lexical import LexicalIndex

TEXTS = ["ships and tar", "salt and barrels", "captains"]


class LangChainRetriever(BaseRetriever):
    def _get_relevant_documents(self, query, *, run_manager):
        return [Document(f"found for {query}")]


class LlamaIndexRetriever(LlamaRetriever):
    def _retrieve(self, query_bundle):
        return [NodeWithScore(node=TextNode(text=f"found for {query_bundle.query_str}"), score=0.5)]


def retrieve(obj, query="salt"):
    return list(as_retriever(obj).retrieve(query, "", max_tokens=100))


def test_a_langchain_retriever():
    assert retrieve(LangChainRetriever()) == [Chunk("found for salt")]
    assert as_retriever(LangChainRetriever()).name == "LangChainRetriever"


def test_a_langchain_vector_store_and_its_retriever():
    store = InMemoryVectorStore.from_texts(TEXTS, DeterministicFakeEmbedding(size=8))
    assert as_retriever(store).name == "InMemoryVectorStore"
    assert retrieve(store, "captains")[0] == Chunk("captains")
    assert retrieve(store.as_retriever(search_kwargs={"k": 1}), "captains") == [Chunk("captains")]


def test_a_langchain_runnable():
    assert retrieve(RunnableLambda(lambda query: [Document(query)])) == [Chunk("salt")]


def test_a_llama_index_retriever():
    assert retrieve(LlamaIndexRetriever()) == [Chunk("found for salt", score=0.5)]


def test_a_llama_index_index_and_its_retriever():
    index = VectorStoreIndex([TextNode(text=text) for text in TEXTS], embed_model=MockEmbedding(embed_dim=4))
    for obj in (index, index.as_retriever(similarity_top_k=2)):
        found = retrieve(obj)
        assert len(found) == 2
        assert {chunk.text for chunk in found} < set(TEXTS)
        assert all(chunk.score == pytest.approx(1) for chunk in found)


def test_a_chunk_excludes_the_nodes_metadata():
    node = NodeWithScore(node=TextNode(text="the text", metadata={"file": "a.txt"}))
    assert retrieve(lambda query: [node]) == [Chunk("the text")]


def test_every_supported_type_of_chunk():
    found = [
        "text",
        Chunk("chunk", 3, 0.5),
        Document("document"),
        TextNode(text="node"),
        NodeWithScore(node=TextNode(text="scored"), score=0.25),
        (Document("pair"), 0.75),
        ["list", 1],
    ]
    assert retrieve(lambda query: found) == [
        Chunk("text"),
        Chunk("chunk", 3, 0.5),
        Chunk("document"),
        Chunk("node"),
        Chunk("scored", score=0.25),
        Chunk("pair", score=0.75),
        Chunk("list", score=1.0),
    ]
    assert retrieve(lambda query: (text for text in ["a", "b"])) == [Chunk("a"), Chunk("b")]
    assert retrieve(lambda query: "one text") == [Chunk("one text")]


def test_a_retriever_of_this_package_is_not_wrapped():
    index = LexicalIndex([Chunk(text) for text in TEXTS])
    assert as_retriever(index) is index
    wrapped = as_retriever(lambda query: TEXTS)
    assert isinstance(wrapped, Retriever)
    assert as_retriever(wrapped) is wrapped


def test_a_function_gives_its_name():
    def my_search(query):
        return TEXTS

    assert as_retriever(my_search).name == "my_search"


@pytest.mark.parametrize("obj", [None, "bm25", 3, object(), LangChainRetriever])
def test_unsupported_retrievers_raise(obj):
    with pytest.raises(ConfigurationError, match="is not allowed: a retriever is a LangChain"):
        as_retriever(obj)


async def coroutine(query):
    return TEXTS


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda query: None, "returned NoneType"),
        (lambda query: {"a": 1}, "returned dict"),
        (lambda query: [3], "returned a int among its chunks"),
        (lambda query: [("a", "best")], "the score 'best'"),
        (coroutine, "returned coroutine"),
    ],
)
def test_unsupported_results_raise(function, message):
    with pytest.raises(RetrievalError, match=message):
        retrieve(function)


def test_a_failing_as_retriever_raises():
    class Broken:
        def as_retriever(self):
            raise OSError("no\nconnection")

    with pytest.raises(RetrievalError, match=r"Broken.as_retriever\(\) failed: OSError: no connection"):
        as_retriever(Broken())


def test_importing_retrieval_and_prompts_imports_no_framework():
    code = (
        "import sys, rapid_integrations.retrieval, rapid_integrations.prompts.parts\n"
        "r = rapid_integrations.retrieval.as_retriever(lambda query: [query])\n"
        "assert r.retrieve('q', '', max_tokens=1)[0].text == 'q'\n"
        "bad = [m for m in sys.modules if m.split('.')[0].startswith(('langchain', 'llama_index'))]\n"
        "sys.exit(repr(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
