"""Retrievers of several classes with both models, in ``create_rapid_chain`` and in an ordinary chain."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.fake_pipeline import PEOPLE, FakePipeline
from helpers.fake_pipeline import PEOPLE_QUESTION as QUESTION
from helpers.fake_pipeline import PEOPLE_TEXT as TEXT
from helpers.langchain_calls import RecordingRetriever
from langchain_classic.retrievers import EnsembleRetriever
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore

from rapid_integrations import FaissVectorStore, RapidPromptTemplate, create_rapid_chain
from rapid_integrations.events import TextEvent
from rapid_integrations.langchain.chain import DEFAULT_PROMPT
from rapid_integrations.retrieval import RetrievedContext


class Letters(Embeddings):
    """Counts each letter."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return [float(text.lower().count(letter)) for letter in "abcdefghijklmnopqrstuvwxyz"]


def fails() -> list[Document]:
    raise ConnectionError("no route to the index")


def store(kind: type[Any]) -> Any:
    return kind.from_texts(list(PEOPLE), Letters()).as_retriever(search_kwargs={"k": 2})


RETRIEVERS: dict[str, Callable[[], Any]] = {
    "memory": lambda: store(InMemoryVectorStore),
    "faiss": lambda: store(FaissVectorStore),
    "ensemble": lambda: EnsembleRetriever(
        retrievers=[store(InMemoryVectorStore), store(FaissVectorStore)], weights=[0.5, 0.5]
    ),
    "own runnable": lambda: RunnableLambda(lambda query: store(FaissVectorStore).invoke(query)),
}
FALLBACKS = {
    "raises": "RecordingRetriever failed: ConnectionError: no route to the index",
    "nothing": "RecordingRetriever found nothing",
    "slow": "RecordingRetriever took longer than 0.05 s",
}


@pytest.fixture
def never_set() -> Iterator[threading.Event]:
    """A slow retriever waits for it; it is set when the test is over."""
    event = threading.Event()
    yield event
    event.set()


async def retrieved(llm: Any, retriever: Any, way: str) -> tuple[list[str], str | None]:
    """The texts that the drafter read, and the reason if they are not the retrieved ones."""
    if way in ("chain", "async chain"):
        chain = create_rapid_chain(llm, retriever, documents=TEXT)
        output = await chain.ainvoke(QUESTION) if way == "async chain" else chain.invoke(QUESTION)
        assert output["answer"].startswith(f"{QUESTION} read {len(TEXT)} characters")
        return [source.page_content for source in output["context"]], output["stats"]["retrieval_fallback"]
    events: list[TextEvent] = []
    ordinary = RapidPromptTemplate.from_template(DEFAULT_PROMPT) | llm.bind(
        retriever=retriever, on_event=events.append
    )
    values = {"context": TEXT, "question": QUESTION}
    assert await ordinary.ainvoke(values) if way == "async" else ordinary.invoke(values)
    (context,) = [event for event in events if isinstance(event, RetrievedContext)]
    return [chunk.text for chunk in context.chunks], context.fallback


@pytest.mark.parametrize("way", ["chain", "async chain", "ordinary", "async"])
class TestRetrievers:
    @pytest.mark.parametrize("kind", RETRIEVERS)
    async def test_the_drafter_reads_the_retrieved_passages(
        self, model_class: Any, way: str, kind: str
    ) -> None:
        retriever = RETRIEVERS[kind]()
        expected = sorted({document.page_content for document in retriever.invoke(QUESTION)}, key=TEXT.index)
        assert PEOPLE[1] in expected
        assert len(expected) == 2
        assert await retrieved(model_class(FakePipeline()), retriever, way) == (expected, None)

    @pytest.mark.parametrize("kind", FALLBACKS)
    async def test_a_retriever_without_a_result(
        self, model_class: Any, way: str, kind: str, never_set: threading.Event
    ) -> None:
        functions: dict[str, Callable[[], list[Document]]] = {
            "raises": fails,
            "nothing": list,
            "slow": lambda: [Document("too late")] if never_set.wait(60) else [],
        }
        llm = model_class(FakePipeline(), retrieval_timeout_s=0.05)
        texts, fallback = await retrieved(llm, RecordingRetriever(find=functions[kind]), way)
        assert (texts, fallback) == ([TEXT], FALLBACKS[kind])
