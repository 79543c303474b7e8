"""Retrievers of all kinds behind both of our models, in our chain and in an ordinary one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.fake_pipeline import PEOPLE, FakePipeline
from helpers.fake_pipeline import PEOPLE_QUESTION as QUESTION
from helpers.fake_pipeline import PEOPLE_TEXT as TEXT
from langchain_classic.retrievers import EnsembleRetriever
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore

from rapid_integrations import ChatRapid, FaissVectorStore, RapidLLM, RapidPromptTemplate, create_rapid_chain
from rapid_integrations.events import TextEvent
from rapid_integrations.langchain.chain import DEFAULT_PROMPT
from rapid_integrations.retrieval import RetrievedContext


class Letters(Embeddings):
    """How often each letter occurs."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return [float(text.lower().count(letter)) for letter in "abcdefghijklmnopqrstuvwxyz"]


class Behaves(BaseRetriever):
    """Does what ``find`` does."""

    find: Callable[[], list[Document]]

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        return self.find()


def fails() -> list[Document]:
    raise ConnectionError("no route to the index")


def store(kind: type[Any]) -> Any:
    return kind.from_texts(list(PEOPLE), Letters()).as_retriever(search_kwargs={"k": 2})


FINDING: dict[str, Callable[[], Any]] = {
    "memory": lambda: store(InMemoryVectorStore),
    "faiss": lambda: store(FaissVectorStore),
    "ensemble": lambda: EnsembleRetriever(
        retrievers=[store(InMemoryVectorStore), store(FaissVectorStore)], weights=[0.5, 0.5]
    ),
    "own runnable": lambda: RunnableLambda(lambda query: store(FaissVectorStore).invoke(query)),
}
FALLBACKS = {
    "raises": "Behaves failed: ConnectionError: no route to the index",
    "nothing": "Behaves found nothing",
    "slow": "Behaves took longer than 0.05 s",
}


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """Waited for by a slow retriever; set when the test is over."""
    event = threading.Event()
    yield event
    event.set()


async def retrieved(llm: Any, retriever: Any, way: str) -> tuple[list[str], str | None]:
    """The texts that the drafter read, and why it read no others."""
    if way in ("chain", "async chain"):
        chain = create_rapid_chain(llm, retriever, documents=TEXT)
        output = await chain.ainvoke(QUESTION) if way == "async chain" else chain.invoke(QUESTION)
        assert output["answer"].startswith(f"{QUESTION} read {len(TEXT)} characters")
        return [source.page_content for source in output["context"]], output["stats"]["retrieval_fallback"]
    heard: list[TextEvent] = []
    ordinary = RapidPromptTemplate.from_template(DEFAULT_PROMPT) | llm.bind(
        retriever=retriever, on_event=heard.append
    )
    values = {"context": TEXT, "question": QUESTION}
    assert await ordinary.ainvoke(values) if way == "async" else ordinary.invoke(values)
    (found,) = [event for event in heard if isinstance(event, RetrievedContext)]
    return [chunk.text for chunk in found.chunks], found.fallback


@pytest.mark.parametrize("way", ["chain", "async chain", "ordinary", "async"])
@pytest.mark.parametrize("face", [RapidLLM, ChatRapid])
class TestRetrievers:
    @pytest.mark.parametrize("kind", FINDING)
    async def test_what_is_found_is_what_the_drafter_reads(self, face: Any, way: str, kind: str) -> None:
        retriever = FINDING[kind]()
        expected = sorted({document.page_content for document in retriever.invoke(QUESTION)}, key=TEXT.index)
        assert PEOPLE[1] in expected
        assert len(expected) == 2
        assert await retrieved(face(FakePipeline()), retriever, way) == (expected, None)

    @pytest.mark.parametrize("kind", FALLBACKS)
    async def test_a_retriever_that_gives_nothing(
        self, face: Any, way: str, kind: str, never: threading.Event
    ) -> None:
        finds: dict[str, Callable[[], list[Document]]] = {
            "raises": fails,
            "nothing": list,
            "slow": lambda: [Document("too late")] if never.wait(60) else [],
        }
        llm = face(FakePipeline(), retrieval_timeout_s=0.05)
        texts, fallback = await retrieved(llm, Behaves(find=finds[kind]), way)
        assert (texts, fallback) == ([TEXT], FALLBACKS[kind])
