from typing import Any

import pytest
from helpers.fake_pipeline import DOCUMENT, QUESTION, FakePipeline
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

from rapid_integrations import ChatRapid, RapidChatPromptTemplate, RapidLLM, RapidPromptTemplate

TEMPLATE = "Read this.\n<context>\n{context}\n</context>\n{question}"


def segments(pipeline: FakePipeline) -> list[tuple[str, str]]:
    """The query and the context of each request."""
    return [(request.parts.query, request.parts.context) for request in pipeline.requests]


class TestTemplates:
    @pytest.mark.parametrize("template", [RapidPromptTemplate, RapidChatPromptTemplate])
    async def test_query_and_context_come_through_every_wrapper(
        self, model_class: Any, pipeline: FakePipeline, template: type[Any]
    ) -> None:
        # Without tags, and with a context shorter than its surroundings, the text does not show the context.
        prompt = template.from_template("{question} " + "Be brief. " * 50 + "{context}")
        values = {"context": "Ada is here.", "question": QUESTION}
        model, failing = model_class(pipeline), model_class(FakePipeline(max_prompt_chars=0))
        chains = [
            prompt | model,
            prompt | model | StrOutputParser(),
            prompt | model.bind(temperature=0.5),
            prompt | model.with_retry(),
            prompt | failing.with_fallbacks([model]),
            prompt | model.with_config(run_name="x"),
            {"context": lambda v: v["context"], "question": lambda v: v["question"]} | prompt | model,
            RunnablePassthrough() | prompt | model,
        ]
        for chain in chains:
            chain.invoke(values)
            list(chain.stream(values))
            chain.batch([values, values])
            await chain.ainvoke(values)
            async for _ in chain.astream(values):
                pass
            await chain.abatch([values])
        model.generate_prompt([prompt.invoke(values)])
        assert segments(pipeline) == [(QUESTION, "Ada is here.")] * (7 * len(chains) + 1)

    def test_a_partial_variable_is_found(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        prompt = RapidPromptTemplate.from_template(TEMPLATE).partial(context="Ada is here.")
        (prompt | llm).invoke({"question": QUESTION})
        assert pipeline.requests[-1].parts.context == "Ada is here."

    def test_documents_become_text(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        documents = [Document(page_content="Ada is here."), Document(page_content="Grace is not.")]
        (RapidPromptTemplate.from_template(TEMPLATE) | llm).invoke(
            {"context": documents, "question": QUESTION}
        )
        assert pipeline.requests[-1].parts.context == "Ada is here.\n\nGrace is not."
        assert "page_content" not in pipeline.requests[-1].parts.text


class TestArguments:
    def test_query_and_context_of_a_call(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        text = "Ada is here. " + "Be brief. " * 50
        llm.invoke(text, query="Be brief.", context="Ada is here.")
        llm.bind(query="Be brief.", context="Ada is here.").invoke(text)
        for request in pipeline.requests:
            assert request.parts.context == "Ada is here."

    def test_a_calls_context_need_not_be_in_its_text(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        llm.invoke(QUESTION, context=DOCUMENT)
        parts = pipeline.requests[-1].parts
        assert parts.context.strip() == DOCUMENT.strip()
        assert QUESTION in parts.query
        assert DOCUMENT.strip() in parts.text

    def test_they_replace_those_of_a_template(self, chat: ChatRapid, pipeline: FakePipeline) -> None:
        prompt = RapidChatPromptTemplate.from_messages([("human", "Read {context} and say {question}")])
        (prompt | chat.bind(query="and when?")).invoke({"context": "Ada is it.", "question": "who?"})
        chat.invoke("who?", context="Grace is it.")
        assert segments(pipeline) == [("and when?", "Ada is it."), ("who?", "Grace is it.")]

    def test_a_retriever_of_the_call_replaces_the_models(
        self, model_class: Any, pipeline: FakePipeline
    ) -> None:
        def first(query: str) -> list[str]:
            return ["first"]

        def second(query: str) -> list[str]:
            return ["second"]

        model = model_class(pipeline, retriever=first)
        model.invoke(QUESTION)
        model.invoke(QUESTION, retriever=second)
        assert [request.retriever for request in pipeline.requests] == [first, second]


def test_the_parts_of_an_ordinary_prompt_are_found_by_tags(chat: ChatRapid, pipeline: FakePipeline) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Read.\n<context>{c}</context>"), ("human", "{q}")])
    (prompt | chat).invoke({"c": DOCUMENT, "q": QUESTION})
    assert segments(pipeline) == [(QUESTION, DOCUMENT.strip())]
