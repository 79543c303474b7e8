"""What LangChain does to a model, done to both of ours: asked in every way they still answer alike."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.fake_pipeline import PROMPT, QUESTION, FakePipeline
from langchain_core.caches import InMemoryCache
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.load import dumps, loads
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tracers import LangChainTracer
from langsmith import Client
from requests import Session

from rapid_integrations import ChatRapid, ContextLengthError, RapidLLM, RapidPipeline

FACES = (RapidLLM, ChatRapid)
ENTRIES = ("invoke", "stream", "batch", "ainvoke", "astream", "abatch", "astream_events")


def rebuilt(llm: Any) -> Any:
    return loads(dumps(llm), allowed_objects=[type(llm)], valid_namespaces=["rapid_integrations"])


def reconfigured(llm: Any) -> Any:
    cold = llm.model_copy(update={"temperature": 0.0})
    field = ConfigurableField(id="heat")
    return cold.configurable_fields(temperature=field).with_config(configurable={"heat": 0.5})


def with_history(llm: Any) -> Any:
    histories: dict[str, InMemoryChatMessageHistory] = {}
    # LangChain keeps nothing of what a lone text LLM said, whichever it is: its runs hold no message.
    speaker = llm | StrOutputParser() if isinstance(llm, RapidLLM) else llm
    talk = RunnableWithMessageHistory(
        speaker, lambda session_id: histories.setdefault(session_id, InMemoryChatMessageHistory())
    )
    return talk.with_config(configurable={"session_id": "one"})


WRAPPINGS: dict[str, Callable[[Any], Any]] = {
    "cache": lambda llm: llm.model_copy(update={"cache": InMemoryCache()}),
    "dumps and loads": rebuilt,
    "pickle": lambda llm: pickle.loads(pickle.dumps(llm)),
    "deepcopy": copy.deepcopy,
    "configurable_fields": reconfigured,
    "with_fallbacks": lambda llm: type(llm)(FakePipeline(max_prompt_chars=0)).with_fallbacks([llm]),
    "with_retry": lambda llm: llm.with_retry(),
    "history": with_history,
}


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    """What loading any model gives."""
    pipeline = FakePipeline()
    monkeypatch.setattr(RapidPipeline, "from_pretrained", lambda *args, **kwargs: pipeline)
    return pipeline


def text_of(value: Any) -> str:
    return str(getattr(value, "text", value))


async def ask(model: Any, entry: str, prompt: Any = PROMPT) -> str:
    match entry:
        case "invoke":
            return text_of(model.invoke(prompt))
        case "stream":
            return "".join(map(text_of, model.stream(prompt)))
        case "batch":
            return text_of(*model.batch([prompt]))
        case "ainvoke":
            return text_of(await model.ainvoke(prompt))
        case "astream":
            return "".join([text_of(chunk) async for chunk in model.astream(prompt)])
        case "abatch":
            return text_of(*await model.abatch([prompt]))
    events = [event async for event in model.astream_events(prompt, version="v2")]
    kinds = ("on_llm_stream", "on_chat_model_stream")
    return "".join(text_of(event["data"]["chunk"]) for event in events if event["event"] in kinds)


@pytest.mark.filterwarnings(
    "ignore:The function `loads` is in beta",
    "ignore:The class `InMemoryChatMessageHistory`",
    "ignore:RunnableWithMessageHistory",
)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("face", FACES)
class TestWrapped:
    @pytest.mark.parametrize("entry", ENTRIES)
    async def test_it_answers_alike(
        self, pipeline: FakePipeline, face: Any, wrapping: str, entry: str
    ) -> None:
        llm = face("some/model", temperature=0.5)
        expected = text_of(llm.invoke(PROMPT))
        assert "temperature 0.5" in expected
        assert await ask(WRAPPINGS[wrapping](llm), entry) == expected
        assert pipeline.requests[-1].parts.query.strip() == QUESTION

    def test_in_a_chain(self, pipeline: FakePipeline, face: Any, wrapping: str) -> None:
        llm = face("some/model", temperature=0.5)
        chain = RunnableLambda(lambda prompt: prompt) | WRAPPINGS[wrapping](llm) | RunnableLambda(text_of)
        assert chain.invoke(PROMPT) == text_of(llm.invoke(PROMPT))


@pytest.mark.parametrize("entry", ["invoke", "batch", "ainvoke", "abatch"])
@pytest.mark.parametrize("face", FACES)
class TestCacheAndRetry:
    async def test_a_kept_answer_costs_nothing(self, pipeline: FakePipeline, face: Any, entry: str) -> None:
        llm = face("some/model", cache=InMemoryCache())
        first = await ask(llm, entry)
        for again in ENTRIES[:1] + ENTRIES[2:4]:
            assert await ask(llm, again) == first
        assert len(pipeline.requests) == 1

    async def test_a_retry_asks_again(
        self, pipeline: FakePipeline, face: Any, entry: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer, failures = pipeline.answer, [ContextLengthError("only once")]

        def flaky(*args: Any) -> str:
            if failures:
                raise failures.pop()
            return answer(*args)

        monkeypatch.setattr(pipeline, "answer", flaky)
        assert await ask(face("some/model").with_retry(wait_exponential_jitter=False), entry)
        assert len(pipeline.requests) == 2


@pytest.mark.filterwarnings(
    "ignore:The class `InMemoryChatMessageHistory`", "ignore:RunnableWithMessageHistory"
)
@pytest.mark.parametrize("entry", ["invoke", "stream", "ainvoke", "astream"])
@pytest.mark.parametrize("face", FACES)
async def test_a_history_is_read(pipeline: FakePipeline, face: Any, entry: str) -> None:
    talk = with_history(face("some/model"))
    first = await ask(talk, entry, [HumanMessage("Who is Ada?")])
    await ask(talk, entry, [HumanMessage("And Grace?")])
    messages = [(m.role, m.text) for m in pipeline.requests[-1].parts.messages]
    assert messages == [("user", "Who is Ada?"), ("assistant", first), ("user", "And Grace?")]
    assert pipeline.requests[-1].parts.query == "And Grace?"


# Without astream_events: beside a tracer langchain-core 1.8.3 does not tell it that a text LLM starts, and it
# then stops any such LLM after its first chunk.
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry != "astream_events"])
@pytest.mark.parametrize("face", FACES)
async def test_traces_without_a_network(
    pipeline: FakePipeline, face: Any, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LangSmith's client writes whole runs as JSON, and its server is none."""
    sent: list[dict[str, Any]] = []

    def request(method: str, url: str, *, data: bytes, **kwargs: Any) -> Any:
        sent.append(json.loads(data))
        return SimpleNamespace(status_code=202, raise_for_status=lambda: None)

    session = Session()
    monkeypatch.setattr(session, "request", request)
    client = Client(
        "http://nowhere.invalid", api_key="none", session=session,
        auto_batch_tracing=False, info={},
    )  # fmt: skip
    traced = face("some/model", temperature=0.5).with_config(callbacks=[LangChainTracer(client=client)])
    answer = await ask(traced, entry)
    begun, ended = sent
    assert begun["run_type"] == "llm"
    assert begun["extra"]["metadata"]["ls_provider"] == "rapid"
    assert begun["extra"]["metadata"]["ls_temperature"] == 0.5
    assert begun["serialized"]["kwargs"]["target"] == "some/model"
    ((generation,),) = ended["outputs"]["generations"]
    assert (generation["text"], ended.get("error")) == (answer, None)
    assert generation["generation_info"]["rapid"]["completion_tokens"] == len(answer.split())


@pytest.mark.parametrize("face", FACES)
def test_a_trace_of_loaded_models_has_none_of_them(pipeline: FakePipeline, face: Any) -> None:
    (run,) = traced_runs(lambda config: face(pipeline).invoke([AIMessage("Hi"), HumanMessage("Ho")], config))
    assert run.serialized["type"] == "not_implemented"
    assert "JSON cannot hold" in run.serialized["repr"]


def traced_runs(ask: Callable[[Any], Any]) -> list[Any]:
    from langchain_core.tracers.context import collect_runs

    with collect_runs() as collected:
        ask({})
    return list(collected.traced_runs)
