"""A real model in LangChain: chains, chat, streams, tools, structured output, and vector stores."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from helpers.real_models import MiniLM
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.tools import tool
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import BaseModel, Field

from rapid_integrations import (
    ChatRapid,
    FaissVectorStore,
    RapidLLM,
    RapidPromptTemplate,
    create_rapid_chain,
)

pytestmark = pytest.mark.real
QUESTION = "When does the choir meet?"
STORES = {"FaissVectorStore": FaissVectorStore, "InMemoryVectorStore": InMemoryVectorStore}


class Meeting(BaseModel):
    """A meeting."""

    weekday: Literal["Monday", "Tuesday", "Thursday", "Sunday"]
    people: int = Field(ge=1, le=99)


@tool
def look_up(subject: Literal["bakery", "choir", "ferry"]) -> str:
    """Look up a subject in the notes about the town."""
    return f"{subject}: the choir meets on Thursday evenings in the old customs house."


def test_a_chain_of_text_answers_at_once_and_as_a_stream(llm: RapidLLM, document: str) -> None:
    template = RapidPromptTemplate.from_template("Context: {context}\n\nQuestion: {question}\nAnswer:")
    chain = template | llm | StrOutputParser()
    values = {"context": document, "question": QUESTION}
    text = chain.invoke(values)
    assert "Thursday" in text
    pieces = list(chain.stream(values))
    assert len(pieces) > 1
    assert "".join(pieces) == text


async def test_the_chat_model_streams_its_answer_and_its_statistics(chat: ChatRapid, document: str) -> None:
    messages = [("system", "Answer briefly."), ("human", f"{document}\n\n{QUESTION}")]
    message = chat.invoke(messages)
    chunks = [chunk async for chunk in chat.astream(messages)]
    assert len(chunks) > 1
    assert "".join(str(chunk.content) for chunk in chunks) == message.content
    assert message.usage_metadata["input_tokens"] > 1_000
    follow_up = chat.invoke([*messages, message, ("human", "And on which street is the bakery?")])
    assert follow_up.content


@pytest.mark.parametrize("store", STORES)
def test_a_vector_store_with_real_embeddings_finds_what_the_drafter_reads(
    llm: RapidLLM, embeddings: MiniLM, notes: list[str], document: str, store: str
) -> None:
    documents = [Document(note, metadata={"number": index}) for index, note in enumerate(notes)]
    filled: Any = STORES[store](embeddings)
    filled.add_documents(documents)
    chain = create_rapid_chain(llm, filled.as_retriever(search_kwargs={"k": 4}), documents=document)
    result = chain.invoke(QUESTION)
    assert any("choir meets on Thursday" in found.page_content for found in result["context"])
    assert 1 < len(result["context"]) <= 4, "as many as the drafter's budget allows"
    assert "Thursday" in result["answer"]
    assert result["stats"]["retrieval_fallback"] is None
    again = chain.invoke("In which year was the museum's oldest painting bought?")
    assert "1911" in again["answer"]
    assert again["stats"]["reused_prefix_tokens"] > 1_000


def test_a_tool_is_called_and_its_result_is_read(chat: ChatRapid) -> None:
    asked = HumanMessage("When does the choir meet?")
    call = chat.bind_tools([look_up], tool_choice="any").invoke([asked])
    assert isinstance(call, AIMessage)
    (made,) = call.tool_calls
    assert made["name"] == "look_up"
    assert made["args"].keys() == {"subject"}
    result = ToolMessage(look_up.invoke(made["args"]), tool_call_id=made["id"])
    answer = chat.bind_tools([look_up]).invoke([asked, call, result])
    assert answer.content or answer.tool_calls
    assert not answer.invalid_tool_calls


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_follows_the_schema(chat: ChatRapid, document: str, method: str) -> None:
    structured = chat.with_structured_output(Meeting, method=method)
    meeting = structured.invoke(f"{document}\n\nOn which weekday does the choir meet? How many sing?")
    assert isinstance(meeting, Meeting)


def test_text_follows_a_schema_or_a_choice(llm: RapidLLM, document: str) -> None:
    prompt = f"Context: {document}\n\nQuestion: {QUESTION}\nAnswer:"
    assert Meeting.model_validate_json(llm.invoke(prompt, json_schema=Meeting))
    assert llm.invoke(prompt, choices=["On Monday.", "On Thursday."]) == "On Thursday."
