"""RapidQueryEngine: whole documents to the target, retrieved nodes to the drafter."""

import json
from typing import Any

import pytest
from helpers.fake_pipeline import FakePipeline
from llama_index.core import Document, MockEmbedding, Settings, SummaryIndex, VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.chat_engine import CondenseQuestionChatEngine
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RouterQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import QueryEngineTool
from llama_index_instrumentation import get_dispatcher

from rapid_integrations import (
    ConfigurationError,
    ContextLengthError,
    DocumentError,
    RapidLLM,
    RapidQueryEngine,
    RetrievalError,
)

PEOPLE = ("Ada is the harbour master.", "Grace keeps the lighthouse.", "Alan counts the barrels.")
TEXT = " ".join(PEOPLE)
QUESTION = "Who keeps the lighthouse?"
NODES = [TextNode(text=text, id_=f"node-{i}", metadata={"line": i}) for i, text in enumerate(PEOPLE)]


class Finds(BaseRetriever):
    """Finds the same nodes for every question."""

    def __init__(self, *found: NodeWithScore) -> None:
        self.found = list(found)
        self.asked: list[QueryBundle] = []
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        self.asked.append(query_bundle)
        return self.found


class Fails(BaseRetriever):
    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        raise OSError("the index is gone")


@pytest.fixture
def retriever() -> Finds:
    return Finds(NodeWithScore(node=NODES[2], score=0.9), NodeWithScore(node=NODES[1], score=0.5))


def check(response: Any, retriever: Finds) -> None:
    # In document order, and the retriever's own.
    assert [node.node.node_id for node in response.source_nodes] == ["node-1", "node-2"]
    assert [node.score for node in response.source_nodes] == [0.5, 0.9]
    assert response.metadata["node-1"] == {"line": 1}
    stats = response.metadata["rapid"]
    assert (stats["retriever"], stats["retrieval_fallback"]) == ("Finds", None)
    assert [chunk["text"] for chunk in stats["retrieved_chunks"]] == list(PEOPLE[1:])
    assert {bundle.query_str for bundle in retriever.asked} == {QUESTION}


async def test_every_entry_point_gives_answer_sources_and_statistics(
    llm: RapidLLM, pipeline: FakePipeline, retriever: Finds
) -> None:
    engine = RapidQueryEngine.from_retriever(retriever, Document(text=TEXT), llm)
    response = engine.query(QUESTION)
    assert isinstance(response, Response)
    assert response.response.startswith(f"{QUESTION} read {len(TEXT)} characters")
    check(response, retriever)
    asynchronous = await engine.aquery(QueryBundle(QUESTION))
    assert str(asynchronous) == str(response)
    check(asynchronous, retriever)

    streaming_engine = RapidQueryEngine(retriever, TEXT, llm, streaming=True)
    streaming = streaming_engine.query(QUESTION)
    assert isinstance(streaming, StreamingResponse)
    assert len(streaming.source_nodes) == 2
    assert "rapid" not in streaming.metadata
    parts = list(streaming.response_gen)
    assert len(parts) > 5
    assert "".join(parts) == str(response)
    check(streaming, retriever)
    astreaming = await streaming_engine.aquery(QUESTION)
    assert isinstance(astreaming, AsyncStreamingResponse)
    assert len(astreaming.source_nodes) == 2
    assert "".join([part async for part in astreaming.async_response_gen()]) == str(response)
    check(astreaming, retriever)

    assert len(pipeline.requests) == pipeline.finished == 4
    for request in pipeline.requests:
        assert (request.parts.context, request.parts.query) == (TEXT, QUESTION)
        text = request.parts.text
        assert text.index(TEXT) < text.index(QUESTION)  # or the second question would read it all again


def test_several_documents_are_read_in_order(llm: RapidLLM, pipeline: FakePipeline, retriever: Finds) -> None:
    documents = [Document(text=PEOPLE[0]), PEOPLE[1], NODES[2]]
    RapidQueryEngine(retriever, documents, llm).query(QUESTION)
    assert pipeline.requests[-1].parts.context == "\n\n".join(PEOPLE)


def test_closing_a_stream_cancels_the_request(
    llm: RapidLLM, pipeline: FakePipeline, retriever: Finds
) -> None:
    response = RapidQueryEngine(retriever, TEXT, llm, streaming=True).query(QUESTION)
    next(response.response_gen)
    response.response_gen.close()
    assert (pipeline.finished, pipeline.cancelled) == (0, 1)


@pytest.mark.parametrize(
    ("retriever", "reason"),
    [(Fails(), "Fails failed: OSError: the index is gone"), (Finds(), "Finds found nothing")],
    ids=["fails", "finds nothing"],
)
def test_a_retriever_that_fails_or_finds_nothing_does_not_fail_the_answer(
    llm: RapidLLM, retriever: BaseRetriever, reason: str
) -> None:
    response = RapidQueryEngine(retriever, TEXT, llm).query(QUESTION)
    assert response.metadata["rapid"]["retrieval_fallback"] == reason
    assert [node.node.get_content() for node in response.source_nodes] == [TEXT]


def test_postprocessors_filter_the_drafters_nodes(llm: RapidLLM, retriever: Finds) -> None:
    engine = RapidQueryEngine(
        retriever, TEXT, llm, node_postprocessors=[SimilarityPostprocessor(similarity_cutoff=0.8)]
    )
    assert [node.node.node_id for node in engine.query(QUESTION).source_nodes] == ["node-2"]
    assert [node.node.node_id for node in engine.retrieve(QueryBundle(QUESTION))] == ["node-2"]


@pytest.mark.parametrize("index_type", [VectorStoreIndex, SummaryIndex])
def test_an_index_gives_its_documents(llm: RapidLLM, pipeline: FakePipeline, index_type: Any) -> None:
    documents = [Document(id_="people", text=TEXT), Document(id_="ships", text="The Electra carries salt.")]
    index = index_type.from_documents(
        documents,
        embed_model=MockEmbedding(embed_dim=4),
        transformations=[
            SentenceSplitter(chunk_size=60, chunk_overlap=5, tokenizer=list, include_metadata=False)
        ],
    )
    assert len(index.docstore.docs) > 2
    response = RapidQueryEngine.from_index(index, llm).query(QUESTION)
    assert pipeline.requests[-1].parts.context == f"{TEXT}\n\nThe Electra carries salt."
    assert {node.node.ref_doc_id for node in response.source_nodes} <= {"people", "ships"}
    RapidQueryEngine.from_index(index, llm, ref_doc_ids=["ships"]).query(QUESTION)
    assert pipeline.requests[-1].parts.context == "The Electra carries salt."


async def test_only_the_documents_of_the_best_nodes(llm: RapidLLM, pipeline: FakePipeline) -> None:
    documents = [Document(id_=name, text=text) for name, text in zip("abc", PEOPLE, strict=True)]
    nodes = [node for document in documents for node in SentenceSplitter()([document])]
    found = Finds(*(NodeWithScore(node=nodes[i], score=score) for i, score in ((2, 0.9), (0, 0.8), (1, 0.7))))
    for streaming in (False, True):
        engine = RapidQueryEngine(found, documents, llm, max_documents=2, streaming=streaming)
        for response in (engine.query(QUESTION), await engine.aquery(QUESTION)):
            await response.get_response() if isinstance(response, AsyncStreamingResponse) else str(response)
            # In the documents' own order: the next question may find them in another.
            assert pipeline.requests[-1].parts.context == f"{PEOPLE[0]}\n\n{PEOPLE[2]}"
            assert [node.node.ref_doc_id for node in response.source_nodes] == ["a", "c"]
    RapidQueryEngine(found, documents, llm, max_documents=5).query(QUESTION)
    assert pipeline.requests[-1].parts.context == "\n\n".join(PEOPLE)


def test_max_documents_without_a_node_raises(llm: RapidLLM, retriever: Finds) -> None:
    for nothing in (Finds(), retriever):  # what it finds is of another document
        with pytest.raises(RetrievalError, match="found no node of the 1 documents"):
            RapidQueryEngine(nothing, TEXT, llm, max_documents=1).query(QUESTION)
    with pytest.raises(OSError, match="the index is gone"):
        RapidQueryEngine(Fails(), TEXT, llm, max_documents=1).query(QUESTION)
    with pytest.raises(ConfigurationError, match="max_documents=0"):
        RapidQueryEngine(retriever, TEXT, llm, max_documents=0)


def test_retriever_kwargs_reach_the_retriever(llm: RapidLLM) -> None:
    index = VectorStoreIndex(NODES, embed_model=MockEmbedding(embed_dim=4))
    engine = RapidQueryEngine.from_index(index, llm, retriever_kwargs={"similarity_top_k": 1})
    assert len(engine.query(QUESTION).source_nodes) == 1


def test_settings_give_the_llm(llm: RapidLLM, retriever: Finds) -> None:
    Settings.llm = llm
    try:
        assert RapidQueryEngine(retriever, TEXT).query(QUESTION).response
    finally:
        Settings._llm = None


def test_invalid_arguments_raise(llm: RapidLLM, retriever: Finds) -> None:
    with pytest.raises(ConfigurationError, match="MockLLM: RapidQueryEngine needs a RapidLLM"):
        RapidQueryEngine(retriever, TEXT, MockLLM())
    with pytest.raises(ConfigurationError, match="give RapidQueryEngine a RapidLLM as llm"):
        RapidQueryEngine(retriever, TEXT)
    with pytest.raises(ConfigurationError, match="needs a LlamaIndex BaseRetriever"):
        RapidQueryEngine(lambda query: NODES, TEXT, llm)  # type: ignore[arg-type]
    with pytest.raises(DocumentError, match="hold no text"):
        RapidQueryEngine(retriever, [Document(text=" ")], llm)
    for documents in ([Document(id_="a", text="One."), Document(id_="a", text="Two.")],
                      ["One.", Document(id_="0", text="Two.")]):  # fmt: skip
        with pytest.raises(DocumentError, match=r"two of the documents have the id '(a|0)'"):
            RapidQueryEngine(retriever, documents, llm)


@pytest.mark.parametrize("streaming", [False, True])
async def test_errors_of_the_llm_are_raised_by_the_query(retriever: Finds, streaming: bool) -> None:
    engine = RapidQueryEngine(
        retriever, TEXT, RapidLLM(FakePipeline(max_prompt_chars=10)), streaming=streaming
    )
    with pytest.raises(ContextLengthError):
        engine.query(QUESTION)
    with pytest.raises(ContextLengthError):
        await engine.aquery(QUESTION)


def test_the_prompt_template_can_be_replaced(llm: RapidLLM, pipeline: FakePipeline, retriever: Finds) -> None:
    template = PromptTemplate("Read {context_str} and say: {query_str}")
    engine = RapidQueryEngine(retriever, TEXT, llm, text_qa_template=template)
    assert engine.get_prompts() == {"text_qa_template": template}
    engine.update_prompts({"text_qa_template": PromptTemplate("{context_str} {query_str} Now!")})
    engine.query(QUESTION)
    assert pipeline.requests[-1].parts.text == f"{TEXT} {QUESTION} Now!"


def test_a_query_is_one_tree_of_spans(llm: RapidLLM, retriever: Finds, spans: SimpleSpanHandler) -> None:
    RapidQueryEngine(retriever, TEXT, llm).query(QUESTION)
    names = {span.id_: span.id_.split("-")[0] for span in spans.completed_spans}
    parents = {names[span.id_]: names.get(span.parent_id) for span in spans.completed_spans}
    assert parents["RapidQueryEngine.query"] is None
    assert parents["RapidQueryEngine._query"] == "RapidQueryEngine.query"
    assert parents["RapidLLM.complete"] == "RapidQueryEngine._query"
    # Though the retriever runs in a thread of its own.
    assert parents["Finds.retrieve"] == "RapidLLM.complete"


def test_events_of_a_query_are_serialisable(llm: RapidLLM, retriever: Finds) -> None:
    stored: list[str] = []
    seen: list[str] = []

    class Store(BaseEventHandler):
        def handle(self, event: Any, **kwargs: Any) -> None:
            seen.append(event.class_name())
            stored.append(json.loads(event.model_dump_json()) and event.class_name())  # errors are swallowed

    root, handler = get_dispatcher(), Store()
    root.add_event_handler(handler)
    try:
        RapidQueryEngine(retriever, TEXT, llm).query(QUESTION)
    finally:
        root.event_handlers.remove(handler)
    assert {"QueryEndEvent", "LLMCompletionStartEvent", "RapidDecodeEvent"} <= set(stored)
    assert stored == seen


def test_callbacks_receive_the_query_events(llm: RapidLLM, retriever: Finds) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    RapidQueryEngine(retriever, TEXT, llm, callback_manager=CallbackManager([handler])).query(QUESTION)
    assert len(handler.get_event_pairs(CBEventType.QUERY)) == 1


def test_a_chat_engine_over_the_query_engine(
    llm: RapidLLM, pipeline: FakePipeline, retriever: Finds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "answer", lambda parts, options: QUESTION)
    chat = CondenseQuestionChatEngine.from_defaults(
        RapidQueryEngine(retriever, TEXT, llm),
        llm=llm,
        memory=ChatMemoryBuffer.from_defaults(token_limit=1000, tokenizer_fn=str.split),
    )
    chat.chat(QUESTION)
    answer = chat.chat("And the lighthouse?")
    assert [request.parts.context for request in pipeline.requests] == [TEXT, "", TEXT]
    assert [node.node.node_id for node in answer.source_nodes] == ["node-1", "node-2"]


def test_a_tool_of_a_router(llm: RapidLLM, retriever: Finds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        llm.target, "answer", lambda parts, options: '[{"choice": 1, "reason": "It is about people."}]'
    )
    tool = QueryEngineTool.from_defaults(RapidQueryEngine(retriever, TEXT, llm), description="People.")
    router = RouterQueryEngine(LLMSingleSelector.from_defaults(llm), [tool], llm=llm)
    assert [node.node.node_id for node in router.query(QUESTION).source_nodes] == ["node-1", "node-2"]
