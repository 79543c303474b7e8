"""Tests of LlamaIndex's LLM: entry points, options, prompts, and its place in the framework."""

import asyncio
from typing import Any

import pytest
from helpers.asynchronous import collect, eventually, ticks_during
from helpers.fake_pipeline import DOCUMENT, PROMPT, QUESTION, FakePipeline
from llama_index.core import Document, MockEmbedding, Settings, SummaryIndex, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate
from llama_index.core.types import BaseOutputParser

from rapid_integrations import ConfigurationError, ContextLengthError, RapidLLM

TEMPLATE = PromptTemplate("Read this.\n<context>\n{context_str}\n</context>\n{query_str}")
CHAT = [ChatMessage(role="user", content=PROMPT)]


class TestEntryPoints:
    async def test_every_entry_point_gives_the_same_text(self, llm: RapidLLM) -> None:
        expected = llm.invoke(PROMPT)
        assert llm.complete(PROMPT).text == expected
        assert (await llm.acomplete(PROMPT)).text == expected
        assert llm.chat(CHAT).message.content == expected
        assert (await llm.achat(CHAT)).message.content == expected
        responses = list(llm.stream_complete(PROMPT))
        assert responses[-1].text == "".join(r.delta for r in responses) == expected
        responses = [r async for r in await llm.astream_complete(PROMPT)]
        assert responses[-1].text == "".join(r.delta for r in responses) == expected
        messages = list(llm.stream_chat(CHAT))
        assert messages[-1].message.content == "".join(r.delta for r in messages) == expected
        messages = [r async for r in await llm.astream_chat(CHAT)]
        assert messages[-1].message.content == "".join(r.delta for r in messages) == expected

    async def test_every_template_entry_point_gives_the_same_text(self, llm: RapidLLM) -> None:
        values = {"context_str": DOCUMENT, "query_str": QUESTION}
        expected = llm.predict(TEMPLATE, **values)
        assert f"read {len(DOCUMENT)} characters" in expected
        assert await llm.apredict(TEMPLATE, **values) == expected
        assert "".join(llm.stream(TEMPLATE, **values)) == expected
        assert "".join([token async for token in await llm.astream(TEMPLATE, **values)]) == expected
        assert "".join(llm.stream(prompt=TEMPLATE, **values)) == expected

    async def test_the_event_loop_ticks_while_it_answers(self, llm: RapidLLM) -> None:
        for answer in (
            llm.acomplete(PROMPT), llm.achat(CHAT),
            llm.apredict(TEMPLATE, context_str=DOCUMENT, query_str=QUESTION),
            collect(await llm.astream_complete(PROMPT)), collect(await llm.astream_chat(CHAT)),
        ):  # fmt: skip
            _, ticks = await ticks_during(answer)
            assert ticks > 5

    def test_usage_and_statistics(self, llm: RapidLLM) -> None:
        response = llm.complete(PROMPT)
        assert response.raw["finish_reason"] == "stop"
        assert response.raw["usage"]["completion_tokens"] == len(response.text.split())
        assert response.additional_kwargs["prompt_tokens"] > 0
        assert response.additional_kwargs["rapid"]["completion_tokens"] == len(response.text.split())
        *_, last = llm.stream_chat(CHAT, max_tokens=2)
        assert last.delta == ""
        assert last.raw["finish_reason"] == "length"
        assert last.additional_kwargs["completion_tokens"] > 0
        assert last.message.additional_kwargs == {}

    def test_closing_a_stream_cancels_the_request(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        streams = [
            llm.stream_complete(PROMPT), llm.stream_chat(CHAT),
            llm.stream(TEMPLATE, context_str=DOCUMENT, query_str=QUESTION),
        ]  # fmt: skip
        for stream in streams:
            next(stream)
            stream.close()
        del streams, stream
        assert (pipeline.finished, pipeline.cancelled) == (0, 3)

    async def test_leaving_an_async_stream_cancels_the_request(
        self, llm: RapidLLM, pipeline: FakePipeline
    ) -> None:
        for stream in (await llm.astream_complete(PROMPT), await llm.astream_chat(CHAT)):
            await anext(stream)
            await stream.aclose()
        del stream
        assert await eventually(lambda: pipeline.cancelled == 2)
        assert pipeline.finished == 0

    async def test_cancelling_the_task_cancels_the_request(
        self, llm: RapidLLM, pipeline: FakePipeline
    ) -> None:
        pipeline.hold = True
        task = asyncio.create_task(llm.acomplete(PROMPT))
        assert await eventually(lambda: len(pipeline.requests) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (pipeline.finished, pipeline.cancelled) == (0, 1)


class TestOptions:
    async def test_a_call_overrides_the_constructor(self, llm: RapidLLM) -> None:
        assert "temperature 0.5 " in llm.complete(PROMPT, temperature=0.5).text
        assert "temperature 0.5 " in (await llm.acomplete(PROMPT, temperature=0.5)).text
        assert "temperature 0.5 " in llm.chat(CHAT, temperature=0.5).message.content
        assert len(llm.complete(PROMPT, max_tokens=2).text.split(" ")) == 2
        expected = llm.complete(PROMPT).text.split(" read")[0]
        assert llm.complete(PROMPT, stop=[" read"]).text == expected
        assert llm.chat(CHAT, stop=" read").message.content == expected
        assert llm.complete(PROMPT, stop=None).text == llm.complete(PROMPT).text

    async def test_an_unknown_argument_raises_at_the_call(self, llm: RapidLLM) -> None:
        for call in (llm.complete, llm.stream_complete):
            with pytest.raises(ConfigurationError, match="temprature"):
                call(PROMPT, temprature=1)
        for call in (llm.acomplete, llm.astream_complete):
            with pytest.raises(ConfigurationError, match="temprature"):
                await call(PROMPT, temprature=1)
        for call in (llm.chat, llm.stream_chat):
            with pytest.raises(ConfigurationError, match="temprature"):
                call(CHAT, temprature=1)
        for call in (llm.achat, llm.astream_chat):
            with pytest.raises(ConfigurationError, match="temprature"):
                await call(CHAT, temprature=1)

    def test_errors_of_the_pipeline_are_raised(self) -> None:
        llm = RapidLLM(FakePipeline(max_prompt_chars=1))
        with pytest.raises(ContextLengthError):
            llm.complete(PROMPT)
        with pytest.raises(ContextLengthError):
            list(llm.stream_complete(PROMPT))

    def test_query_context_and_retriever_of_a_call(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        retriever = lambda query: ["chunk"]  # noqa: E731 # compared by identity
        text = "Ada is here. " + "Be brief. " * 50
        llm.complete(text, context="Ada is here.", query="Be brief.", retriever=retriever)
        llm.chat([ChatMessage(text)], context="Ada is here.", retriever=retriever)
        for request in pipeline.requests:
            assert request.parts.context == "Ada is here."
            assert request.retriever is retriever


class TestPrompts:
    async def test_query_and_context_come_from_template_variables(
        self, llm: RapidLLM, pipeline: FakePipeline
    ) -> None:
        # Without tags, and with a short body, layout alone does not identify the context.
        text = "{query_str} " + "Be brief. " * 50 + "{context_str}"
        partial = PromptTemplate(text).partial_format(query_str=QUESTION)
        chat = ChatPromptTemplate([ChatMessage(role="system", content="Hm."), ChatMessage(content=text)])
        mapped = PromptTemplate(
            text.replace("context_str", "body"), template_var_mappings={"context_str": "body"}
        )
        function = PromptTemplate(
            text, function_mappings={"context_str": lambda **kw: kw["context_str"].upper()}
        )
        for template, values in (
            (PromptTemplate(text), {"query_str": QUESTION, "context_str": "ADA IS HERE."}),
            (partial, {"context_str": "ADA IS HERE."}),
            (partial, {"context_str": ["ADA IS HERE."]}),
            (chat, {"query_str": QUESTION, "context_str": "ADA IS HERE."}),
            (mapped, {"query_str": QUESTION, "context_str": "ADA IS HERE."}),
            (function, {"query_str": QUESTION, "context_str": "ada is here."}),
            (PromptTemplate(text.replace("context_str", "context_msg")),
             {"query_str": QUESTION, "context_msg": "ADA IS HERE."}),
        ):  # fmt: skip
            llm.predict(template, **values)
            await llm.apredict(template, **values)
            list(llm.stream(template, **values))
        assert len(pipeline.requests) == 21
        for request in pipeline.requests:
            assert request.parts.context == "ADA IS HERE."
            assert request.parts.query == QUESTION
            assert "['ADA" not in request.parts.text
            assert not request.parts.raw

    def test_a_chat_template_keeps_roles(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        llm.predict(
            ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{query_str}")]),
            query_str="Hi",
        )
        assert [(m.role, m.text) for m in pipeline.requests[-1].parts.messages] == [
            ("system", "Be brief."), ("user", "Hi")
        ]  # fmt: skip

    def test_messages_keep_their_roles(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        roles = [MessageRole.SYSTEM, MessageRole.USER, MessageRole.CHATBOT, MessageRole.USER]
        llm.chat([ChatMessage(role=role, content="x") for role in roles])
        assert [m.role for m in pipeline.requests[-1].parts.messages] == [
            "system",
            "user",
            "assistant",
            "user",
        ]

    def test_formatted_text_is_not_changed(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        llm.complete("<|user|>Hi", formatted=True)
        llm.complete("Hi")
        assert [request.parts.raw for request in pipeline.requests] == [True, False]

    def test_own_prompt_functions_replace_the_chat_template(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(
            pipeline,
            completion_to_prompt=lambda text: f"<<{text}>>",
            messages_to_prompt=lambda messages: "|".join(m.content for m in messages),
        )
        llm.complete("Hi")
        llm.chat([ChatMessage("Hi"), ChatMessage("Ho")])
        llm.invoke("Hi")
        llm.invoke([("human", "Hi"), ("human", "Ho")])
        llm.complete("Hi", formatted=True)
        llm.predict(TEMPLATE, context_str="Ada is here.", query_str=QUESTION)
        assert all(request.parts.raw for request in pipeline.requests)
        texts = [request.parts.text for request in pipeline.requests]
        assert texts[:5] == ["<<Hi>>", "Hi|Ho", "<<Hi>>", "Hi|Ho", "Hi"]
        assert texts[5].startswith("<<Read this.")
        assert pipeline.requests[-1].parts.context == "Ada is here."

    def test_a_system_prompt_reaches_own_prompt_functions(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(
            pipeline,
            system_prompt="Be brief.",
            completion_to_prompt=lambda text: f"<<{text}>>",
            messages_to_prompt=lambda messages: "|".join(f"{m.role.value}:{m.content}" for m in messages),
        )
        llm.complete("Hi")
        llm.chat([ChatMessage("Hi")])
        llm.chat([ChatMessage("Hm", role="system"), ChatMessage("Hi")])
        texts = [request.parts.text for request in pipeline.requests]
        assert texts == ["Be brief.\n\n<<Hi>>", "system:Be brief.|user:Hi", "system:Hm|user:Hi"]

    def test_a_query_wrapper_wraps_the_template(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline, query_wrapper_prompt=PromptTemplate("<<{query_str}>>"))
        llm.predict(TEMPLATE, context_str="Ada is here.", query_str=QUESTION)
        assert pipeline.requests[-1].parts.text.startswith("<<Read this.")
        assert pipeline.requests[-1].parts.context == "Ada is here."

    def test_a_system_prompt_goes_first(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline, system_prompt="Be brief.")
        llm.complete("Hi")
        llm.chat([ChatMessage("Hi")])
        llm.predict(PromptTemplate("{query_str}"), query_str="Hi")
        for request in pipeline.requests:
            assert [(m.role, m.text) for m in request.parts.messages] == [
                ("system", "Be brief."),
                ("user", "Hi"),
            ]

    def test_an_output_parser_is_applied(self, pipeline: FakePipeline) -> None:
        class Shout(BaseOutputParser):
            def parse(self, output: str) -> str:
                return output.upper()

            def format(self, query: str) -> str:
                return f"{query}\nShout!"

        llm = RapidLLM(pipeline, output_parser=Shout())
        assert llm.predict(TEMPLATE, context_str="Ada is here.", query_str=QUESTION).isupper()
        assert pipeline.requests[-1].parts.text.endswith("Shout!")
        assert pipeline.requests[-1].parts.context == "Ada is here."


class TestFramework:
    @pytest.fixture(autouse=True)
    def _settings(self) -> Any:
        Settings.embed_model = MockEmbedding(embed_dim=4)
        yield
        Settings._llm = Settings._embed_model = None

    def test_settings_accept_it(self, llm: RapidLLM) -> None:
        Settings.llm = llm
        assert Settings.llm is llm

    @pytest.mark.parametrize("index_type", [VectorStoreIndex, SummaryIndex])
    def test_a_query_engine(self, llm: RapidLLM, pipeline: FakePipeline, index_type: Any) -> None:
        index = index_type.from_documents([Document(text=DOCUMENT)])
        engine = index.as_query_engine(llm=llm)
        expected = str(engine.query(QUESTION))
        assert pipeline.requests[-1].parts.query == QUESTION
        assert pipeline.requests[-1].parts.context.strip() == DOCUMENT.strip()
        Settings.llm = llm
        assert str(index.as_query_engine().query(QUESTION)) == expected
        streaming = index.as_query_engine(streaming=True).query(QUESTION)
        assert "".join(streaming.response_gen) == expected

    def test_chat_engines(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        index = SummaryIndex.from_documents([Document(text="Ada is here.")])
        for mode in ("context", "condense_plus_context", "condense_question", "simple"):
            # LlamaIndex's default memory leaves its database connection open.
            memory = ChatMemoryBuffer.from_defaults(token_limit=1000, tokenizer_fn=str.split)
            engine = index.as_chat_engine(chat_mode=mode, llm=llm, memory=memory)
            assert engine.chat(QUESTION).response
            assert "".join(engine.stream_chat("And who else?").response_gen)
        assert pipeline.cancelled == 0

    def test_events_and_token_counts(self, pipeline: FakePipeline) -> None:
        seen: list[str] = []

        class Handler(BaseEventHandler):
            def handle(self, event: Any, **kwargs: Any) -> None:
                seen.append(type(event).__name__)

        counter = TokenCountingHandler(tokenizer=str.split)
        llm = RapidLLM(pipeline, callback_manager=CallbackManager([counter]))
        handler = Handler()
        dispatcher = get_dispatcher()
        dispatcher.add_event_handler(handler)
        try:
            text = llm.complete(PROMPT).text
            list(llm.stream_chat(CHAT))
        finally:
            dispatcher.event_handlers.remove(handler)
        for name in (
            "LLMCompletionStartEvent",
            "LLMCompletionEndEvent",
            "LLMChatStartEvent",
            "LLMChatEndEvent",
        ):
            assert seen.count(name) == 1
        assert seen.count("LLMChatInProgressEvent") == len(text.split(" ")) + 1
        assert counter.completion_llm_token_count == 2 * len(text.split())

    def test_metadata(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline, max_new_tokens=33)
        metadata = llm.metadata
        assert (metadata.context_window, metadata.num_output, metadata.model_name) == (4096, 33, "fake")
        assert not metadata.is_chat_model
        assert metadata.model_dump()["context_window"] == 4096

    def test_metadata_and_events_load_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(self: RapidLLM) -> Any:
            raise AssertionError("loaded")

        monkeypatch.setattr(RapidLLM, "_load", load)
        llm = RapidLLM("some/model")
        assert llm.metadata.model_name == "some/model"
        assert llm.to_payload()["model_name"] == "some/model"
        Settings.llm = llm
        assert Settings.llm is llm
        with pytest.raises(AssertionError, match="loaded"):
            _ = llm.metadata.context_window

    def test_dictionary_round_trip(self) -> None:
        llm = RapidLLM("some/model", "small/model", temperature=0.5, stop=["x"])
        again = RapidLLM.from_dict(llm.to_dict())
        assert again.to_dict() == llm.to_dict()
        assert RapidLLM.from_json(llm.json()).to_dict() == llm.to_dict()
        assert llm.to_dict()["class_name"] == RapidLLM.class_name() == "RapidLLM"

    def test_a_rate_limiter_is_asked(self, pipeline: FakePipeline) -> None:
        class Limiter:
            asked = 0

            def acquire(self) -> None:
                self.asked += 1

        llm = RapidLLM(pipeline, rate_limiter=Limiter())
        llm.complete(PROMPT)
        llm.chat(CHAT)
        assert llm.rate_limiter.asked == 2
