from typing import Any

import pytest
from helpers.fake_pipeline import DOCUMENT, QUESTION, FakePipeline
from helpers.langchain_calls import Person, Ship, count, search
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate

from rapid_integrations import ChatRapid, ConfigurationError, PromptError, RapidLLM
from rapid_integrations.langchain.messages import tool_definitions


def roles(pipeline: FakePipeline) -> list[tuple[str, str]]:
    """The roles and texts of the last request."""
    return [(message.role, message.text) for message in pipeline.requests[-1].parts.messages]


class TestRoles:
    def test_messages_keep_their_roles(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        messages = [
            SystemMessage("Be brief."),
            HumanMessage("Hello"),
            AIMessage("Hi"),
            HumanMessage(QUESTION),
        ]
        chat = ChatPromptTemplate.from_messages([("system", "Be brief."), ("placeholder", "{rest}")])
        llm.invoke(messages)
        llm.invoke([("system", "Be brief."), ("human", "Hello"), ("ai", "Hi"), ("human", QUESTION)])
        (chat | llm).invoke({"rest": messages[1:]})
        llm.generate_prompt([chat.invoke({"rest": messages[1:]})])
        list(llm.stream(messages))
        for request in pipeline.requests:
            assert [(m.role, m.text) for m in request.parts.messages] == [
                ("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", QUESTION)
            ]  # fmt: skip

    def test_roles_of_a_chat_model(self, chat: ChatRapid, pipeline: FakePipeline) -> None:
        chat.invoke(
            [
                SystemMessage("Be brief."),
                HumanMessage("Hi", name="Ada"),
                AIMessage([{"type": "text", "text": "Hello"}, {"type": "reasoning", "reasoning": "hm"}]),
                ChatMessage("So", role="critic"),
                ("human", [{"type": "text", "text": "Bye"}]),
            ]
        )
        assert roles(pipeline) == [
            ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("critic", "So"),
            ("user", "Bye"),
        ]  # fmt: skip

    def test_the_system_prompt_comes_first_unless_there_is_one(
        self, model_class: Any, pipeline: FakePipeline
    ) -> None:
        model = model_class(pipeline, system_prompt="Be brief.")
        model.invoke(QUESTION)
        assert roles(pipeline) == [("system", "Be brief."), ("user", QUESTION)]
        model.invoke([SystemMessage("Be long."), HumanMessage(QUESTION)])
        assert roles(pipeline) == [("system", "Be long."), ("user", QUESTION)]

    def test_a_tool_message_keeps_its_role(self, model_class: Any, pipeline: FakePipeline) -> None:
        model_class(pipeline).invoke([HumanMessage("Hello"), ToolMessage("42", tool_call_id="1")])
        assert [role for role, _ in roles(pipeline)] == ["user", "tool"]


class TestContents:
    @pytest.mark.parametrize(
        "message",
        [
            HumanMessage([{"type": "image", "url": "https://example.org/x.png"}]),
            HumanMessage([{"type": "image_url", "image_url": {"url": "data:,"}}]),
            ToolMessage([{"type": "image_url", "image_url": {"url": "x"}}], tool_call_id="1"),
            AIMessage([{"type": "tool_use", "name": "f", "input": {}, "id": "1"}]),
        ],
    )
    def test_other_blocks_than_text_are_an_error(
        self, model_class: Any, pipeline: FakePipeline, message: Any
    ) -> None:
        error = r"holds a block of type '(image|image_url|tool_use)': these models take text messages only"
        with pytest.raises(PromptError, match=error):
            model_class(pipeline).invoke([message])
        assert pipeline.requests == []

    def test_an_llm_takes_no_tool_calls(self, llm: RapidLLM) -> None:
        message = AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}])
        with pytest.raises(PromptError, match="RapidLLM takes text messages only"):
            llm.invoke([message])

    def test_calls_and_results_reach_the_prompt(self, chat: ChatRapid, pipeline: FakePipeline) -> None:
        chat.invoke(
            [
                HumanMessage(QUESTION),
                AIMessage(
                    [
                        {"type": "text", "text": "Hm."},
                        {"type": "tool_use", "id": "1", "name": "f", "input": {}},
                    ],
                    tool_calls=[{"name": "f", "args": {"a": 1}, "id": "1"}],
                    invalid_tool_calls=[{"name": None, "args": "<oops>", "id": "2", "error": "no JSON"}],
                ),
                ToolMessage(DOCUMENT, tool_call_id="1", name="f"),
            ]
        )
        _, asked, result = pipeline.requests[-1].parts.messages
        (call,) = asked.tool_calls
        assert (call.name, call.arguments, call.id) == ("f", {"a": 1}, "1")
        assert asked.text == "Hm.\n<oops>"
        assert (result.tool_call_id, result.name, result.text) == ("1", "f", DOCUMENT)
        parts = pipeline.requests[-1].parts
        assert (parts.query, parts.context) == (QUESTION, DOCUMENT)


class TestToolDefinitions:
    def test_every_form_of_a_tool_has_a_definition(self) -> None:
        definitions = tool_definitions([search, count, Person, Ship, Person.model_json_schema()])
        names = [definition["function"]["name"] for definition in definitions]
        assert names == ["search", "count", "Person", "Ship", "Person"]

    def test_a_tool_of_a_provider_is_an_error(self) -> None:
        with pytest.raises(ConfigurationError, match="a provider's own tool"):
            tool_definitions([{"type": "web_search"}])
