import json
from typing import Any

import pytest
from helpers.fake_pipeline import PROMPT, QUESTION, FakePipeline
from helpers.langchain_calls import Person, Ship
from helpers.scripted_tools import MARKUP, ScriptedTools
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage
from pydantic import ValidationError
from typing_extensions import TypedDict

from rapid_integrations import ChatRapid, ConfigurationError, OutputFormat, RapidLLM


class PersonDict(TypedDict):
    name: str
    age: int


class TestTextLLM:
    ADA = '{"name": "Ada", "age": 36}'

    @pytest.fixture(autouse=True)
    def _answer(self, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pipeline, "answer", lambda parts, options: self.ADA)

    async def test_the_schema_constrains_decoding_and_an_object_is_returned(
        self, llm: RapidLLM, pipeline: FakePipeline
    ) -> None:
        chain = llm.with_structured_output(Person)
        assert chain.invoke(PROMPT) == await chain.ainvoke(PROMPT) == Person(name="Ada", age=36)
        for request in pipeline.requests:
            assert request.options.output_format == OutputFormat(json_schema=Person)  # type: ignore[arg-type]
        assert pipeline.requests[-1].parts.query.strip() == QUESTION

    def test_a_typed_dict_or_a_schema_gives_a_dict(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        for schema in (PersonDict, Person.model_json_schema()):
            assert llm.with_structured_output(schema).invoke(PROMPT) == {"name": "Ada", "age": 36}
            asked = json.loads(pipeline.requests[-1].options.output_format.json_schema or "")
            assert list(asked["properties"]) == ["name", "age"]

    @pytest.mark.parametrize("text", ['{"name": "Ad', '{"age": 3}', "Ada"])
    def test_a_text_that_does_not_match_raises_or_is_returned(
        self, llm: RapidLLM, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        monkeypatch.setattr(pipeline, "answer", lambda parts, options: text)
        with pytest.raises(OutputParserException, match="does not match the schema") as raised:
            llm.with_structured_output(Person).invoke(PROMPT)
        assert raised.value.llm_output == text
        answer = llm.with_structured_output(Person, include_raw=True).invoke(PROMPT)
        assert (answer["raw"], answer["parsed"]) == (text, None)
        assert isinstance(answer["parsing_error"], OutputParserException)

    def test_unknown_arguments_and_invalid_schemas_raise_at_once(self, llm: RapidLLM) -> None:
        with pytest.raises(ConfigurationError, match=r"with_structured_output does not take method"):
            llm.with_structured_output(Person, method="json_mode")
        with pytest.raises(ConfigurationError, match="json_schema"):
            llm.with_structured_output([])  # type: ignore[arg-type]


class TestChatModel:
    SCHEMAS = (Person, Ship, Person.model_json_schema())

    @pytest.mark.parametrize("family", MARKUP)
    @pytest.mark.parametrize("schema", SCHEMAS, ids=["pydantic", "typed dict", "json schema"])
    async def test_the_answer_has_the_schemas_type(self, family: str, schema: Any) -> None:
        chat = ChatRapid(ScriptedTools(family=family)).with_structured_output(schema)
        expected: Any = {"name": "Ada", "age": 36} if schema is not Ship else {"name": "Ada"}
        expected = Person(**expected) if schema is Person else expected
        question = 'Who is "Ada", 36?'
        assert chat.invoke(question) == expected
        assert await chat.ainvoke(question) == expected
        assert list(chat.stream(question))[-1] == expected

    def test_with_the_message(self) -> None:
        chat = ChatRapid(ScriptedTools()).with_structured_output(Person, include_raw=True)
        answer = chat.invoke('Who is "Ada", 36?')
        assert answer["raw"].tool_calls[0]["name"] == "Person"
        assert (answer["parsed"], answer["parsing_error"]) == (Person(name="Ada", age=36), None)

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [('{"name": "Ada"}', ValidationError), ('{"name": "Ad', OutputParserException)],
    )
    def test_data_that_do_not_match_are_an_error(self, arguments: str, error: type[Exception]) -> None:
        pipeline = ScriptedTools(
            script=lambda parts: f'<tool_call>\n{{"name": "Person", "arguments": {arguments}}}'
        )
        with pytest.raises(error):
            ChatRapid(pipeline).with_structured_output(Person).invoke("Go")
        answer = ChatRapid(pipeline).with_structured_output(Person, include_raw=True).invoke("Go")
        assert isinstance(answer["parsing_error"], error)
        assert answer["parsed"] is None
        assert isinstance(answer["raw"], AIMessage)

    @pytest.mark.parametrize("method", ["json_schema", "json_mode"])
    @pytest.mark.parametrize("schema", SCHEMAS, ids=["pydantic", "typed dict", "json schema"])
    async def test_text_under_a_constraint(self, method: Any, schema: Any) -> None:
        data = {"name": "Ada"} if schema is Ship else {"name": "Ada", "age": 36}
        pipeline = ScriptedTools(script=lambda parts: json.dumps(data))
        chat = ChatRapid(pipeline).with_structured_output(schema, method=method)
        expected: Any = Person(**data) if schema is Person else data
        assert chat.invoke("Who?") == await chat.ainvoke("Who?") == expected
        constraint = pipeline.requests[-1].options.output_format.json_schema
        assert constraint is not None
        assert (json.loads(constraint) == {"type": "object"}) == (method == "json_mode")
        assert not pipeline.requests[-1].parts.tools
        raw = ChatRapid(pipeline).with_structured_output(schema, method=method, include_raw=True)
        assert raw.invoke("Who?")["parsed"] == expected

    def test_text_in_content_blocks_is_read_too(self) -> None:
        pipeline = ScriptedTools(script=lambda parts: '{"name": "Ada", "age": 36}')
        chat = ChatRapid(pipeline, output_version="v1").with_structured_output(Person, method="json_schema")
        assert chat.invoke("Who?") == Person(name="Ada", age=36)

    def test_text_that_was_cut_off_is_an_error(self) -> None:
        pipeline = ScriptedTools(script=lambda parts: '{"name": "Ad')
        chat = ChatRapid(pipeline)
        with pytest.raises(OutputParserException, match="perhaps because it was cut off"):
            chat.with_structured_output(Person, method="json_schema").invoke("Go")
        answer = chat.with_structured_output(Person, method="json_schema", include_raw=True).invoke("Go")
        assert (answer["raw"].content, answer["parsed"]) == ('{"name": "Ad', None)
        assert isinstance(answer["parsing_error"], OutputParserException)

    def test_unknown_methods_and_arguments_raise_at_once(self, chat: ChatRapid) -> None:
        with pytest.raises(ConfigurationError, match="take one of function_calling, json_schema, json_mode"):
            chat.with_structured_output(Person, method="magic")
        with pytest.raises(ConfigurationError, match="does not take temprature"):
            chat.with_structured_output(Person, temprature=1)
