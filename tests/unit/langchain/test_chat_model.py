import copy
import json
import pickle
import threading
from collections.abc import Awaitable
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.asynchronous import collect
from helpers.fake_pipeline import PROMPT, QUESTION, FakePipeline, word_tokenizer
from helpers.langchain_calls import contents, count, search, total
from helpers.scripted_tools import MARKUP, ScriptedTools, call_text
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd, dumps, loads
from langchain_core.messages import HumanMessage
from langchain_core.runnables import ConfigurableField
from langchain_core.tools import tool
from pydantic import BaseModel

from rapid_integrations import ChatRapid, ConfigurationError, ContextLengthError, PromptError
from rapid_integrations.events import Completion, TextDelta
from rapid_integrations.langchain.messages import tool_definitions
from rapid_integrations.retrieval import RetrievedContext

ANY = '<tool_call>\n{"name": "'
COUNT = '<tool_call>\n{"name": "count", "arguments":'


class TestAnswers:
    async def test_every_entry_point_gives_the_same_answer(self, chat: ChatRapid) -> None:
        answer = chat.invoke(PROMPT)
        assert answer.content.startswith(QUESTION)
        assert contents(await chat.ainvoke(PROMPT)) == contents(answer)
        assert contents(total(chat.stream(PROMPT))) == contents(answer)
        assert contents(total(await collect(chat.astream(PROMPT)))) == contents(answer)
        for answers in (chat.batch([PROMPT, PROMPT]), await chat.abatch([PROMPT, PROMPT])):
            assert [contents(message) for message in answers] == [contents(answer)] * 2
        assert contents(chat.generate([[HumanMessage(PROMPT)]]).generations[0][0].message) == contents(answer)

    def test_a_message_holds_finish_reason_and_usage(self, chat: ChatRapid) -> None:
        message = chat.invoke(PROMPT, max_tokens=3)
        assert message.usage_metadata["output_tokens"] == 3
        assert message.usage_metadata["input_tokens"] == len(PROMPT.split())
        assert message.usage_metadata["input_token_details"] == {"cache_read": 0}
        metadata = message.response_metadata
        assert (metadata["finish_reason"], metadata["model_name"]) == ("length", "fake")
        assert metadata["rapid"]["completion_tokens"] == 3

    def test_errors_of_the_pipeline_are_raised(self, chat: ChatRapid, pipeline: FakePipeline) -> None:
        pipeline.max_prompt_chars = 10
        with pytest.raises(ContextLengthError):
            chat.invoke(PROMPT)

    def test_stop_and_options_of_calls(self, chat: ChatRapid, pipeline: FakePipeline) -> None:
        assert chat.invoke(PROMPT, stop=["read"]).content == f"{QUESTION} "
        assert "temperature 0.5" in chat.bind(temperature=0.5).invoke(PROMPT).content
        assert ChatRapid(pipeline, stop=["read"]).invoke(PROMPT).content == f"{QUESTION} "
        with pytest.raises(ConfigurationError, match=r"did you mean temperature\?"):
            chat.invoke(PROMPT, temprature=1)
        with pytest.raises(ConfigurationError, match="ChatRapid does not take temprature"):
            ChatRapid(pipeline, temprature=1)
        with pytest.raises(ConfigurationError, match="ChatRapid needs a target"):
            ChatRapid()

    async def test_callbacks_receive_the_tokens_of_an_invoke_that_streams(
        self, pipeline: FakePipeline
    ) -> None:
        class Recorder(BaseCallbackHandler):
            def __init__(self) -> None:
                self.text = ""

            def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
                self.text += token

        recorder = Recorder()
        answer = ChatRapid(pipeline, streaming=True).invoke(PROMPT, config={"callbacks": [recorder]})
        assert recorder.text == answer.content

    async def test_events(self, chat: ChatRapid) -> None:
        events = [event async for event in chat.astream_events(PROMPT, version="v2")]
        streamed = [e["data"]["chunk"].content for e in events if e["event"] == "on_chat_model_stream"]
        assert "".join(streamed) == chat.invoke(PROMPT).content

    def test_a_reconfigured_model_still_streams(self) -> None:
        chat = ChatRapid(ScriptedTools(script=lambda parts: "one two three"))
        field = ConfigurableField(id="t")
        reconfigured = chat.configurable_fields(temperature=field).with_config(configurable={"t": 0.5})
        assert len(list(reconfigured.stream("Go"))) == len(list(chat.stream("Go"))) > 3


class TestOnEvent:
    async def test_every_entry_point_reports_its_events(self, chat: ChatRapid) -> None:
        streaming = chat.model_copy(update={"streaming": True})
        for entry in (
            lambda report: chat.invoke(PROMPT, on_event=report),
            lambda report: streaming.invoke(PROMPT, on_event=report),
            lambda report: list(chat.stream(PROMPT, on_event=report)),
            lambda report: chat.bind(on_event=report).batch([PROMPT]),
            lambda report: chat.ainvoke(PROMPT, on_event=report),
            lambda report: streaming.ainvoke(PROMPT, on_event=report),
            lambda report: collect(chat.astream(PROMPT, on_event=report)),
        ):
            events: list[Any] = []
            if isinstance(answer := entry(events.append), Awaitable):
                await answer
            assert isinstance(events[0], RetrievedContext)
            assert "".join(event.text for event in events if isinstance(event, TextDelta)) == events[-1].text
            assert sum(isinstance(event, Completion) for event in events) == 1

    async def test_it_bypasses_the_cache(self, pipeline: FakePipeline) -> None:
        chat = ChatRapid(pipeline, cache=InMemoryCache())
        answer = chat.invoke(PROMPT).content
        for asynchronous in (False, True):
            events: list[Any] = []
            again = chat.bind(on_event=events.append)
            message = await again.ainvoke(PROMPT) if asynchronous else again.invoke(PROMPT)
            assert message.content == events[-1].text == answer
            assert len(pipeline.requests) == 2 + asynchronous
        assert chat.invoke(PROMPT).content == answer
        assert len(pipeline.requests) == 3

    def test_it_must_be_a_function(self, chat: ChatRapid) -> None:
        with pytest.raises(ConfigurationError, match="on_event=3 is not allowed"):
            chat.invoke(PROMPT, on_event=3)


class TestTools:
    @pytest.mark.parametrize("family", MARKUP)
    def test_a_call_its_result_and_the_answer(self, family: str) -> None:
        pipeline = ScriptedTools(family=family)
        chat = ChatRapid(pipeline).bind_tools([search])
        asked = HumanMessage('Find "the keeper"')
        called = chat.invoke([asked])
        answer = chat.invoke([asked, called, search.invoke(called.tool_calls[0])])
        assert answer.content == "It is: found the keeper"
        assert answer.response_metadata["finish_reason"] == "stop"
        assert "found the keeper" in pipeline.tokenizer.decode(pipeline.prompts[-1])
        assert pipeline.requests[-1].parts.query == 'Find "the keeper"'

    @pytest.mark.parametrize(
        ("choice", "start"),
        [
            (None, ""), ("auto", ""), ({"type": "auto"}, ""), ("any", ANY), ("required", ANY), (True, ANY),
            ("count", COUNT), ({"type": "function", "function": {"name": "count"}}, COUNT),
        ],
    )  # fmt: skip
    def test_a_choice_writes_the_beginning_of_the_answer(self, choice: Any, start: str) -> None:
        pipeline = ScriptedTools()
        message = ChatRapid(pipeline).bind_tools([search, count], tool_choice=choice).invoke("Go")
        assert "".join(segment.text for segment in pipeline.requests[-1].parts.answer_start) == start
        assert pipeline.tokenizer.decode(pipeline.prompts[-1]).endswith(f"assistant\n{start}")
        assert message.tool_calls[0]["name"] == ("count" if "count" in start else "search")
        assert message.content == ""

    def test_any_of_one_tool_is_that_tool(self) -> None:
        pipeline = ScriptedTools(family="llama3")
        message = ChatRapid(pipeline).bind_tools([count], tool_choice="any").invoke("Go")
        assert pipeline.requests[-1].parts.answer_start[1].text == "count"
        assert message.tool_calls[0]["name"] == "count"

    @pytest.mark.parametrize("family", MARKUP)
    def test_the_arguments_of_a_forced_tool_follow_its_schema(self, family: str) -> None:
        pipeline = ScriptedTools(family=family)
        chat = ChatRapid(pipeline).bind_tools([search, count], tool_choice="search")
        message = chat.invoke("Find 'Ada'.")
        constraint = pipeline.requests[-1].options.output_format.json_schema
        assert constraint is not None
        assert json.loads(constraint)["properties"]["query"]["type"] == "string"
        assert json.loads(constraint)["additionalProperties"] is False
        assert [(call["name"], call["args"]) for call in message.tool_calls] == [("search", {"query": "Ada"})]
        assert contents(total(chat.stream("Find 'Ada'."))) == contents(message)
        cut = chat.invoke("Find 'Ada'.", max_new_tokens=1)
        assert (cut.tool_calls, len(cut.invalid_tool_calls)) == ([], 1)
        for choice in ("any", "auto"):  # of two tools
            ChatRapid(pipeline).bind_tools([search, count], tool_choice=choice).invoke("Go")
            assert not pipeline.requests[-1].options.output_format

    @pytest.mark.parametrize("checked", [True, False])
    def test_conditions_that_pydantic_checks_are_not_in_the_constraint(self, checked: bool) -> None:
        class Fleet(BaseModel):
            """A fleet."""

            ships: set[str]
            flag: bytes

        def record(ships: set[str], flag: bytes) -> str:
            """Record a fleet."""
            return "recorded"

        pipeline = ScriptedTools()
        for given in (Fleet, record, tool(record)):
            definition = tool_definitions([given])[0]
            assert definition["function"]["parameters"]["properties"]["ships"]["uniqueItems"]
            # A plain JSON schema is taken literally.
            offered = given if checked else dict(definition)
            ChatRapid(pipeline).bind_tools([offered], tool_choice="any").invoke("Go")
            request = pipeline.requests[-1]
            assert request.parts.tools == (definition,)
            asked = json.loads(request.options.output_format.json_schema or "")["properties"]
            assert ("uniqueItems" in asked["ships"], "format" in asked["flag"]) == (not checked, not checked)
        if checked:
            answer = ChatRapid(pipeline).with_structured_output(Fleet).invoke("Go")
            assert answer == Fleet(ships=set(), flag=b"some text")
            assert "uniqueItems" not in (pipeline.requests[-1].options.output_format.json_schema or "")

    @pytest.mark.parametrize("choice", [None, "auto", "any", "search"])
    @pytest.mark.parametrize("tools", [[search], [search, count]], ids=["one tool", "two tools"])
    def test_tools_and_another_format_contradict_each_other(self, tools: list[Any], choice: Any) -> None:
        pipeline = ScriptedTools()
        for chat in (ChatRapid(pipeline), ChatRapid(pipeline, json_schema={"type": "object"})):
            with pytest.raises(ConfigurationError, match="leave one of the two out"):
                chat.bind_tools(tools, tool_choice=choice).invoke("Go", regex="[0-9]+")
            assert chat.bind_tools(tools, tool_choice="none").invoke("Go", regex="[0-9]+")
        assert len(pipeline.requests) == 2

    @pytest.mark.parametrize("entry", ["ainvoke", "astream"])
    async def test_the_event_loop_never_waits_for_models(
        self, entry: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Asking for the pipeline takes a lock, which another thread may hold as long as it loads models.
        threads: list[int] = []
        asked = ChatRapid.pipeline.fget

        def pipeline(self: ChatRapid) -> Any:
            threads.append(threading.get_ident())
            return asked(self)

        monkeypatch.setattr(ChatRapid, "pipeline", property(pipeline))
        chat = ChatRapid(ScriptedTools()).bind_tools([search], tool_choice="search")
        answering: Any = chat.ainvoke("Go") if entry == "ainvoke" else collect(chat.astream("Go"))
        assert await answering
        assert threads
        assert threading.get_ident() not in threads

    @pytest.mark.parametrize("choice", ["none", False])
    def test_none_offers_no_tool(self, choice: Any) -> None:
        pipeline = ScriptedTools()
        assert (
            ChatRapid(pipeline).bind_tools([search], tool_choice=choice).invoke("Go").content == "It is: Go"
        )
        assert pipeline.requests[-1].parts.tools == ()

    @pytest.mark.parametrize("choice", ["find", 7, {"name": "find"}, {"type": "function"}])
    def test_a_choice_that_names_no_tool_is_an_error(self, choice: Any) -> None:
        with pytest.raises(ConfigurationError, match=r"nor the name of a given tool \(search\)"):
            ChatRapid(ScriptedTools()).bind_tools([search], tool_choice=choice)

    def test_errors_of_binding(self, chat: ChatRapid) -> None:
        with pytest.raises(ConfigurationError, match="no tools were given"):
            chat.bind_tools([], tool_choice="any")
        with pytest.raises(ConfigurationError, match="a provider's own tool"):
            chat.bind_tools([{"type": "web_search"}])
        with pytest.raises(ConfigurationError, match="does not take parallel"):
            chat.bind_tools([search], parallel=False)

    def test_a_model_without_tools_is_an_error_before_anything_is_generated(
        self, pipeline: FakePipeline
    ) -> None:
        with pytest.raises(PromptError, match="does not support tools"):
            ChatRapid(pipeline).bind_tools([search]).invoke("Go")
        assert pipeline.requests == []

    def test_the_format_can_be_given(self) -> None:
        text = call_text("llama3", "search", {"query": "x"})
        pipeline = ScriptedTools(script=lambda parts: text)
        for chat in (
            ChatRapid(pipeline, tool_format="llama3").bind_tools([search]),
            ChatRapid(pipeline).bind_tools([search], tool_format="llama3"),
        ):
            assert chat.invoke("Go").tool_calls[0]["args"] == {"query": "x"}
        for unknown in (  # without tools as well
            lambda: ChatRapid(pipeline, tool_format="x"),
            lambda: ChatRapid(pipeline).model_copy(update={"tool_format": "x"}),
            lambda: ChatRapid(pipeline).invoke("Go", tool_format="x"),
            lambda: ChatRapid(pipeline).bind_tools([search], tool_format="x").invoke("Go"),
        ):
            with pytest.raises(ConfigurationError, match="tool_format='x' is unknown"):
                unknown()


class TestCopiesAndMetadata:
    @pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
    def test_json(self, pipeline: FakePipeline) -> None:
        chat = ChatRapid("some/model", "small/model", temperature=0.5, stop=["x"], tool_format="hermes")
        copied = loads(dumps(chat), allowed_objects=[ChatRapid], valid_namespaces=["rapid_integrations"])
        assert isinstance(copied, ChatRapid)
        assert copied.asdict() == chat.asdict()
        assert dumpd(ChatRapid(pipeline))["type"] == "not_implemented"

    def test_pickle_and_copies(self, pipeline: FakePipeline) -> None:
        chat = ChatRapid("some/model", tags=["a"], metadata={"b": 1}, max_tokens=7)
        assert pickle.loads(pickle.dumps(chat)).asdict() == chat.asdict()
        held = ChatRapid(pipeline, metadata={"b": 1})
        copied = copy.deepcopy(held)
        assert copied.pipeline is pipeline
        copied.metadata["b"] = 2
        assert held.metadata["b"] == 1
        assert held.model_copy(update={"max_tokens": 3}).max_new_tokens == 3
        with pytest.raises(ConfigurationError, match="a pickled ChatRapid carries no weights"):
            pickle.dumps(held)

    def test_tracing_parameters_and_profile(self, chat: ChatRapid) -> None:
        params = chat._get_ls_params(stop=["x"], temperature=0.5, tools=[], tool_choice="auto")
        assert params == {
            "ls_provider": "rapid", "ls_model_type": "chat", "ls_model_name": "fake", "ls_temperature": 0.5,
            "ls_max_tokens": 256, "ls_stop": ["x"],
        }  # fmt: skip
        assert (chat.profile["max_input_tokens"], chat.profile["tool_calling"]) == (4096, False)
        assert ChatRapid(ScriptedTools()).profile["tool_calling"]
        assert "tool_calling" not in ChatRapid("some/model").profile

    def test_tokens_are_counted_with_tools(self) -> None:
        chat = ChatRapid(ScriptedTools())
        alone = chat.get_num_tokens_from_messages([HumanMessage("Hi <|im_end|>")])
        assert chat.get_num_tokens_from_messages([HumanMessage("Hi <|im_end|>")], [search]) > alone
        assert len(chat.get_token_ids("<|im_end|>")) > 1

    def test_a_loaded_model_needs_its_tokenizer(self) -> None:
        model = SimpleNamespace(config=SimpleNamespace(_name_or_path="my/model"))
        assert ChatRapid(model, tokenizer=word_tokenizer()).model_name == "my/model"
        with pytest.raises(ConfigurationError, match="needs tokenizer= too"):
            ChatRapid(model)
