"""Tests of the events that LlamaIndex's event and span handlers receive."""

from collections.abc import Iterator
from typing import Any

import pytest
from helpers.fake_pipeline import DOCUMENT, PROMPT, QUESTION
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index_instrumentation import get_dispatcher
from pydantic import Field

from rapid_integrations import (
    RapidDecodeEvent,
    RapidLLM,
    RapidPrefillEvent,
    RapidRetrievalEvent,
    RetrievedContext,
)

OURS = (RapidRetrievalEvent, RapidPrefillEvent, RapidDecodeEvent)
CHAT = [ChatMessage(role="user", content=PROMPT)]


class Listener(BaseEventHandler):
    received: list[Any] = Field(default_factory=list)

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.received.append(event)

    def ours(self) -> list[Any]:
        return [event for event in self.received if isinstance(event, OURS)]


@pytest.fixture
def listener() -> Iterator[Listener]:
    root, handler = get_dispatcher(), Listener()
    root.add_event_handler(handler)
    yield handler
    root.event_handlers.remove(handler)


async def test_every_entry_point_reports_its_phases_in_order(llm: RapidLLM, listener: Listener) -> None:
    template = PromptTemplate("<context>{context_str}</context>{query_str}")
    values = {"context_str": DOCUMENT, "query_str": QUESTION}
    entries = [
        lambda: llm.complete(PROMPT),
        lambda: list(llm.stream_complete(PROMPT)),
        lambda: llm.chat(CHAT),
        lambda: list(llm.stream_chat(CHAT)),
        lambda: llm.predict(template, **values),
        lambda: list(llm.stream(template, **values)),
    ]
    for entry in entries:
        listener.received.clear()
        entry()
        assert tuple(map(type, listener.ours())) == OURS
    for awaitable in (llm.acomplete(PROMPT), llm.achat(CHAT), llm.apredict(template, **values)):
        listener.received.clear()
        await awaitable
        assert tuple(map(type, listener.ours())) == OURS
    for stream in (await llm.astream_complete(PROMPT), await llm.astream_chat(CHAT)):
        listener.received.clear()
        assert [part async for part in stream]
        assert tuple(map(type, listener.ours())) == OURS


def test_events_carry_the_statistics(llm: RapidLLM, listener: Listener) -> None:
    found = DOCUMENT[:26]
    response = llm.complete(PROMPT, retriever=lambda query: [(found, 0.5)])
    retrieval, prefill, decode = listener.ours()
    assert retrieval.chunks == [{"text": found, "position": 0, "score": 0.5}]
    assert (retrieval.retriever, retrieval.fallback) == ("<lambda>", None)
    assert retrieval.seconds > 0
    assert prefill.read_tokens == 2
    assert prefill.seconds >= 0
    assert decode.finish_reason == "stop"
    assert decode.stats == response.raw["rapid"]
    for event in (retrieval, prefill, decode):
        assert event.model_dump()["class_name"] == type(event).__name__


def test_events_belong_to_the_span_of_their_llm_call(
    llm: RapidLLM, listener: Listener, spans: SimpleSpanHandler
) -> None:
    llm.predict(PromptTemplate("{context_str} {query_str}"), context_str=DOCUMENT, query_str=QUESTION)
    list(llm.stream_complete(PROMPT))
    ids = {span.id_: span for span in spans.completed_spans}
    first, second = listener.ours()[:3], listener.ours()[3:]
    assert {event.span_id.split("-")[0] for event in first} == {"RapidLLM.complete"}
    assert {event.span_id.split("-")[0] for event in second} == {"RapidLLM.stream_complete"}
    assert ids[ids[first[0].span_id].parent_id].id_.startswith("RapidLLM.predict")


def test_a_failed_retrieval_is_reported(llm: RapidLLM, listener: Listener) -> None:
    def broken(query: str) -> list[str]:
        raise OSError("the index is gone")

    llm.complete(PROMPT, retriever=broken)
    assert "the index is gone" in listener.ours()[0].fallback


def test_on_event_receives_the_events_too(llm: RapidLLM, listener: Listener) -> None:
    received: list[Any] = []
    llm.complete(PROMPT, on_event=received.append)
    assert isinstance(received[0], RetrievedContext)
    assert len(listener.ours()) == 3
