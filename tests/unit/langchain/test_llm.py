import asyncio
import threading
from typing import Any

import pytest
from helpers.asynchronous import ticks_during
from helpers.fake_pipeline import DOCUMENT, PROMPT, QUESTION, FakePipeline
from helpers.small_tokenizers import chatml
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import ConfigurableField

from rapid_integrations import ConfigurationError, ContextLengthError, RapidLLM

TEMPLATE = "Read this.\n<context>\n{context}\n</context>\n{question}"


class Recorder(BaseCallbackHandler):
    """Records one run's callbacks."""

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

    def test_configurable_fields_after_use(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(
            pipeline, metadata={"owner": "me"}, tags=["t"], callbacks=[Recorder()], system_prompt="s"
        )
        llm.invoke(PROMPT)
        configurable = llm.configurable_fields(max_new_tokens=ConfigurableField(id="length"))
        assert len(configurable.invoke(PROMPT, {"configurable": {"length": 2}}).split(" ")) == 2


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
