"""create_rapid_chain: whole documents to the target, what a retriever finds to the drafter."""

import asyncio
from functools import reduce
from operator import add
from typing import Any

import pytest
from helpers.fake_pipeline import PEOPLE, FakePipeline
from helpers.fake_pipeline import PEOPLE_QUESTION as QUESTION
from helpers.fake_pipeline import PEOPLE_TEXT as TEXT
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import Field

from rapid_integrations import (
    ChatRapid,
    ConfigurationError,
    ContextLengthError,
    GenerationError,
    PromptError,
    RapidLLM,
    RapidPromptTemplate,
    create_rapid_chain,
)
from rapid_integrations.events import Completion
from rapid_integrations.retrieval import Chunk
from rapid_integrations.retrieval.lexical import LexicalIndex

FOUND = [Document(text, metadata={"line": i}) for i, text in enumerate(PEOPLE)]


class FailsAlways(FakePipeline):
    """Retrieves, but does not answer."""

    def answer(self, parts: Any, options: Any) -> str:
        raise GenerationError("out of luck")


class Finds(BaseRetriever):
    found: list[Document]
    asked: list[str] = Field(default_factory=list)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        self.asked.append(query)
        return self.found


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def llm(pipeline: FakePipeline) -> RapidLLM:
    return RapidLLM(pipeline)


@pytest.fixture
def retriever() -> Finds:
    return Finds(found=[FOUND[2], FOUND[1]])


class TestAnswers:
    async def test_every_way_to_ask(self, llm: RapidLLM, pipeline: FakePipeline, retriever: Finds) -> None:
        chain = create_rapid_chain(llm, retriever, documents=TEXT)
        output = chain.invoke(QUESTION)
        assert list(output) == ["question", "context", "answer", "stats"]
        assert output["question"] == QUESTION
        assert output["answer"].startswith(f"{QUESTION} read {len(TEXT)} characters")
        assert output["context"] == [FOUND[1], FOUND[2]]  # in document order
        assert output["stats"]["retriever"] == "Finds"
        assert output["stats"]["retrieval_fallback"] is None

        def alike(other: dict[str, Any]) -> bool:
            return all(other[name] == output[name] for name in ("question", "context", "answer"))

        assert alike(await chain.ainvoke(QUESTION))
        assert all(map(alike, chain.batch([QUESTION, QUESTION])))
        assert all(map(alike, await chain.abatch([QUESTION, QUESTION])))
        chunks = list(chain.stream(QUESTION))
        assert [next(iter(chunk)) for chunk in chunks][:3] == ["question", "context", "answer"]
        assert sum("answer" in chunk for chunk in chunks) > 5
        assert list(chunks[-1]) == ["stats"]
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole = whole + chunk
        assert alike(whole)
        achunks = [chunk async for chunk in chain.astream(QUESTION)]
        assert [list(chunk) for chunk in achunks] == [list(chunk) for chunk in chunks]
        assert set(retriever.asked) == {QUESTION}
        for request in pipeline.requests:
            assert (request.parts.query, request.parts.context) == (QUESTION, TEXT)

    @pytest.mark.parametrize("name", ["question", "input", "query"])
    def test_the_question_keeps_its_name(self, llm: RapidLLM, name: str) -> None:
        output = create_rapid_chain(llm, documents=TEXT).invoke({name: QUESTION})
        assert output[name] == QUESTION
        assert list(output) == [name, "context", "answer", "stats"]

    @pytest.mark.parametrize("name", ["documents", "context"])
    def test_documents_of_the_input(self, llm: RapidLLM, pipeline: FakePipeline, name: str) -> None:
        chain = create_rapid_chain(llm, documents="Another document.")
        chain.invoke({"question": QUESTION, name: FOUND})
        assert pipeline.requests[-1].parts.context == "\n\n".join(PEOPLE)
        create_rapid_chain(llm).invoke({"question": QUESTION, name: TEXT})
        assert pipeline.requests[-1].parts.context == TEXT

    def test_errors_come_out(self, retriever: Finds) -> None:
        chain = create_rapid_chain(RapidLLM(FakePipeline(max_prompt_chars=10)), retriever, documents=TEXT)
        with pytest.raises(ContextLengthError):
            chain.invoke(QUESTION)
        with pytest.raises(ContextLengthError):
            asyncio.run(chain.ainvoke(QUESTION))

    async def test_closing_a_stream_cancels_the_request(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        chain = create_rapid_chain(llm, documents=TEXT)
        stream = chain.stream(QUESTION)
        for chunk in stream:
            if "answer" in chunk:
                break
        stream.close()
        assert (pipeline.finished, pipeline.cancelled) == (0, 1)
        astream = chain.astream(QUESTION)
        async for chunk in astream:
            if "answer" in chunk:
                break
        await astream.aclose()
        for _ in range(10_000):  # the loop finalizes abandoned generators
            if pipeline.cancelled == 2:
                break
            await asyncio.sleep(0.001)
        assert (pipeline.finished, pipeline.cancelled) == (0, 2)

    def test_what_is_not_allowed(self, llm: RapidLLM) -> None:
        with pytest.raises(
            ConfigurationError, match="FakeListLLM: create_rapid_chain needs a RapidLLM or a ChatRapid"
        ):
            create_rapid_chain(FakeListLLM(responses=["no"]), documents=TEXT)
        with pytest.raises(ConfigurationError, match="retriever='bm25' is not allowed"):
            create_rapid_chain(llm, "bm25", documents=TEXT)
        chain = create_rapid_chain(llm)
        for wrong in (QUESTION, {"question": QUESTION}, {"question": QUESTION, "documents": [" "]}):
            with pytest.raises(PromptError, match="there is no document to read"):
                chain.invoke(wrong)
        for empty in ([], "", ()):  # which is no reason to read something else
            with pytest.raises(PromptError, match="there is no document to read"):
                create_rapid_chain(llm, documents=TEXT).invoke({"question": QUESTION, "documents": empty})
        for bound in ({"query": "Who?"}, {"context": TEXT}):
            with pytest.raises(ConfigurationError, match=r"(query|context) is bound to the llm"):
                create_rapid_chain(llm.bind(**bound), documents=TEXT)
        with pytest.raises(ConfigurationError, match="on_event=3 is not allowed"):
            create_rapid_chain(llm.bind(on_event=3), documents=TEXT)
        with pytest.raises(PromptError, match="the input has documents: the question is missing"):
            chain.invoke({"documents": TEXT})
        with pytest.raises(PromptError, match=r"the input is a builtins\.int"):
            chain.invoke(3)


class TestSources:
    def test_without_a_retriever_they_are_pieces_of_the_documents(self, llm: RapidLLM) -> None:
        words = " ".join(f"word{i}" for i in range(60))
        grace = Document("Grace keeps it.", metadata={"file": "b"})
        documents = [Document(words, metadata={"file": "a"}), grace]
        options = {"retrieval_chunk_tokens": 60, "retrieval_min_tokens": 4, "retrieval_max_tokens": 4}
        chain = create_rapid_chain(llm.bind(**options), documents=documents)
        (source,) = chain.invoke("Who is Grace?")["context"]
        assert source == Document("Grace keeps it.", metadata={"file": "b", "start_index": 0})

    @pytest.mark.parametrize(
        ("found", "reason"),
        [(lambda query: [], "found nothing"), (lambda query: 1 / 0, "ZeroDivisionError")],
        ids=["nothing", "raises"],
    )
    def test_a_retriever_that_gives_nothing(self, llm: RapidLLM, found: Any, reason: str) -> None:
        for retriever in (found, RunnableLambda(found)):
            output = create_rapid_chain(llm, retriever, documents=TEXT).invoke(QUESTION)
            assert output["context"] == [Document(TEXT, metadata={"start_index": 0})]
            assert reason in output["stats"]["retrieval_fallback"]

    def test_whatever_retrieves(self, llm: RapidLLM) -> None:
        store = InMemoryVectorStore.from_texts(list(PEOPLE), DeterministicFakeEmbedding(size=8))
        (document,) = FOUND[1:2]
        piece = Document(PEOPLE[1], metadata={"start_index": TEXT.index(PEOPLE[1])})
        for retriever, expected in (
            (store.as_retriever(search_kwargs={"k": 3}), {*PEOPLE}),
            (store, {*PEOPLE}),
            (RunnableLambda(lambda query: [document]), [document]),
            (lambda query: [document], [document]),
            (lambda query: [(document, 0.5)], [Document(PEOPLE[1])]),
            (lambda query: [PEOPLE[1]], [Document(PEOPLE[1])]),
            (lambda query: [NodeWithScore(node=TextNode(text=PEOPLE[1], metadata={"n": 1}))],
             [Document(PEOPLE[1], metadata={"n": 1})]),
            (lambda query: iter([PEOPLE[1]]), [Document(PEOPLE[1])]),
            (LexicalIndex([Chunk(PEOPLE[1])]), [piece]),
        ):  # fmt: skip
            sources = create_rapid_chain(llm, retriever, documents=TEXT).invoke(QUESTION)["context"]
            if isinstance(expected, set):
                assert {source.page_content for source in sources} == expected
                assert all(source.id for source in sources)  # the store's own
            else:
                assert [(s.page_content, s.metadata) for s in sources] == [
                    (e.page_content, e.metadata) for e in expected
                ]

    def test_the_llm_s_own_retriever(self, pipeline: FakePipeline, retriever: Finds) -> None:
        llm = RapidLLM(pipeline, retriever=retriever)
        assert create_rapid_chain(llm, documents=TEXT).invoke(QUESTION)["context"] == [FOUND[1], FOUND[2]]

    @pytest.mark.parametrize("face", [RapidLLM, ChatRapid])
    def test_what_is_bound_to_the_llm(self, pipeline: FakePipeline, retriever: Finds, face: Any) -> None:
        heard: list[Any] = []
        llm = face(pipeline, retriever=lambda query: [PEOPLE[0]])
        bound = llm.bind(retriever=lambda query: [], on_event=heard.append).bind(retriever=retriever)
        output = create_rapid_chain(bound.with_retry(), documents=TEXT).invoke(QUESTION)
        assert output["context"] == [FOUND[1], FOUND[2]]
        assert [chunk.text for chunk in heard[0].chunks] == [PEOPLE[1], PEOPLE[2]]
        assert heard[-1].text == output["answer"]
        output = create_rapid_chain(bound, lambda query: FOUND[:1], documents=TEXT).invoke(QUESTION)
        assert output["context"] == FOUND[:1]

    @pytest.mark.parametrize("face", [RapidLLM, ChatRapid])
    @pytest.mark.parametrize("how", [{}, {"disable_streaming": True}, {"streaming": False}])
    async def test_an_answer_that_a_cache_has(
        self, pipeline: FakePipeline, retriever: Finds, face: Any, how: dict[str, Any]
    ) -> None:
        llm = face(pipeline, cache=InMemoryCache(), **(how if face is ChatRapid else {}))
        chain = create_rapid_chain(llm, retriever, documents=TEXT)
        first = chain.invoke(QUESTION)
        for again in (chain.invoke(QUESTION), await chain.ainvoke(QUESTION)):
            assert again["context"] == [FOUND[1], FOUND[2]]
            assert again["answer"] == first["answer"]

    def test_concurrent_questions_keep_their_own(self, llm: RapidLLM) -> None:
        chain = create_rapid_chain(llm, lambda query: [Document(query)], documents=TEXT)
        questions = [f"Who is number {i}?" for i in range(8)]
        outputs = chain.batch(questions)
        assert [output["context"] for output in outputs] == [[Document(question)] for question in questions]


class FailsOnce(FakePipeline):
    """Fails each question once, after it has retrieved."""

    def answer(self, parts: Any, options: Any) -> str:
        if len(self.requests) % 2:
            raise GenerationError("out of luck")
        return super().answer(parts, options)


async def all_outputs(chain: Any, question: Any = QUESTION) -> list[dict[str, Any]]:
    """What the four ways to ask give, streams added up."""
    streamed = reduce(add, chain.stream(question))
    return [
        chain.invoke(question),
        await chain.ainvoke(question),
        streamed,
        reduce(add, [chunk async for chunk in chain.astream(question)]),
    ]


class TestWrappedLlms:
    @pytest.mark.parametrize("face", [RapidLLM, ChatRapid])
    async def test_a_retry(self, retriever: Finds, face: Any) -> None:
        pipeline = FailsOnce()
        retrying = face(pipeline).with_retry(stop_after_attempt=2, wait_exponential_jitter=False)
        chain = create_rapid_chain(retrying, retriever, documents=TEXT)
        for output in (chain.invoke(QUESTION), await chain.ainvoke(QUESTION), *chain.batch([QUESTION])):
            assert output["context"] == [FOUND[1], FOUND[2]]
            assert output["answer"].startswith(QUESTION)
        assert len(pipeline.requests) == 6
        with pytest.raises(GenerationError, match="out of luck"):  # LangChain retries no stream
            list(chain.stream(QUESTION))

    @pytest.mark.parametrize("face", [RapidLLM, ChatRapid])
    async def test_fallbacks_of_ours_read_what_they_find(self, retriever: Finds, face: Any) -> None:
        heard: list[Any] = []
        own = face(FakePipeline(), retriever=lambda query: FOUND[:1]).bind(on_event=heard.append)
        failing = face(FailsAlways(), retriever=retriever)
        for output in await all_outputs(create_rapid_chain(failing.with_fallbacks([own]), documents=TEXT)):
            assert output["context"] == FOUND[:1]
            assert output["answer"].startswith(QUESTION)
            assert output["stats"]["retriever"] == "<lambda>"
        assert len(retriever.asked) == sum(isinstance(event, Completion) for event in heard) == 4
        for first in (failing, face(FakePipeline(max_prompt_chars=10))):
            chain = create_rapid_chain(first.with_fallbacks([own]), retriever, documents=TEXT)
            for output in await all_outputs(chain):
                assert output["context"] == [FOUND[1], FOUND[2]]

    def test_a_fallback_that_drafts_nothing_has_no_sources(self, llm: RapidLLM, retriever: Finds) -> None:
        class DraftsNothing(FakePipeline):
            def _events(self, *args: Any) -> Any:
                _, *rest = super()._events(*args)  # what was retrieved
                yield from rest

        plain = RapidLLM(FailsAlways()).with_fallbacks([RapidLLM(DraftsNothing())])
        output = create_rapid_chain(plain, retriever, documents=TEXT).invoke(QUESTION)
        assert (output["context"], output["stats"]["retriever"]) == ([], "Finds")

    @pytest.mark.parametrize("other", [FakeListLLM, FakeListChatModel])
    async def test_a_fallback_of_another_kind_reads_the_prompt(self, retriever: Finds, other: Any) -> None:
        prompts: list[str] = []

        def note(value: Any) -> Any:
            prompts.append(value.to_string())
            return value

        other_llm = RunnableLambda(note) | other(responses=["Grace."])
        failing = RapidLLM(FailsAlways(), temperature=0.5)
        llm = failing.with_fallbacks([other_llm]).bind(retriever=retriever, on_event=lambda event: None)
        for output in await all_outputs(create_rapid_chain(llm, documents=TEXT)):
            assert output == {"question": QUESTION, "context": [], "answer": "Grace.", "stats": None}
        assert len(retriever.asked) == 4
        assert prompts == [f"Context:\n{TEXT}\n\nQuestion: {QUESTION}\nAnswer:"] * 4

    async def test_configurable_fields(self, llm: RapidLLM, retriever: Finds) -> None:
        field = ConfigurableField(id="t")
        configurable = llm.configurable_fields(temperature=field)
        chain = create_rapid_chain(configurable, retriever, documents=TEXT)
        assert [spec.id for spec in chain.config_specs] == ["t"]
        assert "temperature 0.0" in chain.invoke(QUESTION)["answer"]
        warm = create_rapid_chain(
            configurable.with_config(configurable={"t": 0.5}), retriever, documents=TEXT
        )
        for configured in (chain.with_config(configurable={"t": 0.5}), warm):
            for output in await all_outputs(configured):
                assert "temperature 0.5" in output["answer"]
                assert output["context"] == [FOUND[1], FOUND[2]]

    async def test_configurable_alternatives(self, llm: RapidLLM, retriever: Finds) -> None:
        other = RapidLLM(FakePipeline(name="other"), retriever=retriever)
        warm = other.configurable_fields(temperature=ConfigurableField(id="t"))
        choice = llm.configurable_alternatives(
            ConfigurableField(id="llm"),
            default_key="one",
            prefix_keys=True,
            other=warm.with_retry(),
            foreign=FakeListLLM(responses=["no"]),
        )
        chain = create_rapid_chain(choice.bind(seed=1), documents=TEXT)
        assert chain.invoke(QUESTION)["context"] == [Document(TEXT, metadata={"start_index": 0})]
        config = {"llm": "other", "llm==other/t": 0.5}
        for output in await all_outputs(chain.with_config(configurable=config)):
            assert output["context"] == [FOUND[1], FOUND[2]]
            assert "temperature 0.5" in output["answer"]
        with pytest.raises(ConfigurationError, match=r"llm is .*FakeListLLM: create_rapid_chain needs"):
            chain.invoke(QUESTION, {"configurable": {"llm": "foreign"}})

    def test_what_is_not_allowed_inside(self, llm: RapidLLM) -> None:
        other = FakeListLLM(responses=["no"])
        with pytest.raises(ConfigurationError, match="FakeListLLM: create_rapid_chain needs"):
            create_rapid_chain(other.with_fallbacks([llm]), documents=TEXT)
        with pytest.raises(ConfigurationError, match="query is bound to the llm"):
            create_rapid_chain(llm.with_fallbacks([llm.bind(query="Who?")]), documents=TEXT)
        with pytest.raises(ConfigurationError, match="a call does not take temprature"):
            create_rapid_chain(llm.with_fallbacks([llm.bind(temprature=1)]), documents=TEXT)
        with pytest.raises(ConfigurationError, match="retriever='bm25' is not allowed"):
            create_rapid_chain(llm.with_fallbacks([other]).bind(retriever="bm25"), documents=TEXT)


class TestPrompts:
    @pytest.mark.parametrize("template", [PromptTemplate, RapidPromptTemplate, ChatPromptTemplate])
    def test_own_prompts(
        self, llm: RapidLLM, pipeline: FakePipeline, retriever: Finds, template: Any
    ) -> None:
        prompt = template.from_template("In {tone} words, from {context}, answer {input}!")
        chain = create_rapid_chain(llm, retriever, documents=TEXT, prompt=prompt)
        chain.invoke({"question": QUESTION, "tone": "few"})
        parts = pipeline.requests[-1].parts
        assert parts.text == f"In few words, from {TEXT}, answer {QUESTION}!"
        assert (parts.query, parts.context) == (QUESTION, TEXT)
        assert retriever.asked == [QUESTION]

    def test_a_conversation(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        chain = create_rapid_chain(llm, documents=TEXT)
        history = [HumanMessage("Who is Ada?"), AIMessage("The harbour master.")]
        chain.invoke({"input": QUESTION, "chat_history": history})
        chain.invoke({"input": "Who is Ada?", "chat_history": []})
        longer, first = (request.parts for request in pipeline.requests)
        assert [message.role for message in longer.messages] == ["user", "assistant", "user"]
        assert longer.messages[0].text == first.messages[0].text
        assert longer.messages[0].text == f"Context:\n{TEXT}\n\nQuestion: Who is Ada?\nAnswer:"
        assert longer.messages[2].text == QUESTION
        assert (longer.query, longer.context) == (QUESTION, TEXT)

    def test_what_is_no_conversation(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        chain = create_rapid_chain(llm, documents=TEXT)
        for wrong in ("Human: Who is Ada?", HumanMessage("Who is Ada?"), 3):
            with pytest.raises(PromptError, match=r"chat_history is .*: give a list of messages"):
                chain.invoke({"question": QUESTION, "chat_history": wrong})
        assert pipeline.requests == []
        chain.invoke({"question": QUESTION, "chat_history": None})
        chain.invoke(QUESTION)
        assert pipeline.requests[0].parts == pipeline.requests[1].parts
        text = RapidPromptTemplate.from_template("{context} {chat_history} {question}")
        chain = create_rapid_chain(llm, documents=TEXT, prompt=text)
        chain.invoke({"question": QUESTION, "chat_history": "Human: Hi"})
        assert pipeline.requests[-1].parts.text == f"{TEXT} Human: Hi {QUESTION}"

    def test_a_conversation_in_a_prompt_with_a_place_for_it(
        self, llm: RapidLLM, pipeline: FakePipeline
    ) -> None:
        prompt = ChatPromptTemplate.from_messages(
            [
                ("system", "Read {context}"),
                MessagesPlaceholder("chat_history", optional=True),
                ("user", "{input}"),
            ]
        )
        chain = create_rapid_chain(llm, documents=TEXT, prompt=prompt)
        chain.invoke({"input": QUESTION, "chat_history": [("user", "Hello"), ("ai", "Hello.")]})
        chain.invoke(QUESTION)
        longer, shorter = (request.parts for request in pipeline.requests)
        assert [m.role for m in longer.messages] == ["system", "user", "assistant", "user"]
        assert [m.role for m in shorter.messages] == ["system", "user"]
        for parts in (longer, shorter):
            assert (parts.query, parts.context) == (QUESTION, TEXT)
        placeless = ChatPromptTemplate.from_template("Read {context} {input}")
        chain = create_rapid_chain(llm, documents=TEXT, prompt=placeless)
        assert chain.invoke(QUESTION)["answer"]
        with pytest.raises(PromptError, match="the chat prompt has no placeholder for it"):
            chain.invoke({"input": QUESTION, "chat_history": []})

    # To be replaced by the persistence of langgraph; until then it is what chains have.
    @pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning")
    def test_message_history(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
        histories: dict[str, InMemoryChatMessageHistory] = {}
        chat = RunnableWithMessageHistory(
            create_rapid_chain(llm, documents=TEXT),
            lambda session_id: histories.setdefault(session_id, InMemoryChatMessageHistory()),
            input_messages_key="question",
            history_messages_key="chat_history",
            output_messages_key="answer",
        )
        config = {"configurable": {"session_id": "one"}}
        first = chat.invoke({"question": "Who is Ada?"}, config)
        chat.invoke({"question": QUESTION}, config)
        messages = pipeline.requests[-1].parts.messages
        assert [m.role for m in messages] == ["user", "assistant", "user"]
        assert messages[1].text == first["answer"]
        assert pipeline.requests[-1].parts.query == QUESTION


class TestComposition:
    async def test_it_is_a_runnable_like_others(self, llm: RapidLLM, retriever: Finds) -> None:
        chain = create_rapid_chain(llm, retriever, documents=TEXT)
        assert (chain | RunnableLambda(lambda output: len(output["context"]))).invoke(QUESTION) == 2
        asking = {"question": RunnablePassthrough()} | chain.pick(["answer", "context"])
        assert set(asking.invoke(QUESTION)) == {"answer", "context"}
        assert "".join(chain.pick("answer").stream(QUESTION)) == asking.invoke(QUESTION)["answer"]
        both = RunnableParallel(first=chain, second=chain).invoke(QUESTION)
        assert both["first"]["answer"] == both["second"]["answer"]
        assert chain.with_config(run_name="mine").invoke(QUESTION)["context"] == [FOUND[1], FOUND[2]]
        assert await (RunnablePassthrough() | chain).ainvoke(QUESTION)

    def test_options_and_retries_around_the_llm(self, llm: RapidLLM, retriever: Finds) -> None:
        for own in (llm.bind(temperature=0.5), llm.with_retry(), llm.with_config(tags=["t"])):
            output = create_rapid_chain(own, retriever, documents=TEXT).invoke(QUESTION)
            assert output["context"] == [FOUND[1], FOUND[2]]
        output = create_rapid_chain(llm.bind(temperature=0.5), documents=TEXT).invoke(QUESTION)
        assert "temperature 0.5" in output["answer"]

    def test_runs_are_one_tree(self, llm: RapidLLM, retriever: Finds) -> None:
        runs: list[Any] = []
        chain = create_rapid_chain(llm, retriever, documents=TEXT).with_listeners(on_end=runs.append)
        chain.invoke(QUESTION)
        (root,) = runs
        assert root.name == "rapid_chain"

        def below(run: Any) -> list[tuple[str, str]]:
            return [
                entry for child in run.child_runs for entry in [(child.run_type, child.name), *below(child)]
            ]

        runs_below = below(root)
        assert ("retriever", "Finds") in runs_below
        assert ("llm", "RapidLLM") in runs_below
        assert ("prompt", "RapidPromptTemplate") in runs_below

    async def test_stream_events(self, llm: RapidLLM, retriever: Finds) -> None:
        chain = create_rapid_chain(llm, retriever, documents=TEXT)
        events = [event async for event in chain.astream_events(QUESTION, version="v2")]
        names = [event["event"] for event in events]
        assert names.count("on_retriever_end") == names.count("on_llm_end") == 1
        assert names.count("on_llm_stream") > 5
        (end,) = [e for e in events if e["event"] == "on_chain_end" and e["name"] == "rapid_chain"]
        assert end["data"]["output"]["context"] == [FOUND[1], FOUND[2]]

    async def test_the_event_loop_ticks_while_it_answers(self, llm: RapidLLM, retriever: Finds) -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        await create_rapid_chain(llm, retriever, documents=TEXT).ainvoke(QUESTION)
        ticking.cancel()
        assert ticks > 5
