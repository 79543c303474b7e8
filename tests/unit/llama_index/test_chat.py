"""Tests of chat and function calling: the requests that reach the model, and the parsed answers."""

import asyncio
import pickle
import sys
from typing import Any

import pytest
from helpers.fake_pipeline import FakePipeline
from helpers.scripted_tools import MARKUP, ScriptedTools, call_text
from llama_index.core.llms import ChatMessage, ChatResponse, ImageBlock, TextBlock
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools import FunctionTool

from rapid_integrations import (
    ConfigurationError,
    ContextLengthError,
    OutputFormat,
    PromptError,
    RapidLLM,
    ToolCallError,
)

QUESTION = 'Where is the "Balbra depot"?'
ARGUMENTS = {"query": "Balbra depot"}


def find(query: str) -> str:
    """Search the archive."""
    return f"found {query}"


def count(least: int) -> int:
    """Count the ships."""
    if least < 0:
        raise ValueError("less than none")
    return least


FIND, COUNT = FunctionTool.from_defaults(find, name="search"), FunctionTool.from_defaults(count)


@pytest.fixture(params=list(MARKUP))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipeline(family: str) -> ScriptedTools:
    return ScriptedTools(family=family)


@pytest.fixture
def llm(pipeline: ScriptedTools) -> RapidLLM:
    return RapidLLM(pipeline)


def llm_that_answers(text: str, family: str = "hermes") -> RapidLLM:
    return RapidLLM(ScriptedTools(family=family, script=lambda parts: text))


def calls(response: ChatResponse) -> list[tuple[str, dict[str, Any]]]:
    selections = RapidLLM(FakePipeline()).get_tool_calls_from_response(response, error_on_no_tool_call=False)
    assert len({selection.tool_id for selection in selections} - {""}) == len(selections)
    return [(selection.tool_name, selection.tool_kwargs) for selection in selections]


class TestCalls:
    async def test_every_entry_point_gives_the_call(self, llm: RapidLLM) -> None:
        streamed = list(llm.stream_chat_with_tools([FIND, COUNT], QUESTION))
        astream = await llm.astream_chat_with_tools([FIND, COUNT], QUESTION)
        answers = [
            llm.chat_with_tools([FIND, COUNT], QUESTION),
            await llm.achat_with_tools([FIND, COUNT], QUESTION),
            streamed[-1],
            [response async for response in astream][-1],
            llm.chat([ChatMessage(QUESTION)], tools=[FIND, COUNT]),
        ]
        for answer in answers:
            assert calls(answer) == [("search", ARGUMENTS)]
            assert answer.message.content is None
            assert answer.raw["finish_reason"] == answer.additional_kwargs["finish_reason"] == "tool_calls"
            assert answer.raw["usage"]["completion_tokens"] > 0
        assert (answers[0].delta, streamed[-1].delta) == (None, "")
        assert ChatResponse.model_validate_json(answers[0].model_dump_json()).message == answers[0].message

    def test_text_before_a_call_streams(self, family: str) -> None:
        text = f"Let me see. Well.{call_text(family, 'search', ARGUMENTS)}"
        if family == "llama3":  # a Llama 3 call is the whole answer or begins with its tag
            text = text.replace("{", "<|python_tag|>{", 1)
        *responses, last = llm_that_answers(text, family).stream_chat_with_tools([FIND], QUESTION)
        texts = [response.delta for response in responses if response.delta]
        assert len(texts) > 2
        assert "".join(texts) == last.message.content == "Let me see. Well."
        contents = [response.message.content for response in responses]
        assert contents == sorted(contents, key=len)
        assert [len(calls(r)) for r in responses] == [0] * (len(responses) - 1) + [1]
        assert calls(last) == [("search", ARGUMENTS)]

    def test_an_answer_without_a_call(self, llm: RapidLLM, pipeline: ScriptedTools) -> None:
        pipeline.script = lambda parts: "It is near."
        response = llm.chat_with_tools([FIND], QUESTION)
        assert (response.message.content, response.message.additional_kwargs) == ("It is near.", {})
        assert response.raw["finish_reason"] == "stop"
        assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
        with pytest.raises(ToolCallError, match=r"wrote 'It is near\.'"):
            llm.get_tool_calls_from_response(response)
        assert str(llm.predict_and_call([FIND], QUESTION, error_on_no_tool_call=False)) == "It is near."
        with pytest.raises(ToolCallError):
            llm.predict_and_call([FIND], QUESTION)

    def test_an_invalid_call_stays_in_the_text(self) -> None:
        broken = '<tool_call>\n{"name": "search", "arguments": {"query": \n</tool_call>'
        llm = llm_that_answers(f"Well.\n{broken}")
        response = llm.chat_with_tools([FIND], QUESTION)
        (invalid,) = response.additional_kwargs["invalid_tool_calls"]
        assert invalid["text"] == broken.removesuffix("\n</tool_call>").strip()
        assert response.message.content == f"Well.\n{invalid['text']}"
        with pytest.raises(ToolCallError, match=r"It wrote an invalid call: not JSON"):
            llm.get_tool_calls_from_response(response)
        deltas = [r.delta for r in llm.stream_chat_with_tools([FIND], QUESTION)]
        assert "".join(deltas) == response.message.content

    def test_several_calls(self, family: str) -> None:
        one, two = (call_text(family, "count", {"least": number}) for number in (1, 2))
        if family == "mistral":
            text = one[:-1] + ", " + two.removeprefix("[TOOL_CALLS] [")
        else:
            text = f"{one};{two}" if family == "llama3" else f"{one}\n{two}"
        llm = llm_that_answers(text, family)
        both = [("count", {"least": 1}), ("count", {"least": 2})]
        assert calls(llm.chat_with_tools([COUNT], QUESTION, allow_parallel_tool_calls=True)) == both
        for single in (
            llm.chat_with_tools([COUNT], QUESTION),
            list(llm.stream_chat_with_tools([COUNT], QUESTION))[-1],
        ):
            assert calls(single) == both[:1]
            assert len(single.message.additional_kwargs["tool_calls"]) == 1
            (surplus,) = single.additional_kwargs["surplus_tool_calls"]
            assert surplus["function"] == {"name": "count", "arguments": '{"least": 2}'}
        assert str(llm.predict_and_call([COUNT], QUESTION)) == "1"
        assert str(llm.predict_and_call([COUNT], QUESTION, allow_parallel_tool_calls=True)) == "1\n\n2"

    async def test_a_tool_is_predicted_and_called(self, llm: RapidLLM) -> None:
        expected = "found Balbra depot"
        assert str(llm.predict_and_call([FIND], QUESTION)) == expected
        assert str(await llm.apredict_and_call([FIND], QUESTION)) == expected
        answer = llm.predict_and_call([FIND], chat_history=[ChatMessage(QUESTION)])
        assert [source.tool_name for source in answer.sources] == ["search"]

    def test_a_tool_that_fails(self) -> None:
        llm = llm_that_answers(call_text("hermes", "count", {"least": -1}))
        assert "less than none" in str(llm.predict_and_call([COUNT], QUESTION))
        with pytest.raises(ValueError, match="less than none"):
            llm.predict_and_call([COUNT], QUESTION, error_on_tool_error=True)

    def test_reasoning_is_separated_from_the_text(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from rapid_integrations.tools import formats as tools

        template = tools.FORMATS[family].response_template
        thinking = {"open": "<think>", "close": "</think>"}
        fields = {"thinking": thinking, **template["fields"]}
        with_reasoning = tools.replace(
            tools.FORMATS[family], response_template={**template, "fields": fields}
        )
        monkeypatch.setitem(tools.FORMATS, family, with_reasoning)
        llm = llm_that_answers("<think>A depot, hm.</think>It is near.", family)
        response = llm.chat_with_tools([FIND], QUESTION)
        assert [block.block_type for block in response.message.blocks] == ["thinking", "text"]
        assert response.message.blocks[0].content == "A depot, hm."
        streamed = list(llm.stream_chat_with_tools([FIND], QUESTION))
        assert "".join(r.additional_kwargs.get("thinking_delta", "") for r in streamed) == "A depot, hm."
        llm.chat([ChatMessage(QUESTION), response.message, ChatMessage("Where?")])
        assert [m.text for m in llm.target.requests[-1].parts.messages] == [QUESTION, "It is near.", "Where?"]

    def test_a_truncated_answer_without_a_call(self) -> None:
        llm = llm_that_answers(call_text("hermes", "search", {"query": "a b c d e f"}))
        response = llm.chat_with_tools([FIND], QUESTION, max_tokens=3)
        assert response.raw["finish_reason"] == "length"
        with pytest.raises(ToolCallError, match="Raise max_new_tokens"):
            llm.get_tool_calls_from_response(response)


class TestChoice:
    @pytest.mark.parametrize(
        ("arguments", "start"),
        [
            ({}, ""),
            ({"tool_choice": "auto"}, ""),
            ({"tool_choice": "auto", "tool_required": True}, ""),
            ({"tool_required": True}, '<tool_call>\n{"name": "'),
            ({"tool_choice": "any"}, '<tool_call>\n{"name": "'),
            ({"tool_choice": "count"}, '<tool_call>\n{"name": "count", "arguments":'),
            (
                {"tool_choice": {"type": "function", "function": {"name": "count"}}},
                '<tool_call>\n{"name": "count", "arguments":',
            ),
        ],
    )
    def test_a_forced_call_begins_the_answer(self, arguments: dict[str, Any], start: str) -> None:
        llm = RapidLLM(ScriptedTools())
        response = llm.chat_with_tools([FIND, COUNT], QUESTION, **arguments)
        parts = llm.target.requests[-1].parts
        assert "".join(segment.text for segment in parts.answer_start) == start
        assert calls(response) == [("count", {"least": 7}) if "count" in start else ("search", ARGUMENTS)]

    def test_tool_choice_none_offers_no_tool(self) -> None:
        llm = RapidLLM(ScriptedTools())
        response = llm.chat_with_tools([FIND], QUESTION, tool_choice="none")
        assert (llm.target.requests[-1].parts.tools, calls(response)) == ((), [])

    def test_arguments_of_a_forced_call_are_constrained_by_the_schema(
        self, llm: RapidLLM, pipeline: ScriptedTools, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for last in (
            llm.chat_with_tools([FIND], QUESTION, tool_required=True),
            list(llm.stream_chat_with_tools([FIND, COUNT], QUESTION, tool_choice="search"))[-1],
        ):
            assert calls(last) == [("search", ARGUMENTS)]
            schema = {"type": "object", **FIND.metadata.get_parameters_dict(), "additionalProperties": False}
            assert pipeline.requests[-1].options.output_format == OutputFormat(json_schema=schema)
        with pytest.raises(ConfigurationError, match="leave one of the two out"):
            llm.chat_with_tools([FIND], QUESTION, tool_required=True, regex="[a-z]+")
        monkeypatch.setitem(sys.modules, "llguidance", None)
        assert calls(llm.chat_with_tools([FIND], QUESTION, tool_required=True)) == [("search", ARGUMENTS)]
        assert pipeline.requests[-1].options.output_format == OutputFormat()

    def test_invalid_arguments_raise(self) -> None:
        llm = RapidLLM(ScriptedTools())
        with pytest.raises(ConfigurationError, match=r"tool_choice='find' .*\(search\)"):
            llm.chat_with_tools([FIND], QUESTION, tool_choice="find")
        with pytest.raises(ConfigurationError, match="requires a call, but no tools"):
            llm.chat_with_tools([], QUESTION, tool_required=True)
        with pytest.raises(ConfigurationError, match="temprature"):
            llm.stream_chat_with_tools([FIND], QUESTION, temprature=1)
        for tool in (find, {"name": "search"}):
            with pytest.raises(ConfigurationError, match="give a LlamaIndex tool"):
                llm.chat([ChatMessage(QUESTION)], tools=[tool])
        for call in (llm.complete, llm.invoke):  # texts have no tools
            with pytest.raises(ConfigurationError, match="does not take tools"):
                call(QUESTION, tools=[FIND])
        assert llm.target.requests == []

    def test_errors_of_the_pipeline_are_raised(self) -> None:
        llm = RapidLLM(ScriptedTools(max_prompt_chars=1))
        with pytest.raises(ContextLengthError):
            llm.chat_with_tools([FIND], QUESTION)
        with pytest.raises(ContextLengthError):
            list(llm.stream_chat_with_tools([FIND], QUESTION))


class TestPrompts:
    def test_tools_reach_the_model_under_their_own_names(self) -> None:
        llm = RapidLLM(ScriptedTools())
        named = FunctionTool.from_defaults(find, name="the search", description="Look. " * 300)
        response = llm.chat_with_tools([named, COUNT], QUESTION)
        first, second = (tool["function"] for tool in llm.target.requests[-1].parts.tools)
        assert (first["name"], first["description"]) == ("the search", "Look. " * 300)
        assert second["parameters"]["properties"]["least"]["type"] == "integer"
        assert calls(response) == [("the search", ARGUMENTS)]

    def test_query_context_and_retriever_reach_the_engine(self, llm: RapidLLM, pipeline: Any) -> None:
        retriever = lambda query: ["chunk"]  # noqa: E731 # compared by identity
        options = {"retriever": retriever, "context": "The depot is near.", "temperature": 0.5}
        llm.chat_with_tools([FIND], QUESTION, **options)
        list(llm.stream_chat_with_tools([FIND], chat_history=[ChatMessage(QUESTION)], **options))
        for request in pipeline.requests:
            assert (request.parts.query, request.parts.context) == (QUESTION, "The depot is near.")
            assert request.retriever is retriever
            assert request.options.sampling.temperature == 0.5

    def test_a_conversation_with_calls(self, llm: RapidLLM, pipeline: ScriptedTools) -> None:
        asked = llm.chat_with_tools([FIND], QUESTION).message
        (call,) = llm.get_tool_calls_from_response(ChatResponse(message=asked))
        known = {"tool_call_id": call.tool_id}
        result = ChatMessage(role="tool", content="Near. " * 200, additional_kwargs=known)
        history = [ChatMessage("Be brief.", role="system"), ChatMessage(QUESTION), asked, result]
        stored = [ChatMessage.model_validate_json(message.model_dump_json()) for message in history]
        # The form of LLMs that do not write blocks.
        stored[2] = ChatMessage(role="assistant", additional_kwargs=asked.additional_kwargs)
        for messages in (history, stored):
            response = llm.chat_with_tools([FIND], chat_history=messages)
            assert response.message.content.startswith("It is: Near.")
            parts = pipeline.requests[-1].parts
            assert [m.role for m in parts.messages] == ["system", "user", "assistant", "tool"]
            (shown,) = parts.messages[2].tool_calls
            assert (shown.name, shown.arguments, shown.id) == ("search", ARGUMENTS, call.tool_id)
            assert parts.messages[3].tool_call_id == call.tool_id
            assert (parts.query, parts.context) == (QUESTION, result.content)
        assert pipeline.prompts[-1] == pipeline.prompts[-2]

    @pytest.mark.parametrize("choice", [None, "none"])
    def test_calls_are_shown_where_no_tools_are_offered(self, choice: str | None) -> None:
        llm = RapidLLM(ScriptedTools())
        asked = llm.chat_with_tools([FIND], QUESTION).message
        llm.chat([ChatMessage(QUESTION), asked], tools=[FIND] if choice else [], tool_choice=choice)
        assert llm.target.requests[-1].parts.messages[1].tool_calls[0].name == "search"

    @pytest.mark.parametrize(
        ("message", "error"),
        [
            (ChatMessage(role="user", blocks=[TextBlock(text="See:"), ImageBlock(image=b"")]), "ImageBlock"),
            (ChatMessage(role="assistant", additional_kwargs={"tool_calls": [{"id": "1"}]}), "names no tool"),
            (
                ChatMessage(
                    role="assistant",
                    additional_kwargs={"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                ),
                "its arguments are not JSON",
            ),
        ],
    )
    def test_unsupported_messages_raise(self, message: ChatMessage, error: str) -> None:
        with pytest.raises(PromptError, match=error):
            RapidLLM(ScriptedTools()).chat([message])

    def test_own_prompt_functions_see_calls_but_no_tools(self) -> None:
        asked = RapidLLM(ScriptedTools()).chat_with_tools([FIND], QUESTION).message
        result = ChatMessage(role="tool", content="Near.", additional_kwargs={"tool_call_id": "1"})
        seen: list[ChatMessage] = []
        llm = RapidLLM(ScriptedTools(), messages_to_prompt=lambda messages: seen.extend(messages) or "Hi")
        llm.chat([ChatMessage(QUESTION), asked, result])
        assert seen[1].blocks[-1] == asked.blocks[0]
        assert seen[2].additional_kwargs == {"tool_call_id": "1"}
        assert not llm.metadata.is_function_calling_model
        with pytest.raises(ConfigurationError, match="tools were given, but messages_to_prompt"):
            llm.chat_with_tools([FIND], QUESTION)


def test_uniqueness_of_a_set_is_left_to_pydantic(pipeline: ScriptedTools) -> None:
    def record(ships: set[str]) -> str:
        """Record ships."""
        return ", ".join(ships)

    tool = FunctionTool.from_defaults(record)
    RapidLLM(pipeline).chat_with_tools([tool], QUESTION, tool_required=True)
    (request,) = pipeline.requests
    assert request.parts.tools[0]["function"]["parameters"]["properties"]["ships"]["uniqueItems"]
    assert "uniqueItems" not in (request.options.output_format.json_schema or "")
    assert "ships" in (request.options.output_format.json_schema or "")


class TestModel:
    def test_metadata_gives_support_for_tools(self, llm: RapidLLM) -> None:
        assert llm.metadata.is_function_calling_model
        assert llm.metadata.model_dump()["is_function_calling_model"]
        assert isinstance(llm, FunctionCallingLLM)
        assert not RapidLLM(FakePipeline()).metadata.is_function_calling_model
        assert not RapidLLM(ScriptedTools(chat_template=False)).metadata.is_function_calling_model

    def test_metadata_of_tool_support_loads_the_models(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(self: RapidLLM) -> Any:
            raise AssertionError("loaded")

        monkeypatch.setattr(RapidLLM, "_load", load)
        with pytest.raises(AssertionError, match="loaded"):
            _ = RapidLLM("some/model").metadata.is_function_calling_model

    def test_tools_raise_for_a_model_without_support(self) -> None:
        with pytest.raises(PromptError, match="does not support tools"):
            RapidLLM(FakePipeline()).chat_with_tools([FIND], QUESTION)

    def test_the_tool_format_can_be_set(self) -> None:
        tokenizer = ScriptedTools().tokenizer
        unknown = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
        unknown.chat_template = tokenizer.chat_template.replace("<tool_call>", "<call>")
        pipeline = ScriptedTools(tokenizer=unknown)
        assert not RapidLLM(pipeline).metadata.is_function_calling_model
        assert RapidLLM(pipeline, tool_format="hermes").metadata.is_function_calling_model
        llm = RapidLLM("some/model", tool_format="hermes")
        assert RapidLLM.from_dict(llm.to_dict()).tool_format == "hermes"
        assert pickle.loads(pickle.dumps(llm)).tool_format == "hermes"
        assert llm.to_payload()["tool_format"] == "hermes"

    async def test_closing_a_stream_cancels_the_request(self, llm: RapidLLM, pipeline: ScriptedTools) -> None:
        pipeline.script = lambda parts: "It is near the harbour."
        stream = llm.stream_chat_with_tools([FIND], QUESTION)
        next(stream)
        stream.close()
        astream = await llm.astream_chat_with_tools([FIND], QUESTION)
        await anext(astream)
        await astream.aclose()
        del stream, astream
        for _ in range(1000):
            if pipeline.cancelled == 2:
                break
            await asyncio.sleep(0.001)
        assert (pipeline.finished, pipeline.cancelled) == (0, 2)


def test_a_call_in_another_llms_message_needs_no_id() -> None:
    message = ChatMessage(role="assistant", blocks=[{"block_type": "tool_call", "tool_name": "count"}])
    selections = RapidLLM(FakePipeline()).get_tool_calls_from_response(ChatResponse(message=message))
    assert selections == [ToolSelection(tool_id="", tool_name="count", tool_kwargs={})]
