"""Tests of the question and context that reach the engine in each of LlamaIndex's response and chat modes."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from helpers.fake_pipeline import FakePipeline
from llama_index.core import Settings, SummaryIndex
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import TextNode

from rapid_integrations import RapidLLM

ADA, GRACE = "Ada is the harbour master.", "Grace is the lighthouse keeper."
BOTH = f"{ADA}\n\n{GRACE}"
QUESTION, FOLLOW_UP = "Who is the harbour master?", "And who else?"


@dataclass(frozen=True)
class Reached:
    """One request: its messages' roles, its question, its context."""

    roles: str
    query: str
    context: str


@pytest.fixture
def llm() -> Iterator[RapidLLM]:
    # LlamaIndex builds some response modes with Settings.llm, even if the engine is given another LLM.
    Settings.llm = RapidLLM(FakePipeline())
    yield Settings.llm
    Settings._llm = None


@pytest.fixture
def index() -> SummaryIndex:
    return SummaryIndex([TextNode(text=ADA), TextNode(text=GRACE)])


def reached(llm: RapidLLM, since: int = 0) -> list[Reached]:
    requests = llm.target.requests[since:]
    return [
        Reached(" ".join(m.role for m in r.parts.messages), r.parts.query, r.parts.context) for r in requests
    ]


def asked(*contexts: str) -> list[Reached]:
    return [Reached("user", QUESTION, context) for context in contexts]


RESPONSE_MODES = {
    ResponseMode.COMPACT: asked(BOTH),
    ResponseMode.REFINE: asked(ADA, GRACE),
    ResponseMode.TREE_SUMMARIZE: asked(BOTH),
    ResponseMode.SIMPLE_SUMMARIZE: asked(f"{ADA}\n{GRACE}"),
    ResponseMode.ACCUMULATE: asked(ADA, GRACE),
    ResponseMode.COMPACT_ACCUMULATE: asked(BOTH),
    ResponseMode.GENERATION: asked(""),
    ResponseMode.NO_TEXT: [],
    ResponseMode.CONTEXT_ONLY: [],
}


def test_the_table_has_every_response_mode() -> None:
    assert set(RESPONSE_MODES) == set(ResponseMode)


@pytest.mark.parametrize("mode", RESPONSE_MODES, ids=lambda mode: mode.value)
async def test_a_response_mode(llm: RapidLLM, index: SummaryIndex, mode: ResponseMode) -> None:
    engine = index.as_query_engine(llm=llm, response_mode=mode)
    engine.query(QUESTION)
    assert reached(llm) == RESPONSE_MODES[mode]
    llm.target.requests.clear()
    await engine.aquery(QUESTION)
    assert sorted(reached(llm), key=str) == sorted(RESPONSE_MODES[mode], key=str)


@pytest.mark.parametrize("mode", ["compact", "refine", "simple_summarize", "tree_summarize", "generation"])
def test_a_streamed_response_mode(llm: RapidLLM, index: SummaryIndex, mode: str) -> None:
    streaming = index.as_query_engine(llm=llm, response_mode=mode, streaming=True).query(QUESTION)
    assert "".join(streaming.response_gen)
    assert reached(llm) == RESPONSE_MODES[ResponseMode(mode)]


CONTEXT_CHAT = [
    [Reached("system user", QUESTION, BOTH)],
    [Reached("system user assistant user", FOLLOW_UP, BOTH)],
]
CHAT_MODES = {
    ChatMode.SIMPLE: [
        [Reached("user", QUESTION, "")],
        [Reached("user assistant user", FOLLOW_UP, "")],
    ],
    ChatMode.CONTEXT: CONTEXT_CHAT,
    ChatMode.CONDENSE_QUESTION: [
        [Reached("user", QUESTION, BOTH)],
        # The condensed question is the LLM's own, here the fake's answer.
        [Reached("user", FOLLOW_UP, ""), Reached("user", "CONDENSED", BOTH)],
    ],
    ChatMode.CONDENSE_PLUS_CONTEXT: CONTEXT_CHAT,
    ChatMode.BEST: CONTEXT_CHAT,
}


@pytest.mark.parametrize("mode", CHAT_MODES, ids=lambda mode: mode.value)
def test_a_chat_mode(
    llm: RapidLLM, index: SummaryIndex, mode: ChatMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.target, "answer", lambda parts, options: "CONDENSED")
    # LlamaIndex's default memory leaves its database connection open.
    memory = ChatMemoryBuffer.from_defaults(token_limit=1000, tokenizer_fn=str.split)
    engine = index.as_chat_engine(chat_mode=mode, llm=llm, memory=memory)
    for question, expected in zip((QUESTION, FOLLOW_UP), CHAT_MODES[mode], strict=True):
        before = len(llm.target.requests)
        engine.chat(question)
        found = reached(llm, before)
        if mode in (ChatMode.CONDENSE_PLUS_CONTEXT, ChatMode.BEST) and question == FOLLOW_UP:
            # The condensing prompt is plain text to the LLM; its answer only goes to the retriever.
            assert (found[0].roles, found[0].context) == ("user", "")
            found = found[1:]
        assert found == expected


@pytest.mark.parametrize("mode", [ChatMode.REACT, ChatMode.OPENAI])
def test_llama_index_refuses_removed_chat_modes(llm: RapidLLM, index: SummaryIndex, mode: ChatMode) -> None:
    with pytest.raises(ValueError, match="deprecated and removed"):
        index.as_chat_engine(chat_mode=mode, llm=llm)


def test_the_table_has_every_chat_mode() -> None:
    assert {*CHAT_MODES, ChatMode.REACT, ChatMode.OPENAI} == set(ChatMode)
