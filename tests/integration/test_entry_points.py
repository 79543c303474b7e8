"""Every entry point of both frameworks, with the bundled models and a document they were not trained on."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document as LangChainDocument
from langchain_core.load import dumpd, dumps, loads
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate as LangChainTemplate
from langchain_core.retrievers import BaseRetriever as LangChainRetriever
from llama_index.core import MockEmbedding, PromptTemplate, Settings, SummaryIndex, VectorStoreIndex
from llama_index.core.llms import ChatMessage
from llama_index.core.schema import TextNode
from pydantic import Field
from transformers import AutoModelForCausalLM, AutoTokenizer

from rapid_integrations import (
    ChatRapid,
    ConfigurationError,
    ContextLengthError,
    RapidChatPromptTemplate,
    RapidLLM,
    RapidPromptTemplate,
    demo,
)
from rapid_integrations.demo import PROMPT_TEMPLATE, DemoDocument, DemoQuestion, generate_documents

DOCUMENT: DemoDocument = next(
    iter(
        generate_documents(
            num_tokens=1024, num_documents=1, questions_per_document=6, seed=11, kinds=["describe"]
        )
    )
)
QUESTION: DemoQuestion = max(DOCUMENT.questions, key=lambda question: len(question.answer))
PROMPT = PROMPT_TEMPLATE.format(context=DOCUMENT.text, question=QUESTION.question)
VALUES = {"context": DOCUMENT.text, "question": QUESTION.question}
LLAMA_TEMPLATE = PromptTemplate(PROMPT_TEMPLATE.format(context="{context_str}", question="{query_str}"))
LLAMA_VALUES = {"context_str": DOCUMENT.text, "query_str": QUESTION.question}
CHAT = [ChatMessage(role="user", content=PROMPT)]
# Runs long enough to be interrupted.
ENDLESS = {"max_new_tokens": 2000, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm() -> RapidLLM:
    return RapidLLM.demo()


@pytest.fixture(scope="module")
def answer(llm: RapidLLM) -> str:
    return llm.invoke(PROMPT)


@pytest.fixture
def settings(llm: RapidLLM) -> Iterator[None]:
    Settings.llm, Settings.embed_model = llm, MockEmbedding(embed_dim=4)
    yield
    Settings._llm = Settings._embed_model = None


@asynccontextmanager
async def ticking() -> AsyncIterator[Callable[[], int]]:
    """Count how often another coroutine runs in the meantime."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    task = asyncio.create_task(tick())
    yield lambda: ticks
    task.cancel()


def wait_until_idle(llm: RapidLLM) -> None:
    for _ in range(10_000):
        if llm.pipeline.engine.num_running == 0:
            return
        threading.Event().wait(0.001)
    raise AssertionError("a request without a consumer is still running")


class TestSameAnswer:
    def test_most_answers_are_right(self, llm: RapidLLM) -> None:
        chain = RapidPromptTemplate.from_template(PROMPT_TEMPLATE) | llm
        answers = chain.batch([{**VALUES, "question": q.question} for q in DOCUMENT.questions])
        right = [a.strip() == q.answer for a, q in zip(answers, DOCUMENT.questions, strict=True)]
        assert sum(right) > len(right) / 2

    def test_langchain(self, llm: RapidLLM, answer: str) -> None:
        assert llm.invoke(PROMPT) == answer
        assert "".join(llm.stream(PROMPT)) == answer
        assert llm.batch([PROMPT, PROMPT, PROMPT]) == [answer] * 3
        assert sorted(llm.batch_as_completed([PROMPT, PROMPT])) == [(0, answer), (1, answer)]
        assert llm.generate([PROMPT]).generations[0][0].text == answer
        assert llm.invoke([HumanMessage(PROMPT)]) == answer
        assert ChatRapid.demo().invoke(PROMPT).content == answer

    async def test_langchain_async(self, llm: RapidLLM, answer: str) -> None:
        assert await llm.ainvoke(PROMPT) == answer
        assert "".join([token async for token in llm.astream(PROMPT)]) == answer
        assert await llm.abatch([PROMPT, PROMPT, PROMPT]) == [answer] * 3
        assert (await llm.agenerate([PROMPT])).generations[0][0].text == answer
        events = [event async for event in llm.astream_events(PROMPT, version="v2")]
        tokens = [event["data"]["chunk"] for event in events if event["event"] == "on_llm_stream"]
        assert "".join(getattr(token, "text", token) for token in tokens) == answer

    @pytest.mark.parametrize("template", [LangChainTemplate, RapidPromptTemplate, RapidChatPromptTemplate])
    async def test_langchain_chains(self, llm: RapidLLM, answer: str, template: Any) -> None:
        chain = template.from_template(PROMPT_TEMPLATE) | llm | StrOutputParser()
        assert chain.invoke(VALUES) == answer
        assert "".join(chain.stream(VALUES)) == answer
        assert chain.batch([VALUES, VALUES]) == [answer] * 2
        assert await chain.ainvoke(VALUES) == answer

    def test_llama_index(self, llm: RapidLLM, answer: str) -> None:
        assert llm.complete(PROMPT).text == answer
        *_, last = llm.stream_complete(PROMPT)
        assert last.text == answer
        assert llm.chat(CHAT).message.content == answer
        *_, last_message = llm.stream_chat(CHAT)
        assert last_message.message.content == answer
        assert llm.predict(LLAMA_TEMPLATE, **LLAMA_VALUES) == answer
        assert "".join(llm.stream(LLAMA_TEMPLATE, **LLAMA_VALUES)) == answer

    async def test_llama_index_async(self, llm: RapidLLM, answer: str) -> None:
        assert (await llm.acomplete(PROMPT)).text == answer
        assert "".join([r.delta async for r in await llm.astream_complete(PROMPT)]) == answer
        assert (await llm.achat(CHAT)).message.content == answer
        assert "".join([r.delta async for r in await llm.astream_chat(CHAT)]) == answer
        assert await llm.apredict(LLAMA_TEMPLATE, **LLAMA_VALUES) == answer
        assert "".join([token async for token in await llm.astream(LLAMA_TEMPLATE, **LLAMA_VALUES)]) == answer

    @pytest.mark.usefixtures("settings")
    async def test_llama_index_query_engine(self, llm: RapidLLM, answer: str) -> None:
        assert Settings.llm is llm
        index = SummaryIndex([TextNode(text=DOCUMENT.text)])
        for arguments in ({}, {"llm": llm}):
            engine = index.as_query_engine(text_qa_template=LLAMA_TEMPLATE, **arguments)
            assert str(engine.query(QUESTION.question)) == answer
            assert str(await engine.aquery(QUESTION.question)) == answer
        streaming = index.as_query_engine(text_qa_template=LLAMA_TEMPLATE, streaming=True)
        assert "".join(streaming.query(QUESTION.question).response_gen) == answer

    def test_threads_share_one_engine(self, llm: RapidLLM, answer: str) -> None:
        others = [llm, RapidLLM.demo(), pickle.loads(pickle.dumps(llm)), llm.model_copy(deep=True)]
        with ThreadPoolExecutor(len(others)) as pool:
            assert list(pool.map(lambda other: other.invoke(PROMPT), others)) == [answer] * len(others)
        assert {other.pipeline.engine for other in others} == {llm.pipeline.engine}

    @pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
    def test_an_llm_rebuilt_from_its_configuration_answers_alike(self, llm: RapidLLM, answer: str) -> None:
        again = loads(dumps(llm), allowed_objects=[RapidLLM], valid_namespaces=["rapid_integrations"])
        assert again.invoke(PROMPT) == answer
        assert RapidLLM.from_dict(llm.to_dict()).complete(PROMPT).text == answer

    def test_loaded_models_answer_alike(self, answer: str) -> None:
        target, drafter = (
            AutoModelForCausalLM.from_pretrained(path, dtype="float32")
            for path in (demo.TARGET_PATH, demo.DRAFTER_PATH)
        )
        tokenizer = AutoTokenizer.from_pretrained(demo.TARGET_PATH)
        llm = RapidLLM.from_pretrained(target, drafter, tokenizer=tokenizer, **demo.OPTIONS)
        assert llm.invoke(PROMPT) == answer
        copied = copy.deepcopy(llm)
        assert copied.pipeline is llm.pipeline
        assert copied.complete(PROMPT).text == answer
        assert "JSON cannot hold" in dumpd(llm)["repr"]
        with pytest.raises(ConfigurationError, match="carries no weights"):
            pickle.dumps(llm)

    async def test_a_seed_gives_the_same_draws_everywhere(self, llm: RapidLLM) -> None:
        draws = {"temperature": 5.0, "seed": 5, "transfer_strength": 0.0, "max_new_tokens": 24}
        expected = llm.invoke(PROMPT, **draws)
        assert expected != llm.invoke(PROMPT, **{**draws, "seed": 6})
        assert llm.complete(PROMPT, **draws).text == expected
        assert await llm.ainvoke(PROMPT, **draws) == expected
        assert (await llm.achat(CHAT, **draws)).message.content == expected
        assert llm.batch([PROMPT, PROMPT], **draws) == [expected, expected]


class TestBehaviour:
    async def test_the_event_loop_is_not_blocked(self, llm: RapidLLM) -> None:
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: llm.ainvoke(PROMPT),
            lambda: llm.abatch([PROMPT, PROMPT]),
            lambda: llm.acomplete(PROMPT),
            lambda: llm.achat(CHAT),
            lambda: llm.apredict(LLAMA_TEMPLATE, **LLAMA_VALUES),
        ]
        for call in calls:
            async with ticking() as ticks:
                await call()
                assert ticks() > 0

    def test_a_closed_stream_ends_its_request(self, llm: RapidLLM) -> None:
        for stream in (llm.stream(PROMPT, **ENDLESS), llm.stream_complete(PROMPT, **ENDLESS)):
            next(stream)
            assert llm.pipeline.engine.num_running == 1
            stream.close()
            del stream
            wait_until_idle(llm)

    async def test_an_abandoned_async_stream_ends_its_request(self, llm: RapidLLM, answer: str) -> None:
        for stream in (llm.astream(PROMPT, **ENDLESS), await llm.astream_complete(PROMPT, **ENDLESS)):
            await anext(stream)
            await stream.aclose()
        del stream
        await asyncio.sleep(0.01)  # the loop finalizes abandoned generators
        await asyncio.to_thread(wait_until_idle, llm)
        assert await llm.ainvoke(PROMPT) == answer

    async def test_a_cancelled_task_ends_its_request(self, llm: RapidLLM) -> None:
        for call in (llm.ainvoke, llm.acomplete):
            task = asyncio.ensure_future(call(PROMPT, **ENDLESS))
            while llm.pipeline.engine.num_running == 0:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(wait_until_idle, llm)

    async def test_stop_and_length(self, llm: RapidLLM, answer: str) -> None:
        words = answer.split()
        stop = f" {words[len(words) // 2]}"
        expected = answer[: answer.index(stop)]
        assert llm.invoke(PROMPT, stop=[stop]) == expected
        assert "".join(llm.stream(PROMPT, stop=[stop])) == expected
        assert await llm.ainvoke(PROMPT, stop=[stop]) == expected
        assert llm.complete(PROMPT, stop=[stop]).text == expected
        assert llm.chat(CHAT, stop=stop).message.content == expected
        assert llm.complete(PROMPT, stop=[stop]).raw["finish_reason"] == "stop"
        short = llm.complete(PROMPT, max_tokens=3)
        assert short.raw["finish_reason"] == "length"
        assert short.raw["usage"]["completion_tokens"] == 3
        assert answer.startswith(short.text)
        assert llm.complete(PROMPT).raw["finish_reason"] == "stop"

    def test_a_context_given_apart_is_read(self, llm: RapidLLM) -> None:
        stats = llm.complete(QUESTION.question, context=DOCUMENT.text).raw["rapid"]
        assert stats["prompt_tokens"] > llm.get_num_tokens(DOCUMENT.text)
        assert stats["retriever"] == "bm25"
        assert all(chunk["text"] in DOCUMENT.text for chunk in stats["retrieved_chunks"])

    def test_usage_counts_the_prompt_as_it_was_read(self, llm: RapidLLM) -> None:
        usage = llm.complete(PROMPT).raw["usage"]
        assert usage["prompt_tokens"] == llm.get_num_tokens_from_messages([HumanMessage(PROMPT)])
        assert usage["prompt_tokens"] > llm.get_num_tokens(DOCUMENT.text)
        *_, last = llm.generate([PROMPT]).generations[0]
        assert last.generation_info["token_usage"] == usage

    async def test_a_prompt_that_does_not_fit_fails_alone(self, llm: RapidLLM, answer: str) -> None:
        endless = PROMPT_TEMPLATE.format(
            context="a " * (llm.metadata.context_window + 1), question=QUESTION.question
        )
        with pytest.raises(ContextLengthError):
            llm.invoke(endless)
        with pytest.raises(ContextLengthError):
            await llm.acomplete(endless)
        answers = llm.batch([PROMPT, endless, PROMPT], return_exceptions=True)
        assert [answers[0], answers[2]] == [answer, answer]
        assert isinstance(answers[1], ContextLengthError)


SENTENCES = [sentence + "." for sentence in DOCUMENT.text.split(". ") if len(sentence.split()) > 4]
EVIDENCE = [DOCUMENT.text[start:end] for start, end in QUESTION.evidence]


class EvidenceRetriever(LangChainRetriever):
    """Returns the evidence for the question, and records its queries."""

    asked: list[str] = Field(default_factory=list)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[LangChainDocument]:
        self.asked.append(query)
        return [LangChainDocument(page_content=sentence) for sentence in EVIDENCE]


class TestHostRetrievers:
    """The drafter's context comes from the framework's retriever; the target gets the whole document."""

    def check(self, llm: RapidLLM, stats: dict[str, Any], found: set[str]) -> None:
        assert found
        assert {chunk["text"] for chunk in stats["retrieved_chunks"]} == found
        assert stats["retrieval_fallback"] is None
        document_tokens = llm.get_num_tokens(DOCUMENT.text)
        assert stats["prompt_tokens"] > document_tokens
        found_tokens = sum(llm.get_num_tokens(text) for text in found)
        assert found_tokens < stats["drafter_prompt_tokens"] < found_tokens + document_tokens / 2

    @pytest.mark.parametrize("where", ["constructor", "call"])
    def test_a_langchain_retriever(self, llm: RapidLLM, where: str) -> None:
        retriever = EvidenceRetriever()
        own = RapidLLM.demo(retriever=retriever) if where == "constructor" else llm.bind(retriever=retriever)
        runs: list[Any] = []
        chain = RapidPromptTemplate.from_template(PROMPT_TEMPLATE) | own
        assert chain.with_listeners(on_end=runs.append).invoke(VALUES)
        assert retriever.asked == [QUESTION.question]
        (llm_run,) = [run for run in runs[0].child_runs if run.run_type == "llm"]
        info = llm_run.outputs["generations"][0][0]["generation_info"]
        self.check(llm, info["rapid"], set(EVIDENCE))

    @pytest.mark.usefixtures("settings")
    @pytest.mark.parametrize("where", ["constructor", "call"])
    async def test_a_llama_index_retriever(self, llm: RapidLLM, where: str) -> None:
        index = VectorStoreIndex([TextNode(text=sentence) for sentence in SENTENCES[:8]])
        retriever = index.as_retriever(similarity_top_k=3)
        found = {node.node.get_content() for node in retriever.retrieve(QUESTION.question)}
        assert len(found) == 3
        own = RapidLLM.demo(retriever=retriever) if where == "constructor" else llm
        arguments = {} if where == "constructor" else {"retriever": retriever}
        self.check(llm, own.complete(PROMPT, **arguments).raw["rapid"], found)
        self.check(llm, (await own.achat(CHAT, **arguments)).raw["rapid"], found)

    def test_a_function(self, llm: RapidLLM) -> None:
        response = llm.complete(PROMPT, retriever=lambda query: EVIDENCE)
        self.check(llm, response.raw["rapid"], set(EVIDENCE))

    def test_a_retriever_that_fails_does_not_fail_the_answer(self, llm: RapidLLM) -> None:
        def broken(query: str) -> list[str]:
            raise OSError("the index is gone")

        response = llm.complete(PROMPT, retriever=broken)
        assert response.text
        assert "the index is gone" in response.raw["rapid"]["retrieval_fallback"]
