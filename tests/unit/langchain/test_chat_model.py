import asyncio
import copy
import json
import pickle
import threading
from collections.abc import AsyncIterator, Awaitable
from functools import reduce
from operator import add
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.fake_pipeline import DOCUMENT, PROMPT, QUESTION, FakePipeline, word_tokenizer
from helpers.scripted_tools import MARKUP, ScriptedTools, call_text
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.exceptions import OutputParserException
from langchain_core.load import dumpd, dumps, loads
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import ConfigurableField
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import tool
from pydantic import BaseModel, Field, ValidationError
from typing_extensions import TypedDict

from rapid_integrations import (
    ChatRapid,
    ConfigurationError,
    ContextLengthError,
    PromptError,
    RapidChatPromptTemplate,
    RapidPromptTemplate,
)
from rapid_integrations.events import Completion, TextDelta
from rapid_integrations.langchain.messages import tool_definitions
from rapid_integrations.retrieval import RetrievedContext

FAMILIES = list(MARKUP)
ANY = '<tool_call>\n{"name": "'
COUNT = '<tool_call>\n{"name": "count", "arguments":'


@tool
def search(query: str) -> str:
    """Search the archive."""
    return f"found {query}"


@tool
def count() -> int:
    """Count the ships."""
    return 7


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def chat(pipeline: FakePipeline) -> ChatRapid:
    return ChatRapid(pipeline)


def whole(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    return reduce(add, chunks)


async def aiter_all(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


def plain(message: AIMessage) -> list[Any]:
    """What a message says, ids and errors left out."""
    return [
        message.content,
        [(call["name"], call["args"]) for call in message.tool_calls],
        [(call["name"], call["args"]) for call in message.invalid_tool_calls],
        message.additional_kwargs,
        message.usage_metadata,
        message.response_metadata["finish_reason"],
    ]


class TestAnswers:
    async def test_every_way_of_asking_gives_the_same_answer(self, chat: ChatRapid) -> None:
        answer = chat.invoke(PROMPT)
        assert answer.content.startswith(QUESTION)
        assert plain(await chat.ainvoke(PROMPT)) == plain(answer)
        assert plain(whole(list(chat.stream(PROMPT)))) == plain(answer)
        assert plain(whole([chunk async for chunk in chat.astream(PROMPT)])) == plain(answer)
        for answers in (chat.batch([PROMPT, PROMPT]), await chat.abatch([PROMPT, PROMPT])):
            assert [plain(message) for message in answers] == [plain(answer)] * 2
        assert plain(chat.generate([[HumanMessage(PROMPT)]]).generations[0][0].message) == plain(answer)

    def test_a_message_says_how_it_ended_and_what_it_cost(self, chat: ChatRapid) -> None:
        message = chat.invoke(PROMPT, max_tokens=3)
        assert message.usage_metadata["output_tokens"] == 3
        assert message.usage_metadata["input_tokens"] == len(PROMPT.split())
        assert message.usage_metadata["input_token_details"] == {"cache_read": 0}
        metadata = message.response_metadata
        assert (metadata["finish_reason"], metadata["model_name"]) == ("length", "fake")
        assert metadata["rapid"]["completion_tokens"] == 3

    def test_only_the_last_chunk_does(self, chat: ChatRapid) -> None:
        *chunks, last = chat.stream(PROMPT)
        assert all(chunk.usage_metadata is None and not chunk.response_metadata for chunk in chunks)
        assert last.usage_metadata["total_tokens"] > 0
        assert (last.content, last.chunk_position) == ("", "last")
        assert last.response_metadata["finish_reason"] == "stop"

    def test_a_left_stream_is_cancelled(self, chat: ChatRapid, pipeline: FakePipeline) -> None:
        stream = chat.stream(PROMPT)
        next(stream)
        stream.close()
        assert (pipeline.cancelled, pipeline.finished) == (1, 0)

    async def test_a_cancelled_task_is_cancelled(self, chat: ChatRapid, pipeline: FakePipeline) -> None:
        pipeline.hold = True
        task = asyncio.create_task(chat.ainvoke(PROMPT))
        while not pipeline.requests:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pipeline.cancelled == 1

    def test_errors_are_the_pipelines(self, chat: ChatRapid, pipeline: FakePipeline) -> None:
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

    async def test_callbacks_hear_the_tokens_of_an_invoke_that_streams(self, pipeline: FakePipeline) -> None:
        class Ears(BaseCallbackHandler):
            def __init__(self) -> None:
                self.heard = ""

            def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
                self.heard += token

        ears = Ears()
        answer = ChatRapid(pipeline, streaming=True).invoke(PROMPT, config={"callbacks": [ears]})
        assert ears.heard == answer.content

    async def test_events(self, chat: ChatRapid) -> None:
        events = [event async for event in chat.astream_events(PROMPT, version="v2")]
        streamed = [e["data"]["chunk"].content for e in events if e["event"] == "on_chat_model_stream"]
        assert "".join(streamed) == chat.invoke(PROMPT).content


class TestListening:
    async def test_every_entry_point_tells_its_events(self, chat: ChatRapid) -> None:
        streaming = chat.model_copy(update={"streaming": True})
        for entry in (
            lambda hear: chat.invoke(PROMPT, on_event=hear),
            lambda hear: streaming.invoke(PROMPT, on_event=hear),
            lambda hear: list(chat.stream(PROMPT, on_event=hear)),
            lambda hear: chat.bind(on_event=hear).batch([PROMPT]),
            lambda hear: chat.ainvoke(PROMPT, on_event=hear),
            lambda hear: streaming.ainvoke(PROMPT, on_event=hear),
            lambda hear: aiter_all(chat.astream(PROMPT, on_event=hear)),
        ):
            heard: list[Any] = []
            if isinstance(answering := entry(heard.append), Awaitable):
                await answering
            assert isinstance(heard[0], RetrievedContext)
            assert "".join(event.text for event in heard if isinstance(event, TextDelta)) == heard[-1].text
            assert sum(isinstance(event, Completion) for event in heard) == 1

    async def test_it_hears_of_an_answer_that_a_cache_has(self, pipeline: FakePipeline) -> None:
        chat = ChatRapid(pipeline, cache=InMemoryCache())
        answer = chat.invoke(PROMPT).content
        for asynchronous in (False, True):
            heard: list[Any] = []
            again = chat.bind(on_event=heard.append)
            message = await again.ainvoke(PROMPT) if asynchronous else again.invoke(PROMPT)
            assert message.content == heard[-1].text == answer
            assert len(pipeline.requests) == 2 + asynchronous
        assert chat.invoke(PROMPT).content == answer
        assert len(pipeline.requests) == 3

    def test_it_is_a_function(self, chat: ChatRapid) -> None:
        with pytest.raises(ConfigurationError, match="on_event=3 is not allowed"):
            chat.invoke(PROMPT, on_event=3)


class TestMessages:
    def roles(self, pipeline: FakePipeline) -> list[tuple[str, str]]:
        return [(message.role, message.text) for message in pipeline.requests[-1].parts.messages]

    def test_roles(self, chat: ChatRapid, pipeline: FakePipeline) -> None:
        chat.invoke(
            [
                SystemMessage("Be brief."),
                HumanMessage("Hi", name="Ada"),
                AIMessage([{"type": "text", "text": "Hello"}, {"type": "reasoning", "reasoning": "hm"}]),
                ChatMessage("So", role="critic"),
                ("human", [{"type": "text", "text": "Bye"}]),
            ]
        )
        assert self.roles(pipeline) == [
            ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("critic", "So"),
            ("user", "Bye"),
        ]  # fmt: skip

    def test_the_system_prompt_comes_first_unless_there_is_one(self, pipeline: FakePipeline) -> None:
        chat = ChatRapid(pipeline, system_prompt="Be brief.")
        chat.invoke("Hi")
        assert self.roles(pipeline) == [("system", "Be brief."), ("user", "Hi")]
        chat.invoke([SystemMessage("Be long."), HumanMessage("Hi")])
        assert self.roles(pipeline) == [("system", "Be long."), ("user", "Hi")]

    @pytest.mark.parametrize(
        "message",
        [
            HumanMessage([{"type": "image", "url": "https://example.org/x.png"}]),
            ToolMessage([{"type": "image_url", "image_url": {"url": "x"}}], tool_call_id="1"),
            AIMessage([{"type": "tool_use", "name": "f", "input": {}, "id": "1"}]),
        ],
    )
    def test_what_is_no_text_is_an_error(self, chat: ChatRapid, pipeline: FakePipeline, message: Any) -> None:
        with pytest.raises(PromptError, match=r"holds a block of type '(image|image_url|tool_use)'"):
            chat.invoke([message])
        assert pipeline.requests == []

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


class TestQueryAndContext:
    def known(self, pipeline: FakePipeline) -> tuple[str, str]:
        parts = pipeline.requests[-1].parts
        return parts.query, parts.context

    async def test_a_template_tells_them_whatever_comes_between(
        self, chat: ChatRapid, pipeline: FakePipeline
    ) -> None:
        values = {"context": "Ada is it.", "question": "who?"}
        template = "Read {context} and say {question} Thanks."
        failing = ChatRapid(FakePipeline(max_prompt_chars=0))
        for prompt in (
            RapidChatPromptTemplate.from_messages([("system", "Be brief."), ("human", template)]),
            RapidPromptTemplate.from_template(template),
        ):
            for model in (
                chat,
                chat.bind(temperature=0.5),
                chat.with_retry(),
                failing.with_fallbacks([chat]),
            ):
                chain = prompt | model
                for ask in (
                    chain.invoke,
                    lambda v, c=chain: list(c.stream(v)),
                    lambda v, c=chain: c.batch([v, v]),
                ):
                    pipeline.requests.clear()
                    ask(values)
                    assert self.known(pipeline) == ("who?", "Ada is it.")
                pipeline.requests.clear()
                await chain.ainvoke(values)
                assert self.known(pipeline) == ("who?", "Ada is it.")
            chat.generate_prompt([prompt.invoke(values)])
            assert self.known(pipeline) == ("who?", "Ada is it.")

    def test_arguments_win(self, chat: ChatRapid, pipeline: FakePipeline) -> None:
        prompt = RapidChatPromptTemplate.from_messages([("human", "Read {context} and say {question}")])
        values = {"context": "Ada is it.", "question": "who?"}

        def find(query: str) -> list[str]:
            return [query]

        (prompt | chat.bind(query="and when?", retriever=find)).invoke(values)
        assert self.known(pipeline) == ("and when?", "Ada is it.")
        assert pipeline.requests[-1].retriever is find
        chat.invoke("who?", context="Grace is it.")
        assert self.known(pipeline) == ("who?", "Grace is it.")

    def test_an_ordinary_prompt_is_taken_apart(self, chat: ChatRapid, pipeline: FakePipeline) -> None:
        prompt = ChatPromptTemplate.from_messages(
            [("system", "Read.\n<context>{c}</context>"), ("human", "{q}")]
        )
        (prompt | chat).invoke({"c": DOCUMENT, "q": QUESTION})
        assert self.known(pipeline) == (QUESTION, DOCUMENT.strip())


class Person(BaseModel):
    """A person of the archive."""

    name: str = Field(description="the full name")
    age: int


class Ship(TypedDict):
    """A ship."""

    name: str


class TestTools:
    @pytest.mark.parametrize("family", FAMILIES)
    async def test_a_call_comes_whole_and_streamed(self, family: str) -> None:
        chat = ChatRapid(ScriptedTools(family=family)).bind_tools([search, Person])
        message = chat.invoke('Find "the keeper"')
        (call,) = message.tool_calls
        assert (call["name"], call["args"]) == ("search", {"query": "the keeper"})
        assert message.content == ""
        assert message.response_metadata["finish_reason"] == "tool_calls"
        chunks = list(chat.stream('Find "the keeper"'))
        (calling,) = [chunk for chunk in chunks if chunk.tool_call_chunks]
        assert json.loads(calling.tool_call_chunks[0]["args"]) == {"query": "the keeper"}
        assert plain(whole(chunks)) == plain(message)
        assert plain(await chat.ainvoke('Find "the keeper"')) == plain(message)
        assert plain(whole([c async for c in chat.astream('Find "the keeper"')])) == plain(message)

    @pytest.mark.parametrize("family", FAMILIES)
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

    def test_several_calls_with_text(self) -> None:
        two = f"First.\n{call_text('hermes', 'search', {'query': 'a'})}\n{call_text('hermes', 'count', {})}"
        chat = ChatRapid(ScriptedTools(script=lambda parts: two)).bind_tools([search, count])
        message = whole(list(chat.stream("Go")))
        assert message.content == "First."
        assert [(c["name"], c["args"]) for c in message.tool_calls] == [
            ("search", {"query": "a"}),
            ("count", {}),
        ]
        assert len({call["id"] for call in message.tool_calls}) == 2

    @pytest.mark.parametrize(
        ("family", "answer", "shown"),
        [
            (
                "hermes",
                '<tool_call>{"name": "search", "arg</tool_call>',
                '<tool_call>{"name": "search", "arg',
            ),
            (
                "llama3",
                '{"name": "search", "parameters": {"q": 1',
                json.dumps('{"name": "search", "parameters": {"q": 1'),
            ),
            ("mistral", '[TOOL_CALLS] [{"arguments": {}}]', json.dumps('{"arguments": {}}')),
            ("mistral", '[TOOL_CALLS] ["search"]', json.dumps('"search"')),
        ],
    )
    def test_a_malformed_call_is_invalid_whole_and_streamed(
        self, family: str, answer: str, shown: str
    ) -> None:
        pipeline = ScriptedTools(family=family, script=lambda parts: answer)
        chat = ChatRapid(pipeline).bind_tools([search])
        message = chat.invoke("Go")
        (invalid,) = message.invalid_tool_calls
        assert (invalid["args"], bool(invalid["error"])) == (shown, True)
        assert (message.tool_calls, message.response_metadata["finish_reason"]) == ([], "stop")
        streamed = whole(list(chat.stream("Go")))
        assert plain(streamed) == plain(message)
        written = shown if shown in answer else json.loads(shown)
        for said in (message, streamed):  # the model sees what was written
            chat.invoke([HumanMessage("Go"), said, HumanMessage("Again")])
            assert pipeline.requests[-1].parts.messages[1].text == written

    def test_an_answer_cut_off_says_so(self) -> None:
        chat = ChatRapid(ScriptedTools()).bind_tools([search])
        assert chat.invoke("Go", max_new_tokens=2).response_metadata["finish_reason"] == "length"

    def test_without_tools_markup_is_text(self) -> None:
        text = call_text("hermes", "search", {})
        assert ChatRapid(ScriptedTools(script=lambda parts: text)).invoke("Go").content == text

    @pytest.mark.parametrize(
        ("choice", "start"),
        [
            (None, ""), ("auto", ""), ({"type": "auto"}, ""), ("any", ANY), ("required", ANY), (True, ANY),
            ("count", COUNT), ({"type": "function", "function": {"name": "count"}}, COUNT),
        ],
    )  # fmt: skip
    def test_a_choice_begins_the_answer(self, choice: Any, start: str) -> None:
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

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_known_tools_arguments_keep_to_its_schema(self, family: str) -> None:
        pipeline = ScriptedTools(family=family)
        chat = ChatRapid(pipeline).bind_tools([search, count], tool_choice="search")
        message = chat.invoke("Find 'Ada'.")
        constraint = pipeline.requests[-1].options.output_format.json_schema
        assert constraint is not None
        assert json.loads(constraint)["properties"]["query"]["type"] == "string"
        assert json.loads(constraint)["additionalProperties"] is False
        assert [(call["name"], call["args"]) for call in message.tool_calls] == [("search", {"query": "Ada"})]
        assert plain(whole(list(chat.stream("Find 'Ada'.")))) == plain(message)
        cut = chat.invoke("Find 'Ada'.", max_new_tokens=1)
        assert (cut.tool_calls, len(cut.invalid_tool_calls)) == ([], 1)
        for choice in ("any", "auto"):  # of two tools
            ChatRapid(pipeline).bind_tools([search, count], tool_choice=choice).invoke("Go")
            assert not pipeline.requests[-1].options.output_format

    @pytest.mark.parametrize("checked", [True, False])
    def test_what_pydantic_checks_of_a_call_is_left_to_it(self, checked: bool) -> None:
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
            # Plain data is nobody's type: what it says must hold.
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
        answering: Any = chat.ainvoke("Go") if entry == "ainvoke" else aiter_all(chat.astream("Go"))
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

    def test_the_format_can_be_told(self) -> None:
        text = call_text("llama3", "search", {"query": "x"})
        pipeline = ScriptedTools(script=lambda parts: text)
        for chat in (
            ChatRapid(pipeline, tool_format="llama3").bind_tools([search]),
            ChatRapid(pipeline).bind_tools([search], tool_format="llama3"),
        ):
            assert chat.invoke("Go").tool_calls[0]["args"] == {"query": "x"}
        for unknown in (  # with no tools, too
            lambda: ChatRapid(pipeline, tool_format="x"),
            lambda: ChatRapid(pipeline).model_copy(update={"tool_format": "x"}),
            lambda: ChatRapid(pipeline).invoke("Go", tool_format="x"),
            lambda: ChatRapid(pipeline).bind_tools([search], tool_format="x").invoke("Go"),
        ):
            with pytest.raises(ConfigurationError, match="tool_format='x' is unknown"):
                unknown()


class TestStructuredOutput:
    SCHEMAS = (Person, Ship, Person.model_json_schema())

    @pytest.mark.parametrize("family", FAMILIES)
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
    def test_data_that_do_not_fit_are_an_error(self, arguments: str, error: type[Exception]) -> None:
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

    def test_a_reconfigured_model_still_streams(self) -> None:
        chat = ChatRapid(ScriptedTools(script=lambda parts: "one two three"))
        field = ConfigurableField(id="t")
        reconfigured = chat.configurable_fields(temperature=field).with_config(configurable={"t": 0.5})
        assert len(list(reconfigured.stream("Go"))) == len(list(chat.stream("Go"))) > 3

    def test_text_that_was_cut_off_is_an_error(self) -> None:
        pipeline = ScriptedTools(script=lambda parts: '{"name": "Ad')
        chat = ChatRapid(pipeline)
        with pytest.raises(OutputParserException, match="perhaps because it was cut off"):
            chat.with_structured_output(Person, method="json_schema").invoke("Go")
        answer = chat.with_structured_output(Person, method="json_schema", include_raw=True).invoke("Go")
        assert (answer["raw"].content, answer["parsed"]) == ('{"name": "Ad', None)
        assert isinstance(answer["parsing_error"], OutputParserException)

    def test_unknown_ways_are_refused(self, chat: ChatRapid) -> None:
        with pytest.raises(ConfigurationError, match="take one of function_calling, json_schema, json_mode"):
            chat.with_structured_output(Person, method="magic")
        with pytest.raises(ConfigurationError, match="does not take temprature"):
            chat.with_structured_output(Person, temprature=1)


class TestCache:
    def test_the_same_call_is_answered_from_the_cache(self, pipeline: FakePipeline) -> None:
        chat = ChatRapid(pipeline, cache=InMemoryCache())
        assert chat.invoke(PROMPT).content == chat.invoke(PROMPT).content
        assert len(pipeline.requests) == 1

    def test_calls_that_differ_in_anything_are_not(self) -> None:
        cache = InMemoryCache()
        pipeline = ScriptedTools()
        chat = ChatRapid(pipeline, cache=cache)
        prompt = RapidChatPromptTemplate.from_messages([("human", "{context} {question}")])

        def one(query: str) -> list[str]:
            return [query]

        def other(query: str) -> list[str]:
            return [query]

        calls = [
            lambda: chat.invoke("Go"),
            lambda: chat.invoke("Go", temperature=0.5),
            lambda: chat.invoke("Go", stop=["x"]),
            lambda: chat.invoke("Go", context="Ada."),
            lambda: chat.invoke("Go", query="who?"),
            lambda: chat.invoke("Go", retriever=one),
            lambda: chat.invoke("Go", retriever=other),
            lambda: chat.bind_tools([search]).invoke("Go"),
            lambda: chat.bind_tools([search], tool_choice="any").invoke("Go"),
            lambda: chat.bind_tools([count]).invoke("Go"),
            lambda: (prompt | chat).invoke({"context": "a b", "question": "c"}),
            lambda: (prompt | chat).invoke({"context": "a", "question": "b c"}),
            lambda: ChatRapid(ScriptedTools(), cache=cache).invoke("Go"),
            lambda: ChatRapid(pipeline, cache=cache, temperature=0.7).invoke("Go"),
            lambda: ChatRapid(pipeline, cache=cache, tool_format="llama3").invoke("Go"),
            lambda: chat.bind_tools([dict(tool_definitions([search])[0])]).invoke("Go"),
        ]
        for call in calls:
            call()
        assert len(cache._cache) == len(calls)
        asked = len(pipeline.requests)
        for call in [*calls[:12], *calls[13:]]:  # the one left out makes a pipeline of its own
            call()
        assert len(pipeline.requests) == asked


class TestCitizenship:
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

    def test_configurable_fields(self, chat: ChatRapid, pipeline: FakePipeline) -> None:
        configurable = chat.configurable_fields(temperature=ConfigurableField(id="t"))
        assert "temperature 0.5" in configurable.invoke(PROMPT, {"configurable": {"t": 0.5}}).content
        assert len(pipeline.requests) == 1

    def test_fallbacks_and_retries(self, chat: ChatRapid) -> None:
        failing = ChatRapid(FakePipeline(max_prompt_chars=0))
        assert failing.with_fallbacks([chat]).invoke(PROMPT).content
        failing.pipeline.requests.clear()
        with pytest.raises(ContextLengthError):
            failing.with_retry(stop_after_attempt=2, wait_exponential_jitter=False).invoke(PROMPT)
        assert len(failing.pipeline.requests) == 2

    @pytest.mark.filterwarnings(
        "ignore:The class `InMemoryChatMessageHistory`", "ignore:RunnableWithMessageHistory"
    )
    def test_a_history(self, chat: ChatRapid, pipeline: FakePipeline) -> None:
        history = InMemoryChatMessageHistory()
        prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("past"), ("human", "{question}")])
        talk = RunnableWithMessageHistory(
            prompt | chat, lambda session: history, input_messages_key="question", history_messages_key="past"
        )
        config = {"configurable": {"session_id": "1"}}
        talk.invoke({"question": "Hi"}, config)
        talk.invoke({"question": "Bye"}, config)
        assert [m.role for m in pipeline.requests[-1].parts.messages] == ["user", "assistant", "user"]
        assert pipeline.requests[-1].parts.query == "Bye"

    def test_traces_and_profile(self, chat: ChatRapid) -> None:
        params = chat._get_ls_params(stop=["x"], temperature=0.5, tools=[], tool_choice="auto")
        assert params == {
            "ls_provider": "rapid", "ls_model_type": "chat", "ls_model_name": "fake", "ls_temperature": 0.5,
            "ls_max_tokens": 256, "ls_stop": ["x"],
        }  # fmt: skip
        assert (chat.profile["max_input_tokens"], chat.profile["tool_calling"]) == (4096, False)
        assert ChatRapid(ScriptedTools()).profile["tool_calling"]
        assert "tool_calling" not in ChatRapid("some/model").profile

    def test_tokens(self) -> None:
        chat = ChatRapid(ScriptedTools())
        alone = chat.get_num_tokens_from_messages([HumanMessage("Hi <|im_end|>")])
        assert chat.get_num_tokens_from_messages([HumanMessage("Hi <|im_end|>")], [search]) > alone
        assert len(chat.get_token_ids("<|im_end|>")) > 1

    def test_a_loaded_model_needs_its_tokenizer(self) -> None:
        model = SimpleNamespace(config=SimpleNamespace(_name_or_path="my/model"))
        assert ChatRapid(model, tokenizer=word_tokenizer()).model_name == "my/model"
        with pytest.raises(ConfigurationError, match="needs tokenizer= too"):
            ChatRapid(model)
