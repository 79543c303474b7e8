"""LlamaIndex's chat engines on the packaged models: question and context reach the engine separately."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core import SummaryIndex
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import TextNode

from rapid_integrations import RapidLLM
from rapid_integrations.demo import PROMPT_TEMPLATE, DemoQuestion, generate_documents
from rapid_integrations.prompts import PromptParts

(DOCUMENT,) = generate_documents(
    num_tokens=512, num_documents=1, questions_per_document=6, seed=11, kinds=["describe"]
)
QUESTION: DemoQuestion = max(DOCUMENT.questions, key=lambda question: len(question.answer))
FOLLOW_UP: DemoQuestion = DOCUMENT.questions[2]


@pytest.fixture(scope="module")
def llm() -> RapidLLM:
    return RapidLLM.demo(max_new_tokens=48)


@pytest.fixture
def reached(llm: RapidLLM, monkeypatch: pytest.MonkeyPatch) -> list[PromptParts]:
    """The prompts that reach the engine."""
    pipeline, prompts = llm.pipeline, []

    def generate(parts: list[PromptParts], **arguments: Any) -> Any:
        prompts.extend(parts)
        return type(pipeline).generate(pipeline, parts, **arguments)

    def stream(parts: PromptParts, **arguments: Any) -> Any:
        prompts.append(parts)
        return type(pipeline).stream(pipeline, parts, **arguments)

    monkeypatch.setattr(pipeline, "generate", generate)
    monkeypatch.setattr(pipeline, "stream", stream)
    return prompts


def chat_engine(llm: RapidLLM, mode: str) -> Any:
    # LlamaIndex's default memory leaves its database connection open.
    memory = ChatMemoryBuffer.from_defaults(token_limit=500, tokenizer_fn=str.split)
    index = SummaryIndex([TextNode(text=DOCUMENT.text)])
    return index.as_chat_engine(chat_mode=mode, llm=llm, memory=memory)


def queries_and_contexts(prompts: list[PromptParts]) -> list[tuple[str, str]]:
    return [(parts.query, parts.context) for parts in prompts]


@pytest.mark.parametrize("mode", ["context", "condense_plus_context"])
def test_a_conversation_about_a_context(llm: RapidLLM, reached: list[PromptParts], mode: str) -> None:
    engine = chat_engine(llm, mode)
    assert engine.chat(QUESTION.question).response == QUESTION.answer
    assert queries_and_contexts(reached) == [(QUESTION.question, DOCUMENT.text)]
    streamed = engine.stream_chat(FOLLOW_UP.question)
    assert "".join(streamed.response_gen) == FOLLOW_UP.answer
    assert queries_and_contexts(reached)[-1] == (FOLLOW_UP.question, DOCUMENT.text)
    # Condensing is a separate request; only the retriever uses its result.
    assert len(reached) == (2 if mode == "context" else 3)
    assert [source.text for source in streamed.source_nodes] == [DOCUMENT.text]


def test_condensed_questions(llm: RapidLLM, reached: list[PromptParts]) -> None:
    engine = chat_engine(llm, "condense_question")
    assert engine.chat(QUESTION.question).response == QUESTION.answer
    assert queries_and_contexts(reached) == [(QUESTION.question, DOCUMENT.text)]
    engine.chat(FOLLOW_UP.question)
    condensing, answering = queries_and_contexts(reached)[1:]
    assert condensing == (FOLLOW_UP.question, "")
    # The demo models are not trained to condense, so the condensed question is arbitrary.
    assert answering[1] == DOCUMENT.text


def test_a_conversation_without_an_index(llm: RapidLLM, reached: list[PromptParts]) -> None:
    engine = chat_engine(llm, "simple")
    asked = PROMPT_TEMPLATE.format(context=DOCUMENT.text, question=QUESTION.question)
    assert engine.chat(asked).response == QUESTION.answer
    assert "".join(engine.stream_chat(FOLLOW_UP.question).response_gen) == FOLLOW_UP.answer
    assert [query for query, _ in queries_and_contexts(reached)] == [QUESTION.question, FOLLOW_UP.question]
    assert all(DOCUMENT.text[100:] in context for _, context in queries_and_contexts(reached))
