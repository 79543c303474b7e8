"""Whole documents and the user's own retriever, in both frameworks, with the bundled models."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import Document as LlamaDocument
from llama_index.core import PromptTemplate, VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever as LlamaRetriever
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.indices.keyword_table import SimpleKeywordTableIndex
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher
from pydantic import Field

from rapid_integrations import (
    FaissVectorStore,
    RapidDecodeEvent,
    RapidLLM,
    RapidPromptTemplate,
    RapidQueryEngine,
    create_rapid_chain,
)
from rapid_integrations.demo import PROMPT_TEMPLATE, DemoDocument, generate_documents
from rapid_integrations.langchain.chain import DEFAULT_PROMPT

DOCUMENT: DemoDocument = next(
    iter(
        generate_documents(
            num_tokens=1024, num_documents=1, questions_per_document=4, seed=21, kinds=["single"]
        )
    )
)
PARAGRAPHS = DOCUMENT.text.split("\n\n")
# Tokens at a prompt's end that every request prefills again, to measure the question agreement.
PREFILLED_AGAIN = 64 + 1
QUESTIONS = [question.question for question in DOCUMENT.questions]
ANSWERS = [question.answer for question in DOCUMENT.questions]
EVIDENCE = [DOCUMENT.text[slice(*question.evidence[0])] for question in DOCUMENT.questions]
LLAMA_PROMPT = PromptTemplate(PROMPT_TEMPLATE.format(context="{context_str}", question="{query_str}"))


def embed(text: str) -> list[float]:
    """A bag of words in 512 hashed dimensions; names, which are long words, have more weight."""
    vector = [0.0] * 512
    for word in text.replace(".", " ").replace("?", " ").split():
        vector[zlib.crc32(word.encode()) % 512] = 1.0 if word.istitle() and len(word) > 5 else 0.05
    return vector


class Words(Embeddings):
    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [embed(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return embed(text)


class LlamaWords(BaseEmbedding):
    def _get_text_embedding(self, text: str) -> list[float]:
        return embed(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return embed(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return embed(query)


class Ensemble(BaseRetriever):
    """Combines several retrievers by reciprocal rank."""

    retrievers: list[Any]

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        ranks: dict[str, float] = {}
        documents: dict[str, Document] = {}
        for retriever in self.retrievers:
            for rank, document in enumerate(
                retriever.invoke(query, config={"callbacks": run_manager.get_child()})
            ):
                documents[document.page_content] = document
                ranks[document.page_content] = ranks.get(document.page_content, 0) + 1 / (60 + rank)
        return [documents[text] for text in sorted(ranks, key=ranks.__getitem__, reverse=True)]


@pytest.fixture(scope="module")
def llm() -> RapidLLM:
    return RapidLLM.demo()


@pytest.fixture(scope="module")
def document_tokens(llm: RapidLLM) -> int:
    return llm.get_num_tokens(DOCUMENT.text)


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """An event that a slow retriever waits for; set after the test."""
    event = threading.Event()
    yield event
    event.set()


def langchain_retriever(kind: str) -> Any:
    texts, metadatas = PARAGRAPHS, [{"paragraph": i} for i in range(len(PARAGRAPHS))]
    memory = InMemoryVectorStore.from_texts(texts, Words(), metadatas)
    faiss = FaissVectorStore.from_texts(texts, Words(), metadatas)
    match kind:
        case "memory":
            return memory.as_retriever(search_kwargs={"k": 3})
        case "faiss":
            return faiss.as_retriever(search_kwargs={"k": 3})
        case "mmr":
            return faiss.as_retriever(search_type="mmr", search_kwargs={"k": 3, "lambda_mult": 0.9})
        case "ensemble":
            return Ensemble(retrievers=[memory.as_retriever(), faiss.as_retriever()])
    return None


class TestLangChain:
    @pytest.mark.parametrize("kind", ["memory", "faiss", "mmr", "ensemble", "none"])
    async def test_retrievers(self, llm: RapidLLM, document_tokens: int, kind: str) -> None:
        chain = create_rapid_chain(llm, langchain_retriever(kind), documents=DOCUMENT.text)
        outputs = [
            chain.invoke(QUESTIONS[0]),
            *chain.batch(QUESTIONS[1:3]),
            await chain.ainvoke(QUESTIONS[3]),
        ]
        assert [output["answer"] for output in outputs] == ANSWERS
        for output, evidence in zip(outputs, EVIDENCE, strict=True):
            stats = output["stats"]
            assert stats["retrieval_fallback"] is None
            assert stats["prompt_tokens"] > document_tokens > stats["drafter_prompt_tokens"]
            assert any(evidence in source.page_content for source in output["context"])
            for source in output["context"]:
                if kind == "none":
                    at = source.metadata["start_index"]
                    assert DOCUMENT.text[at : at + len(source.page_content)] == source.page_content
                else:
                    assert source.page_content == PARAGRAPHS[source.metadata["paragraph"]]

    @pytest.mark.parametrize("kind", ["raises", "nothing", "slow"])
    def test_a_failing_retriever_falls_back(self, llm: RapidLLM, never: threading.Event, kind: str) -> None:
        def retrieve(query: str) -> list[Document]:
            if kind == "raises":
                raise ConnectionError("no route to the index")
            if kind == "slow":
                never.wait(60)
            return []

        reasons = {
            "raises": "retrieve failed: ConnectionError: no route to the index",
            "nothing": "retrieve found nothing",
            "slow": "retrieve took longer than 0.05 s",
        }
        chain = create_rapid_chain(llm.bind(retrieval_timeout_s=0.05), retrieve, documents=DOCUMENT.text)
        output = chain.invoke(QUESTIONS[0])
        assert output["answer"] == ANSWERS[0]
        assert output["stats"]["retrieval_fallback"] == reasons[kind]
        assert all(source.page_content in DOCUMENT.text for source in output["context"])
        assert output["context"][0].metadata == {"start_index": 0}

    def test_an_ordinary_chain_gives_the_same_answer(self, llm: RapidLLM) -> None:
        retriever = langchain_retriever("faiss")
        ordinary = RapidPromptTemplate.from_template(DEFAULT_PROMPT) | llm.bind(retriever=retriever)
        answer = ordinary.invoke({"context": DOCUMENT.text, "question": QUESTIONS[1]})
        assert answer == ANSWERS[1]
        assert (
            create_rapid_chain(llm, retriever, documents=DOCUMENT.text).invoke(QUESTIONS[1])["answer"]
            == answer
        )

    def test_questions_about_one_document_prefill_it_once(self, llm: RapidLLM, document_tokens: int) -> None:
        chain = create_rapid_chain(llm, langchain_retriever("memory"), documents=DOCUMENT.text)
        chain.invoke(QUESTIONS[0])
        for question in QUESTIONS[1:]:
            stats = chain.invoke(question)["stats"]
            assert document_tokens - PREFILLED_AGAIN <= stats["reused_prefix_tokens"] < stats["prompt_tokens"]

    def test_a_conversation_prefills_the_document_once(self, llm: RapidLLM, document_tokens: int) -> None:
        chain = create_rapid_chain(llm, langchain_retriever("memory"), documents=DOCUMENT.text)
        history: list[Any] = []
        read = 0
        for question, expected in zip(QUESTIONS, ANSWERS, strict=True):
            output = chain.invoke({"question": question, "chat_history": history})
            assert output["answer"] == expected
            stats = output["stats"]
            # The previous prompt and answer, except the last one or two tokens of the answer and the tokens
            # that every request prefills again.
            known = min(read, stats["prompt_tokens"] - PREFILLED_AGAIN)
            assert stats["reused_prefix_tokens"] >= max(
                known - 2, document_tokens - PREFILLED_AGAIN if history else 0
            )
            history += [("user", question), ("assistant", output["answer"])]
            read = stats["prompt_tokens"] + stats["completion_tokens"]


@pytest.fixture(scope="module")
def index() -> VectorStoreIndex:
    return VectorStoreIndex.from_documents(
        [LlamaDocument(id_="chronicle", text=DOCUMENT.text)],
        embed_model=LlamaWords(),
        transformations=[SentenceSplitter(chunk_size=60, chunk_overlap=20, tokenizer=str.split)],
    )


def llama_engine(index: VectorStoreIndex, llm: RapidLLM, kind: str, **options: Any) -> RapidQueryEngine:
    vectors = index.as_retriever(similarity_top_k=3)
    match kind:
        case "index":
            return RapidQueryEngine.from_index(index, llm, **options)
        case "keywords":
            words = SimpleKeywordTableIndex(list(index.docstore.docs.values()), llm=llm)
            return RapidQueryEngine.from_index(words, llm, **options)
    fusion = QueryFusionRetriever(
        [vectors, index.as_retriever(similarity_top_k=2)],
        llm=llm,
        mode="reciprocal_rerank",
        num_queries=1,
        use_async=False,
        similarity_top_k=3,
    )
    return RapidQueryEngine.from_retriever(fusion, DOCUMENT.text, llm, **options)


class Decoded(BaseEventHandler):
    stats: list[dict[str, Any]] = Field(default_factory=list)

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, RapidDecodeEvent):
            self.stats.append(event.stats)


@pytest.fixture
def decoded() -> Iterator[Decoded]:
    root, handler = get_dispatcher(), Decoded()
    root.add_event_handler(handler)
    yield handler
    root.event_handlers.remove(handler)


class TestLlamaIndex:
    @pytest.mark.parametrize("kind", ["index", "keywords", "fusion"])
    async def test_retrievers(
        self, llm: RapidLLM, index: VectorStoreIndex, document_tokens: int, kind: str
    ) -> None:
        engine = llama_engine(index, llm, kind)
        streaming = llama_engine(index, llm, kind, streaming=True)
        responses = [engine.query(QUESTIONS[0]), await engine.aquery(QUESTIONS[1])]
        responses.append(streaming.query(QUESTIONS[2]).get_response())
        responses.append(await (await streaming.aquery(QUESTIONS[3])).get_response())
        assert [str(response) for response in responses] == ANSWERS
        for number, (response, evidence) in enumerate(zip(responses, EVIDENCE, strict=True)):
            stats = response.metadata["rapid"]
            assert stats["retrieval_fallback"] is None
            assert stats["prompt_tokens"] > document_tokens > stats["drafter_prompt_tokens"]
            assert stats["reused_prefix_tokens"] >= (document_tokens - PREFILLED_AGAIN if number else 0)
            assert any(evidence in node.node.get_content() for node in response.source_nodes)
            assert {node.node.ref_doc_id for node in response.source_nodes} == {"chronicle"}

    @pytest.mark.parametrize("kind", ["raises", "nothing", "slow"])
    def test_a_failing_retriever_falls_back(self, llm: RapidLLM, never: threading.Event, kind: str) -> None:
        class Poor(LlamaRetriever):
            def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
                if kind == "raises":
                    raise ConnectionError("no route to the index")
                if kind == "slow":
                    never.wait(60)
                return []

        reasons = {
            "raises": "Poor failed: ConnectionError: no route to the index",
            "nothing": "Poor found nothing",
            "slow": "Poor took longer than 0.05 s",
        }
        hasty = llm.model_copy(update={"retrieval_timeout_s": 0.05})
        response = RapidQueryEngine(Poor(), DOCUMENT.text, hasty).query(QUESTIONS[0])
        assert str(response) == ANSWERS[0]
        assert response.metadata["rapid"]["retrieval_fallback"] == reasons[kind]
        assert all(node.node.get_content() in DOCUMENT.text for node in response.source_nodes)

    def test_an_ordinary_prompt_gives_the_same_answer(self, llm: RapidLLM, index: VectorStoreIndex) -> None:
        own = llm.model_copy(update={"retriever": index.as_retriever()})
        answer = own.predict(LLAMA_PROMPT, context_str=DOCUMENT.text, query_str=QUESTIONS[1])
        assert answer == ANSWERS[1]
        engine = RapidQueryEngine.from_index(index, llm, text_qa_template=LLAMA_PROMPT)
        assert str(engine.query(QUESTIONS[1])) == answer

    def test_a_conversation_prefills_the_document_once(
        self, llm: RapidLLM, document_tokens: int, decoded: Decoded
    ) -> None:
        chat = SimpleChatEngine.from_defaults(
            llm=llm,
            system_prompt=f"<document>{DOCUMENT.text}</document>",
            # LlamaIndex's default memory leaves its database connection open.
            memory=ChatMemoryBuffer.from_defaults(token_limit=5000, tokenizer_fn=str.split),
        )
        for question in QUESTIONS[:3]:
            chat.chat(question)
        first, *later = decoded.stats
        read = first["prompt_tokens"]
        for stats in later:
            known = min(read, stats["prompt_tokens"] - PREFILLED_AGAIN)
            assert stats["reused_prefix_tokens"] >= known - 2 > document_tokens - 2 - PREFILLED_AGAIN
            assert stats["retriever"] == "bm25"
            read = stats["prompt_tokens"]
