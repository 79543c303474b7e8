"""Tests of structured prediction: the requests that reach the model, and the predicted objects."""

import sys
from typing import Any

import pytest
from helpers.fake_pipeline import FakePipeline
from helpers.scripted_tools import MARKUP, ScriptedTools
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import (
    ChatPromptTemplate,
    PromptTemplate,
    RichPromptTemplate,
    SelectorPromptTemplate,
)
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel

from rapid_integrations import OutputFormat, RapidLLM

QUESTION = 'Where is the "Balbra depot"?'


def find(query: str) -> str:
    """Search the archive."""
    return f"found {query}"


FIND = FunctionTool.from_defaults(find, name="search")


@pytest.fixture(params=list(MARKUP))
def pipeline(request: pytest.FixtureRequest) -> ScriptedTools:
    return ScriptedTools(family=request.param)


@pytest.fixture
def llm(pipeline: ScriptedTools) -> RapidLLM:
    return RapidLLM(pipeline)


class TestPrediction:
    class Person(BaseModel):
        """A person."""

        name: str

    PROMPT = PromptTemplate("<context>\n{context_str}\n</context>\n{query_str}")
    VALUES = {"context_str": "Ada is here.", "query_str": 'Who is here, is it "Ada"?'}  # noqa: RUF012

    async def test_it_is_text_by_default(self, llm: RapidLLM, pipeline: ScriptedTools) -> None:
        pipeline.script = lambda parts: '{"name": "Ada"}'
        ada = self.Person(name="Ada")
        assert llm.structured_predict(self.Person, self.PROMPT, **self.VALUES) == ada
        assert await llm.astructured_predict(self.Person, self.PROMPT, **self.VALUES) == ada
        assert list(llm.stream_structured_predict(self.Person, self.PROMPT, **self.VALUES))[-1] == ada
        astream = await llm.astream_structured_predict(self.Person, self.PROMPT, **self.VALUES)
        assert [person async for person in astream][-1] == ada
        structured = llm.as_structured_llm(self.Person)
        assert structured.chat([ChatMessage("Who?")]).raw == ada
        assert structured.complete("Who?").raw == ada
        assert len(pipeline.requests) == 6
        for request in pipeline.requests:
            assert request.parts.tools == ()
            assert request.options.output_format == OutputFormat(json_schema=self.Person)

    async def test_it_is_unconstrained_text_without_llguidance(
        self, llm: RapidLLM, pipeline: ScriptedTools, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "llguidance", None)
        pipeline.script = lambda parts: '{"name": "Ada"}'
        assert llm.structured_predict(self.Person, self.PROMPT, **self.VALUES) == self.Person(name="Ada")
        assert (pipeline.requests[0].parts.tools, pipeline.requests[0].options.output_format) == (
            (),
            OutputFormat(),
        )

    async def test_it_is_a_tool_call_in_function_mode(self, pipeline: ScriptedTools) -> None:
        llm = RapidLLM(pipeline, pydantic_program_mode=PydanticProgramMode.FUNCTION)
        ada = self.Person(name="Ada")
        assert llm.structured_predict(self.Person, self.PROMPT, **self.VALUES) == ada
        assert await llm.astructured_predict(self.Person, self.PROMPT, **self.VALUES) == ada
        assert list(llm.stream_structured_predict(self.Person, self.PROMPT, **self.VALUES))[-1] == ada
        astream = await llm.astream_structured_predict(self.Person, self.PROMPT, **self.VALUES)
        assert [person async for person in astream][-1] == ada
        assert len(pipeline.requests) == 4
        for request in pipeline.requests:
            assert request.parts.answer_start  # the call is forced, and constrained by the schema
            assert request.options.output_format.json_schema
            assert request.parts.tools[0]["function"]["name"] == "Person"
            assert request.parts.context == "Ada is here."

    # LlamaIndex serialises partial objects with pydantic's deprecated json().
    @pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")
    async def test_messages_reach_the_model_as_messages(self, llm: RapidLLM, pipeline: ScriptedTools) -> None:
        calling = llm.chat_with_tools([FIND], QUESTION)
        (selection,) = llm.get_tool_calls_from_response(calling)
        pipeline.script = lambda parts: '{"name": "Ada"}'
        pipeline.requests.clear()
        call_id = {"tool_call_id": selection.tool_id}
        result = ChatMessage(role="tool", content='{"name": "Ada"}', additional_kwargs=call_id)
        system = ChatMessage(role="system", content="Be brief.")
        messages = [system, ChatMessage(QUESTION), calling.message, result, ChatMessage("And {who} is it?")]
        structured = llm.as_structured_llm(self.Person)
        answers = [structured.chat(messages), await structured.achat(messages)]
        answers += [list(structured.stream_chat(messages))[-1]]
        answers += [[part async for part in await structured.astream_chat(messages)][-1]]
        template = ChatPromptTemplate(messages)
        assert [answer.raw for answer in answers] == [self.Person(name="Ada")] * 4
        llm.structured_predict(self.Person, template, who="she")
        asked = [*["And {who} is it?"] * 4, "And she is it?"]
        for request, question in zip(pipeline.requests, asked, strict=True):
            roles = [message.role for message in request.parts.messages]
            assert roles == ["system", "user", "assistant", "tool", "user"]
            assert [call.name for call in request.parts.messages[2].tool_calls] == ["search"]
            assert request.parts.messages[0].text.startswith("Be brief.\n\n\nHere's a JSON schema")
            assert request.parts.messages[3].text == '{"name": "Ada"}'
            assert request.parts.messages[4].text == question
            assert request.parts.query == question
            assert request.options.output_format == OutputFormat(json_schema=self.Person)

    def test_the_schema_is_no_part_of_the_question(self, llm: RapidLLM, pipeline: ScriptedTools) -> None:
        pipeline.script = lambda parts: '{"name": "Ada"}'
        llm.as_structured_llm(self.Person).chat([ChatMessage(f"<context>Ada.</context> {QUESTION}")])
        (request,) = pipeline.requests
        assert "Here's a JSON schema" in request.parts.text
        assert (request.parts.query, request.parts.context) == (QUESTION, "Ada.")

    def test_a_template_is_not_changed(self, llm: RapidLLM, pipeline: ScriptedTools) -> None:
        pipeline.script = lambda parts: '{"name": "Ada"}'
        text = PromptTemplate("{query_str}")
        selected = SelectorPromptTemplate(PromptTemplate("{query_str}"), [(lambda llm: False, text)])
        rich = RichPromptTemplate("{% chat role='user' %}{{ query_str }}{% endchat %}")
        partial = text.partial_format(query_str=QUESTION)
        for template in (text, selected, rich, partial, ChatPromptTemplate([ChatMessage("{query_str}")])):
            values = {} if template is partial else {"query_str": QUESTION}
            llm.structured_predict(self.Person, template, **values)
            request = pipeline.requests[-1]
            assert request.parts.text.startswith(f"{QUESTION}\n\n\nHere's a JSON schema")
            assert [(m.role, request.parts.query) for m in request.parts.messages] == [("user", QUESTION)]
            assert template.output_parser is None
            llm.predict(template, **values)
            assert pipeline.requests[-1].parts.text == QUESTION

    async def test_the_constraint_can_be_turned_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipeline = FakePipeline()
        monkeypatch.setattr(pipeline, "answer", lambda parts, options: '{"name": "Ada Lovelace"}')
        llm = RapidLLM(pipeline, regex="[a-z]+")

        async def predictions(**kwargs: Any) -> list[Any]:
            streamed = list(llm.stream_structured_predict(self.Person, self.PROMPT, **self.VALUES, **kwargs))
            astream = await llm.astream_structured_predict(self.Person, self.PROMPT, **self.VALUES, **kwargs)
            return [
                llm.structured_predict(self.Person, self.PROMPT, **self.VALUES, **kwargs),
                await llm.astructured_predict(self.Person, self.PROMPT, **self.VALUES, **kwargs),
                streamed[-1],
                [person async for person in astream][-1],
            ]

        def formats() -> set[OutputFormat]:
            asked = {request.options.output_format for request in pipeline.requests}
            assert {request.parts.context for request in pipeline.requests} == {"Ada is here."}
            pipeline.requests.clear()
            return asked

        assert await predictions() == [self.Person(name="Ada Lovelace")] * 4
        assert formats() == {OutputFormat(json_schema=self.Person)}  # type: ignore[arg-type]
        response = llm.as_structured_llm(self.Person).chat(
            [ChatMessage(role="user", content=f"<context>Ada is here.</context> {QUESTION}")]
        )
        assert response.raw == self.Person(name="Ada Lovelace")
        assert formats() == {OutputFormat(json_schema=self.Person)}  # type: ignore[arg-type]
        await predictions(llm_kwargs={"json_schema": None, "regex": None})
        assert formats() == {OutputFormat()}
        monkeypatch.setitem(sys.modules, "llguidance", None)
        assert await predictions() == [self.Person(name="Ada Lovelace")] * 4
        assert formats() == {OutputFormat(regex="[a-z]+")}
