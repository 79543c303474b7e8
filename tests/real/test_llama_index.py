"""A real model in LlamaIndex: query engines over vector stores, chat engines, tools, structured output."""

from typing import Literal

import pytest
from helpers.real_models import MiniLM
from llama_index.core import PromptTemplate, StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import TextNode
from llama_index.core.tools import FunctionTool
from llama_index.core.vector_stores.simple import SimpleVectorStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from pydantic import BaseModel, PrivateAttr

from rapid_integrations import ChatRapid, RapidLLM, RapidQueryEngine

pytestmark = pytest.mark.real
QUESTION = "When does the choir meet?"
FACT = "The choir meets on Thursday evenings in the old customs house."
DIMENSION = 384


class MiniLMEmbedding(BaseEmbedding):
    """The embeddings of the fixture, for LlamaIndex."""

    _model: MiniLM = PrivateAttr()

    def __init__(self, model: MiniLM) -> None:
        super().__init__(model_name="minilm")
        self._model = model

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._model.embed_query(text)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._model.embed_documents(texts)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._model.embed_query(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


class Meeting(BaseModel):
    """A meeting."""

    weekday: Literal["Monday", "Tuesday", "Thursday", "Sunday"]


def faiss_store() -> BasePydanticVectorStore:
    import faiss
    from llama_index.vector_stores.faiss import FaissVectorStore

    return FaissVectorStore(faiss_index=faiss.IndexFlatIP(DIMENSION))


STORES = {"faiss": faiss_store, "simple": SimpleVectorStore}


def make_index(store: BasePydanticVectorStore, embeddings: MiniLM, notes: list[str]) -> VectorStoreIndex:
    return VectorStoreIndex(
        [TextNode(text=note) for note in notes],
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=MiniLMEmbedding(embeddings),
    )


@pytest.mark.parametrize("store", STORES)
def test_a_query_engine_reads_the_document_and_drafts_from_the_best_nodes(
    llm: RapidLLM, embeddings: MiniLM, notes: list[str], document: str, store: str
) -> None:
    index = make_index(STORES[store](), embeddings, notes)
    engine = RapidQueryEngine.from_retriever(index.as_retriever(similarity_top_k=4), [document], llm=llm)
    response = engine.query(QUESTION)
    assert "Thursday" in str(response)
    assert any(FACT in node.text for node in response.source_nodes)
    stats = response.metadata["rapid"]
    assert stats["prompt_tokens"] > 1_000
    assert stats["drafter_prompt_tokens"] < 600
    again = engine.query("In which year was the museum's oldest painting bought?")
    assert "museum" in str(again)
    assert again.metadata["rapid"]["reused_prefix_tokens"] > 1_000


def test_a_chat_engine_answers_from_its_index(llm: RapidLLM, embeddings: MiniLM, notes: list[str]) -> None:
    index = make_index(SimpleVectorStore(), embeddings, notes)
    memory = ChatMemoryBuffer.from_defaults(token_limit=1_000, tokenizer_fn=str.split)
    engine = index.as_chat_engine(chat_mode="context", llm=llm, memory=memory, similarity_top_k=4)
    assert "Thursday" in engine.chat(QUESTION).response
    streamed = engine.stream_chat("And in which building?")
    text = "".join(streamed.response_gen)
    assert text.strip()
    assert len(memory.get()) == 4


def test_a_required_tool_is_called(chat: ChatRapid, llm: RapidLLM) -> None:
    def look_up(subject: Literal["bakery", "choir", "ferry"]) -> str:
        """Look up a subject in the notes about the town."""
        return FACT

    with_tools = RapidLLM.from_pretrained(
        llm.target, tokenizer=chat.tokenizer, dtype="float32", max_new_tokens=32, retrieval_max_tokens=256
    )
    assert with_tools.metadata.is_function_calling_model
    tools = [FunctionTool.from_defaults(look_up)]
    response = with_tools.chat_with_tools(tools, "When does the choir meet?", tool_required=True)
    (call,) = with_tools.get_tool_calls_from_response(response)
    assert call.tool_name == "look_up"
    assert call.tool_kwargs.keys() == {"subject"}


def test_structured_prediction_follows_the_schema(llm: RapidLLM, document: str) -> None:
    template = PromptTemplate("Context: {context_str}\n\nQuestion: {query_str}\nAnswer:")
    meeting = llm.structured_predict(Meeting, template, context_str=document, query_str=QUESTION)
    assert isinstance(meeting, Meeting)
