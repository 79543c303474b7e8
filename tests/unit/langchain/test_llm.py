import asyncio
import json
import threading
from typing import Any

import pytest
from helpers.fake_pipeline import DOCUMENT, PROMPT, QUESTION, FakePipeline
from helpers.small_tokenizers import chatml
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.exceptions import OutputParserException
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import FakeListLLM
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import ConfigurableField, RunnablePassthrough
from pydantic import BaseModel
from typing_extensions import TypedDict

from rapid_integrations import (
    ConfigurationError,
    ContextLengthError,
    OutputFormat,
    PromptError,
    RapidChatPromptTemplate,
    RapidLLM,
    RapidPromptTemplate,
)

TEMPLATE = "Read this.\n<context>\n{context}\n</context>\n{question}"


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def llm(pipeline: FakePipeline) -> RapidLLM:
    return RapidLLM(pipeline)


class Recorder(BaseCallbackHandler):
    """What one run's callbacks were told."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.chunks: list[Any] = []
        self.ends: list[Any] = []
        self.errors: list[BaseException] = []

    def on_llm_new_token(self, token: str, *, chunk: Any = None, **kwargs: Any) -> None:
        self.tokens.append(token)
        self.chunks.append(chunk)

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.ends.append(response)

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.errors.append(error)


class AsyncRecorder(AsyncCallbackHandler):
    def __init__(self) -> None:
        self.tokens: list[str] = []

    async def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.tokens.append(token)


async def ticks_during(awaitable: Any) -> tuple[Any, int]:
    """What ``awaitable`` gives, and how often another coroutine ran meanwhile."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticking = asyncio.create_task(tick())
    result = await awaitable
    ticking.cancel()
    return result, ticks


async def eventually(condition: Any) -> bool:
    """Whether ``condition`` comes true while the loop finalizes abandoned generators."""
    for _ in range(10_000):
        if condition():
            return True
        await asyncio.sleep(0.001)
    return False


class TestEntryPoints:
    async def test_every_entry_point_gives_the_same_text(self, llm: RapidLLM) -> None:
        expected = llm.invoke(PROMPT)
        assert f"read {len(DOCUMENT.strip())}" in expected or "read " in expected
        assert "".join(llm.stream(PROMPT)) == expected
        assert llm.batch([PROMPT, PROMPT]) == [expected, expected]
        assert sorted(llm.batch_as_completed([PROMPT, PROMPT])) == [(0, expected), (1, expected)]
        assert llm.generate([PROMPT]).generations[0][0].text == expected
        assert await llm.ainvoke(PROMPT) == expected
        assert "".join([token async for token in llm.astream(PROMPT)]) == expected
        assert await llm.abatch([PROMPT, PROMPT]) == [expected, expected]
        assert (await llm.agenerate([PROMPT])).generations[0][0].text == expected
        chain = PromptTemplate.from_template(TEMPLATE) | llm | StrOutputParser()
        assert chain.invoke({"context": DOCUMENT, "question": QUESTION}) == expected

    async def test_the_event_loop_ticks_while_it_answers(self, llm: RapidLLM) -> None:
        text, ticks = await ticks_during(llm.ainvoke(PROMPT))
        assert text
        assert ticks > len(text.split())

    async def test_loading_does_not_block_the_event_loop(
        self, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ticked = threading.Event()

        def load(self: RapidLLM) -> FakePipeline:
            assert ticked.wait(60), "the loop stood still while the models were loaded"
            return pipeline

        monkeypatch.setattr(RapidLLM, "_load", load)
        answering = asyncio.create_task(RapidLLM("some/model").ainvoke(PROMPT))
        await asyncio.sleep(0)
        ticked.set()
        assert await answering == RapidLLM(pipeline).invoke(PROMPT)

    async def test_stream_events_carry_the_tokens_and_the_usage(self, llm: RapidLLM) -> None:
        chain = llm | StrOutputParser()
        events = [event async for event in chain.astream_events(PROMPT, version="v2")]
        chunks = [event["data"]["chunk"] for event in events if event["event"] == "on_llm_stream"]
        assert len(chunks) > 5
        assert "".join(getattr(chunk, "text", chunk) for chunk in chunks) == llm.invoke(PROMPT)
        (end,) = [event["data"]["output"] for event in events if event["event"] == "on_llm_end"]
        assert end["generations"][0][0]["generation_info"]["finish_reason"] == "stop"

    def test_an_empty_batch_gives_nothing(self, llm: RapidLLM) -> None:
        assert llm.batch([]) == []

    def test_a_failure_in_a_batch_leaves_the_others_their_answers(self) -> None:
        llm = RapidLLM(FakePipeline(max_prompt_chars=50))
        short, too_long = "hello", "hello " * 20
        with pytest.raises(ContextLengthError):
            llm.batch([short, too_long])
        answers = llm.batch([short, too_long, short], return_exceptions=True)
        assert answers[0] == answers[2] == llm.invoke(short)
        assert isinstance(answers[1], ContextLengthError)

    async def test_a_failure_in_an_async_batch_cancels_or_spares_the_others(self) -> None:
        pipeline = FakePipeline(max_prompt_chars=50, hold=True)
        llm = RapidLLM(pipeline)
        short, too_long = "hello", "hello " * 20
        with pytest.raises(ContextLengthError):
            await llm.abatch([short, too_long])
        assert len(pipeline.requests) == pipeline.cancelled + 1
        assert pipeline.finished == 0
        pipeline.hold = False
        answers = await llm.abatch([short, too_long], return_exceptions=True)
        assert answers[0] == llm.invoke(short)
        assert isinstance(answers[1], ContextLengthError)


class TestCancelling:
    def test_closing_a_stream_cancels_the_request(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        stream = llm.stream(PROMPT)
        next(stream)
        stream.close()
        assert (pipeline.finished, pipeline.cancelled) == (0, 1)

    async def test_leaving_an_async_stream_cancels_the_request(
        self, llm: RapidLLM, pipeline: FakePipeline
    ) -> None:
        stream = llm.astream(PROMPT)
        await anext(stream)
        await stream.aclose()
        assert await eventually(lambda: pipeline.cancelled == 1)
        assert pipeline.finished == 0

    @pytest.mark.parametrize("entry", ["ainvoke", "abatch"])
    async def test_cancelling_the_task_cancels_the_requests(
        self, llm: RapidLLM, pipeline: FakePipeline, entry: str
    ) -> None:
        pipeline.hold = True
        prompts = 1 if entry == "ainvoke" else 3
        task = asyncio.create_task(getattr(llm, entry)(PROMPT if prompts == 1 else [PROMPT] * prompts))
        assert await eventually(lambda: len(pipeline.requests) == prompts)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (pipeline.finished, pipeline.cancelled) == (0, prompts)


class TestOptions:
    def test_a_call_overrides_the_constructor(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline, temperature=0.5, transfer_strength=3)
        assert "temperature 0.5 and strength 3" in llm.invoke(PROMPT)
        assert "temperature 0.9 and strength 0" in llm.invoke(PROMPT, temperature=0.9, transfer_strength=0)
        assert "temperature 0.5" in llm.invoke(PROMPT)

    def test_every_option_reaches_the_pipeline(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        given = {"top_k": 3, "min_p": 0.1, "seed": 7, "num_draft_tokens": 2, "acceptance": "lossless",
                 "tail_rule": "target", "retrieval_max_tokens": 99, "timeout_s": 5.0}  # fmt: skip
        llm.invoke(PROMPT, **given)
        flat = pipeline.requests[-1].options.flat()
        assert {name: flat[name] for name in given} == given

    def test_bind_and_with_config_carry_options(self, llm: RapidLLM) -> None:
        assert "temperature 0.25" in llm.bind(temperature=0.25).invoke(PROMPT)
        assert "temperature 0.25" in "".join(llm.bind(temperature=0.25).stream(PROMPT))
        assert llm.with_config(tags=["x"]).invoke(PROMPT) == llm.invoke(PROMPT)

    def test_max_tokens_is_max_new_tokens(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline, max_tokens=3)
        assert llm.max_new_tokens == 3
        assert len(llm.invoke(PROMPT).split(" ")) == 3
        assert len(llm.invoke(PROMPT, max_tokens=2).split(" ")) == 2
        with pytest.raises(ConfigurationError, match="same option"):
            llm.invoke(PROMPT, max_tokens=2, max_new_tokens=2)

    async def test_stop_is_honoured_everywhere(self, llm: RapidLLM) -> None:
        expected = llm.invoke(PROMPT).split(" read")[0]
        assert expected
        assert llm.invoke(PROMPT, stop=[" read"]) == expected
        assert llm.bind(stop=[" read"]).invoke(PROMPT) == expected
        assert "".join(llm.stream(PROMPT, stop=[" read"])) == expected
        assert await llm.ainvoke(PROMPT, stop=[" read"]) == expected
        assert RapidLLM(llm.target, stop=" read").invoke(PROMPT) == expected
        assert RapidLLM(llm.target, stop=" read").invoke(PROMPT, stop=[" characters"]) != expected

    @pytest.mark.parametrize("call", ["invoke", "stream", "batch"])
    def test_an_unknown_argument_raises(self, llm: RapidLLM, call: str) -> None:
        with pytest.raises(ConfigurationError, match=r"temprature \(did you mean temperature\?\)"):
            list(getattr(llm, call)([PROMPT] if call == "batch" else PROMPT, temprature=1))

    def test_an_option_out_of_range_raises(self, llm: RapidLLM) -> None:
        with pytest.raises(ConfigurationError, match="top_p=2"):
            llm.invoke(PROMPT, top_p=2)

    def test_configurable_fields(self, llm: RapidLLM) -> None:
        configurable = llm.configurable_fields(temperature=ConfigurableField(id="heat"))
        assert "temperature 0.0" in configurable.invoke(PROMPT)
        assert "temperature 0.75" in configurable.invoke(PROMPT, {"configurable": {"heat": 0.75}})

    def test_configurable_fields_after_use(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(
            pipeline, metadata={"owner": "me"}, tags=["t"], callbacks=[Recorder()], system_prompt="s"
        )
        llm.invoke(PROMPT)
        configurable = llm.configurable_fields(max_new_tokens=ConfigurableField(id="length"))
        assert len(configurable.invoke(PROMPT, {"configurable": {"length": 2}}).split(" ")) == 2

    def test_with_retry_and_with_fallbacks(self, llm: RapidLLM) -> None:
        assert llm.with_retry().invoke(PROMPT) == llm.invoke(PROMPT)
        failing = RapidLLM(FakePipeline(max_prompt_chars=1))
        assert failing.with_fallbacks([llm]).invoke(PROMPT) == llm.invoke(PROMPT)
        assert failing.with_fallbacks([FakeListLLM(responses=["spare"])]).invoke(PROMPT) == "spare"


class TestPrompts:
    @pytest.mark.parametrize("template", [RapidPromptTemplate, RapidChatPromptTemplate])
    async def test_a_template_tells_query_and_context(
        self, llm: RapidLLM, pipeline: FakePipeline, template: type[Any]
    ) -> None:
        # No tags and a body shorter than its surroundings: nothing to guess from.
        prompt = template.from_template("{question} " + "Be brief. " * 50 + "{context}")
        values = {"context": "Ada is here.", "question": QUESTION}
        chains = [
            prompt | llm,
            prompt | llm | StrOutputParser(),
            prompt | llm.bind(temperature=0.5),
            prompt | llm.with_retry(),
            prompt | llm.with_fallbacks([llm]),
            prompt | llm.with_config(run_name="x"),
            {"context": lambda v: v["context"], "question": lambda v: v["question"]} | prompt | llm,
            RunnablePassthrough() | prompt | llm,
        ]
        for chain in chains:
            chain.invoke(values)
            list(chain.stream(values))
            chain.batch([values, values])
            await chain.ainvoke(values)
            async for _ in chain.astream(values):
                pass
            await chain.abatch([values])
        assert len(pipeline.requests) == 7 * len(chains)
        for request in pipeline.requests:
            assert request.parts.context == "Ada is here."
            assert request.parts.query == QUESTION

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

    def test_a_system_prompt_goes_first(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline, system_prompt="Be brief.")
        llm.invoke(QUESTION)
        llm.invoke([SystemMessage("Be long."), HumanMessage(QUESTION)])
        roles = [[(m.role, m.text) for m in request.parts.messages] for request in pipeline.requests]
        assert roles[0] == [("system", "Be brief."), ("user", QUESTION)]
        assert roles[1] == [("system", "Be long."), ("user", QUESTION)]

    @pytest.mark.parametrize(
        "message",
        [
            HumanMessage([{"type": "image_url", "image_url": {"url": "data:,"}}]),
            AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}]),
        ],
    )
    def test_what_is_not_text_raises(self, llm: RapidLLM, message: Any) -> None:
        with pytest.raises(PromptError, match="text messages only"):
            llm.invoke([message])

    def test_a_tool_message_keeps_its_role(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        llm.invoke([HumanMessage("Hello"), ToolMessage("42", tool_call_id="1")])
        assert [m.role for m in pipeline.requests[-1].parts.messages] == ["user", "tool"]

    def test_a_retriever_of_the_call_wins(self, pipeline: FakePipeline) -> None:
        own, other = (lambda query: ["own"]), (lambda query: ["other"])
        llm = RapidLLM(pipeline, retriever=own)
        llm.invoke(PROMPT)
        llm.invoke(PROMPT, retriever=other)
        assert [request.retriever for request in pipeline.requests] == [own, other]


class Person(BaseModel):
    name: str
    age: int = 0


class TestStructuredOutput:
    ADA = '{"name": "Ada", "age": 36}'

    @pytest.fixture(autouse=True)
    def _answer(self, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pipeline, "answer", lambda parts, options: self.ADA)

    async def test_a_schema_is_asked_for_and_its_object_returned(
        self, llm: RapidLLM, pipeline: FakePipeline
    ) -> None:
        chain = llm.with_structured_output(Person)
        assert chain.invoke(PROMPT) == await chain.ainvoke(PROMPT) == Person(name="Ada", age=36)
        for request in pipeline.requests:
            assert request.options.output_format == OutputFormat(json_schema=Person)  # type: ignore[arg-type]
        assert pipeline.requests[-1].parts.query.strip() == QUESTION

    def test_a_typed_dict_or_a_schema_gives_a_dict(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        class PersonDict(TypedDict):
            name: str
            age: int

        for schema in (PersonDict, Person.model_json_schema()):
            assert llm.with_structured_output(schema).invoke(PROMPT) == {"name": "Ada", "age": 36}
            asked = json.loads(pipeline.requests[-1].options.output_format.json_schema or "")
            assert list(asked["properties"]) == ["name", "age"]

    @pytest.mark.parametrize("text", ['{"name": "Ad', '{"age": 3}', "Ada"])
    def test_a_text_that_is_no_such_object_raises_or_is_told(
        self, llm: RapidLLM, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        monkeypatch.setattr(pipeline, "answer", lambda parts, options: text)
        with pytest.raises(OutputParserException, match="does not match the schema") as raised:
            llm.with_structured_output(Person).invoke(PROMPT)
        assert raised.value.llm_output == text
        told = llm.with_structured_output(Person, include_raw=True).invoke(PROMPT)
        assert (told["raw"], told["parsed"]) == (text, None)
        assert isinstance(told["parsing_error"], OutputParserException)

    def test_what_it_cannot_do_raises_at_once(self, llm: RapidLLM) -> None:
        with pytest.raises(ConfigurationError, match=r"with_structured_output does not take method"):
            llm.with_structured_output(Person, method="json_mode")
        with pytest.raises(ConfigurationError, match="json_schema"):
            llm.with_structured_output([])  # type: ignore[arg-type]

    def test_a_cache_tells_formats_apart(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline, cache=InMemoryCache())
        for options in (
            {},
            {"json_schema": Person},
            {"regex": "a+"},
            {"regex": "b+"},
            {"choices": ["a"]},
        ) * 2:
            llm.invoke(PROMPT, **options)
        assert len(pipeline.requests) == 5


class TestCallbacks:
    async def test_tokens_and_usage_are_reported(self, llm: RapidLLM) -> None:
        for call in ("invoke", "stream", "ainvoke", "astream"):
            recorder = Recorder()
            result = getattr(llm, call)(PROMPT, {"callbacks": [recorder]})
            if call == "stream":
                text = "".join(result)
            elif call == "astream":
                text = "".join([token async for token in result])
            else:
                text = result if call == "invoke" else await result
            assert "".join(recorder.tokens) == text
            assert recorder.chunks[-1].generation_info["finish_reason"] == "stop"
            (end,) = recorder.ends
            info = end.generations[0][0].generation_info
            assert info["token_usage"]["prompt_tokens"] > 0
            assert info["token_usage"]["completion_tokens"] == len(text.split())
            assert info["rapid"]["completion_tokens"] == len(text.split())

    async def test_every_prompt_of_a_batch_reports_to_its_own_run(self, llm: RapidLLM) -> None:
        prompts = ["first", "second", "third"]
        recorders = [Recorder() for _ in prompts]
        answers = llm.batch(prompts, [{"callbacks": [recorder]} for recorder in recorders])
        assert ["".join(recorder.tokens) for recorder in recorders] == answers
        assert len(set(answers)) == 3
        async_recorders = [AsyncRecorder() for _ in prompts]
        await llm.abatch(prompts, [{"callbacks": [recorder]} for recorder in async_recorders])
        assert ["".join(recorder.tokens) for recorder in async_recorders] == answers

    def test_usage_of_a_batch(self, llm: RapidLLM) -> None:
        result = llm.generate(["first", "second"])
        single = [generations[0].generation_info["token_usage"] for generations in result.generations]
        assert result.llm_output is not None
        assert result.llm_output["token_usage"] == {
            name: single[0][name] + single[1][name] for name in single[0]
        }
        assert result.llm_output["model_name"] == "fake"

    def test_the_reason_for_the_end(self, llm: RapidLLM) -> None:
        result = llm.generate([PROMPT], max_tokens=1)
        assert result.generations[0][0].generation_info["finish_reason"] == "length"

    def test_a_failure_is_reported(self) -> None:
        recorder = Recorder()
        llm = RapidLLM(FakePipeline(max_prompt_chars=1), callbacks=[recorder])
        for call in (llm.invoke, lambda prompt: list(llm.stream(prompt))):
            with pytest.raises(ContextLengthError):
                call(PROMPT)
        assert [type(error) for error in recorder.errors] == [ContextLengthError, ContextLengthError]

    def test_tracing_metadata(self, pipeline: FakePipeline) -> None:
        seen: dict[str, Any] = {}

        class Handler(BaseCallbackHandler):
            def on_llm_start(self, serialized: Any, prompts: Any, *, metadata: Any, **kwargs: Any) -> None:
                seen.update(metadata)

        llm = RapidLLM(pipeline, metadata={"owner": "me"}, temperature=0.5, stop=["x"])
        llm.invoke(PROMPT, {"callbacks": [Handler()], "metadata": {"case": 7}}, max_tokens=9)
        assert seen["owner"] == "me"
        assert seen["case"] == 7
        assert seen["ls_provider"] == "rapid"
        assert seen["ls_model_type"] == "llm"
        assert seen["ls_model_name"] == "fake"
        assert (seen["ls_temperature"], seen["ls_max_tokens"], seen["ls_stop"]) == (0.5, 9, ["x"])
        assert "langchain-core" in seen["lc_versions"]


class TestCache:
    def test_a_repeated_call_is_answered_from_the_cache(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline, cache=InMemoryCache())
        first = llm.invoke(PROMPT)
        assert llm.invoke(PROMPT) == first
        assert llm.batch([PROMPT, "other"])[0] == first
        assert len(pipeline.requests) == 2

    async def test_async_calls_share_it(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline, cache=InMemoryCache())
        first = await llm.ainvoke(PROMPT)
        assert await llm.ainvoke(PROMPT) == llm.invoke(PROMPT) == first
        assert len(pipeline.requests) == 1

    def test_whatever_changes_the_answer_misses(self, pipeline: FakePipeline) -> None:
        cache = InMemoryCache()
        llm = RapidLLM(pipeline, cache=cache)
        retriever = lambda query: ["chunk"]  # noqa: E731 # an object to be told apart
        calls: list[dict[str, Any]] = [
            {}, {"temperature": 0.5}, {"transfer_strength": 1}, {"num_draft_tokens": 3},
            {"acceptance": "lossless"}, {"context": "Ada"}, {"query": "Ada"}, {"retriever": retriever},
            {"stop": ["Ada"]}, {"seed": 3}, {"max_tokens": 5},
        ]  # fmt: skip
        for call in calls:
            llm.bind(**call).invoke(PROMPT)
        assert len(pipeline.requests) == len(calls)
        for call in calls:
            llm.bind(**call).invoke(PROMPT)
        assert len(pipeline.requests) == len(calls)
        RapidLLM(pipeline, cache=cache, transfer_strength=1).invoke(PROMPT)
        RapidLLM(pipeline, cache=cache, retriever=retriever).invoke(PROMPT)
        RapidLLM(FakePipeline(requests=pipeline.requests), cache=cache).invoke(PROMPT)
        for shout in (lambda prompt: prompt.upper(), lambda prompt: f"{prompt}!"):
            RapidLLM(pipeline, cache=cache, completion_to_prompt=shout).invoke(PROMPT)
        for join in (lambda messages: "a", lambda messages: "b"):
            RapidLLM(pipeline, cache=cache, messages_to_prompt=join).invoke([("human", PROMPT)])
        assert len(pipeline.requests) == len(calls) + 7

    def test_the_same_text_in_other_parts_misses(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline, cache=InMemoryCache())
        for template in ("{context} {question}", "{question} {context}"):
            values = {"context": "Ada", "question": "Ada"}
            (RapidPromptTemplate.from_template(template) | llm).invoke(values)
        assert len(pipeline.requests) == 1
        (PromptTemplate.from_template("{context} {question}") | llm).invoke(values)
        assert len(pipeline.requests) == 2

    def test_a_global_cache_is_used_and_can_be_refused(self, pipeline: FakePipeline) -> None:
        set_llm_cache(InMemoryCache())
        try:
            for _ in range(2):
                RapidLLM(pipeline).invoke(PROMPT)
            assert len(pipeline.requests) == 1
            RapidLLM(pipeline, cache=False).invoke(PROMPT)
            assert len(pipeline.requests) == 2
        finally:
            set_llm_cache(None)
        with pytest.raises(ValueError, match="No global cache"):
            RapidLLM(pipeline, cache=True).invoke(PROMPT)

    def test_a_cached_answer_keeps_its_usage(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline, cache=InMemoryCache())
        llm.invoke(PROMPT)
        info = llm.generate([PROMPT]).generations[0][0].generation_info
        assert info["finish_reason"] == "stop"
        assert len(pipeline.requests) == 1


class TestTokens:
    def test_the_targets_tokenizer_counts(self, llm: RapidLLM) -> None:
        assert llm.get_num_tokens("one two three") == 3
        assert llm.get_token_ids("one two") == [0, 0]

    def test_messages_are_counted_as_the_prompt_they_become(self, llm: RapidLLM) -> None:
        assert llm.get_num_tokens_from_messages([HumanMessage("one two three")]) >= 3
        without = RapidLLM(FakePipeline(tokenizer=chatml(), chat_template=False))
        templated = RapidLLM(FakePipeline(tokenizer=chatml()))
        counts = [m.get_num_tokens_from_messages([HumanMessage("one")]) for m in (without, templated)]
        assert counts[0] < counts[1]
        with pytest.raises(ConfigurationError, match="tools"):
            llm.get_num_tokens_from_messages([HumanMessage("one")], tools=[{"name": "f"}])

    def test_a_custom_counter_wins(self, pipeline: FakePipeline) -> None:
        assert RapidLLM(pipeline, custom_get_token_ids=lambda text: [1, 2]).get_num_tokens("x") == 2
