"""The sources of ``create_rapid_chain``'s answers."""

from typing import Any

import pytest
from helpers.fake_pipeline import PEOPLE, FakePipeline
from helpers.fake_pipeline import PEOPLE_QUESTION as QUESTION
from helpers.fake_pipeline import PEOPLE_TEXT as TEXT
from helpers.langchain_calls import PEOPLE_DOCUMENTS, RecordingRetriever
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core.schema import NodeWithScore, TextNode

from rapid_integrations import ChatRapid, RapidLLM, create_rapid_chain
from rapid_integrations.retrieval import Chunk
from rapid_integrations.retrieval.lexical import LexicalIndex


def test_without_a_retriever_they_are_pieces_of_the_documents(llm: RapidLLM) -> None:
    words = " ".join(f"word{i}" for i in range(60))
    grace = Document("Grace keeps it.", metadata={"file": "b"})
    documents = [Document(words, metadata={"file": "a"}), grace]
    options = {"retrieval_chunk_tokens": 60, "retrieval_min_tokens": 4, "retrieval_max_tokens": 4}
    chain = create_rapid_chain(llm.bind(**options), documents=documents)
    (source,) = chain.invoke("Who is Grace?")["context"]
    assert source == Document("Grace keeps it.", metadata={"file": "b", "start_index": 0})


@pytest.mark.parametrize(
    ("search", "reason"),
    [(lambda query: [], "found nothing"), (lambda query: 1 / 0, "ZeroDivisionError")],
    ids=["nothing", "raises"],
)
def test_a_retriever_without_a_result(llm: RapidLLM, search: Any, reason: str) -> None:
    for retriever in (search, RunnableLambda(search)):
        output = create_rapid_chain(llm, retriever, documents=TEXT).invoke(QUESTION)
        assert output["context"] == [Document(TEXT, metadata={"start_index": 0})]
        assert reason in output["stats"]["retrieval_fallback"]


def test_every_class_of_retriever(llm: RapidLLM) -> None:
    store = InMemoryVectorStore.from_texts(list(PEOPLE), DeterministicFakeEmbedding(size=8))
    (document,) = PEOPLE_DOCUMENTS[1:2]
    piece = Document(PEOPLE[1], metadata={"start_index": TEXT.index(PEOPLE[1])})
    for retriever, expected in (
        (store.as_retriever(search_kwargs={"k": 3}), {*PEOPLE}),
        (store, {*PEOPLE}),
        (RunnableLambda(lambda query: [document]), [document]),
        (lambda query: [document], [document]),
        (lambda query: [(document, 0.5)], [Document(PEOPLE[1])]),
        (lambda query: [PEOPLE[1]], [Document(PEOPLE[1])]),
        (lambda query: [NodeWithScore(node=TextNode(text=PEOPLE[1], metadata={"n": 1}))],
         [Document(PEOPLE[1], metadata={"n": 1})]),
        (lambda query: iter([PEOPLE[1]]), [Document(PEOPLE[1])]),
        (LexicalIndex([Chunk(PEOPLE[1])]), [piece]),
    ):  # fmt: skip
        sources = create_rapid_chain(llm, retriever, documents=TEXT).invoke(QUESTION)["context"]
        if isinstance(expected, set):
            assert {source.page_content for source in sources} == expected
            assert all(source.id for source in sources)  # ids of the store
        else:
            assert [(s.page_content, s.metadata) for s in sources] == [
                (e.page_content, e.metadata) for e in expected
            ]


def test_the_retriever_of_the_llm(pipeline: FakePipeline, retriever: RecordingRetriever) -> None:
    llm = RapidLLM(pipeline, retriever=retriever)
    assert create_rapid_chain(llm, documents=TEXT).invoke(QUESTION)["context"] == [
        PEOPLE_DOCUMENTS[1],
        PEOPLE_DOCUMENTS[2],
    ]


def test_arguments_bound_to_the_llm(
    pipeline: FakePipeline, retriever: RecordingRetriever, model_class: Any
) -> None:
    events: list[Any] = []
    llm = model_class(pipeline, retriever=lambda query: [PEOPLE[0]])
    bound = llm.bind(retriever=lambda query: [], on_event=events.append).bind(retriever=retriever)
    output = create_rapid_chain(bound.with_retry(), documents=TEXT).invoke(QUESTION)
    assert output["context"] == [PEOPLE_DOCUMENTS[1], PEOPLE_DOCUMENTS[2]]
    assert [chunk.text for chunk in events[0].chunks] == [PEOPLE[1], PEOPLE[2]]
    assert events[-1].text == output["answer"]
    output = create_rapid_chain(bound, lambda query: PEOPLE_DOCUMENTS[:1], documents=TEXT).invoke(QUESTION)
    assert output["context"] == PEOPLE_DOCUMENTS[:1]


@pytest.mark.parametrize("how", [{}, {"disable_streaming": True}, {"streaming": False}])
async def test_the_sources_of_a_question_asked_again_despite_a_cache(
    pipeline: FakePipeline, retriever: RecordingRetriever, model_class: Any, how: dict[str, Any]
) -> None:
    llm = model_class(pipeline, cache=InMemoryCache(), **(how if model_class is ChatRapid else {}))
    chain = create_rapid_chain(llm, retriever, documents=TEXT)
    first = chain.invoke(QUESTION)
    for again in (chain.invoke(QUESTION), await chain.ainvoke(QUESTION)):
        assert again["context"] == [PEOPLE_DOCUMENTS[1], PEOPLE_DOCUMENTS[2]]
        assert again["answer"] == first["answer"]


def test_concurrent_questions_have_their_own_sources(llm: RapidLLM) -> None:
    chain = create_rapid_chain(llm, lambda query: [Document(query)], documents=TEXT)
    questions = [f"Who is number {i}?" for i in range(8)]
    outputs = chain.batch(questions)
    assert [output["context"] for output in outputs] == [[Document(question)] for question in questions]
