import asyncio
from typing import Any

import pytest
from helpers.asynchronous import collect, ticks_during
from helpers.fake_pipeline import PEOPLE, FakePipeline
from helpers.fake_pipeline import PEOPLE_QUESTION as QUESTION
from helpers.fake_pipeline import PEOPLE_TEXT as TEXT
from helpers.langchain_calls import PEOPLE_DOCUMENTS, RecordingRetriever, total
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.language_models import FakeListLLM
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_core.runnables.history import RunnableWithMessageHistory

from rapid_integrations import (
    ConfigurationError,
    ContextLengthError,
    PromptError,
    RapidLLM,
    RapidPromptTemplate,
    create_rapid_chain,
)


class TestAnswers:
    async def test_every_entry_point_gives_the_same_output(
        self, llm: RapidLLM, pipeline: FakePipeline, retriever: RecordingRetriever
    ) -> None:
        chain = create_rapid_chain(llm, retriever, documents=TEXT)
        output = chain.invoke(QUESTION)
        assert list(output) == ["question", "context", "answer", "stats"]
        assert output["question"] == QUESTION
        assert output["answer"].startswith(f"{QUESTION} read {len(TEXT)} characters")
        assert output["context"] == [PEOPLE_DOCUMENTS[1], PEOPLE_DOCUMENTS[2]]  # in document order
        assert output["stats"]["retriever"] == "RecordingRetriever"
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
        assert alike(total(chunks))
        achunks = await collect(chain.astream(QUESTION))
        assert [list(chunk) for chunk in achunks] == [list(chunk) for chunk in chunks]
        assert set(retriever.questions) == {QUESTION}
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
        chain.invoke({"question": QUESTION, name: PEOPLE_DOCUMENTS})
        assert pipeline.requests[-1].parts.context == "\n\n".join(PEOPLE)
        create_rapid_chain(llm).invoke({"question": QUESTION, name: TEXT})
        assert pipeline.requests[-1].parts.context == TEXT

    def test_errors_of_the_llm_are_raised(self, retriever: RecordingRetriever) -> None:
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

    def test_errors_of_arguments_and_inputs(self, llm: RapidLLM) -> None:
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
        for empty in ([], "", ()):  # the chain's own documents do not replace them
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


class TestPrompts:
    @pytest.mark.parametrize("template", [PromptTemplate, RapidPromptTemplate, ChatPromptTemplate])
    def test_a_given_prompt(
        self, llm: RapidLLM, pipeline: FakePipeline, retriever: RecordingRetriever, template: Any
    ) -> None:
        prompt = template.from_template("In {tone} words, from {context}, answer {input}!")
        chain = create_rapid_chain(llm, retriever, documents=TEXT, prompt=prompt)
        chain.invoke({"question": QUESTION, "tone": "few"})
        parts = pipeline.requests[-1].parts
        assert parts.text == f"In few words, from {TEXT}, answer {QUESTION}!"
        assert (parts.query, parts.context) == (QUESTION, TEXT)
        assert retriever.questions == [QUESTION]

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

    def test_histories_that_are_not_messages(self, llm: RapidLLM, pipeline: FakePipeline) -> None:
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

    def test_a_conversation_in_a_prompt_with_a_placeholder(
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
        without_placeholder = ChatPromptTemplate.from_template("Read {context} {input}")
        chain = create_rapid_chain(llm, documents=TEXT, prompt=without_placeholder)
        assert chain.invoke(QUESTION)["answer"]
        with pytest.raises(PromptError, match="the chat prompt has no placeholder for it"):
            chain.invoke({"input": QUESTION, "chat_history": []})

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
    async def test_it_composes_with_other_runnables(
        self, llm: RapidLLM, retriever: RecordingRetriever
    ) -> None:
        chain = create_rapid_chain(llm, retriever, documents=TEXT)
        assert (chain | RunnableLambda(lambda output: len(output["context"]))).invoke(QUESTION) == 2
        asking = {"question": RunnablePassthrough()} | chain.pick(["answer", "context"])
        assert set(asking.invoke(QUESTION)) == {"answer", "context"}
        assert "".join(chain.pick("answer").stream(QUESTION)) == asking.invoke(QUESTION)["answer"]
        both = RunnableParallel(first=chain, second=chain).invoke(QUESTION)
        assert both["first"]["answer"] == both["second"]["answer"]
        assert chain.with_config(run_name="mine").invoke(QUESTION)["context"] == [
            PEOPLE_DOCUMENTS[1],
            PEOPLE_DOCUMENTS[2],
        ]
        assert await (RunnablePassthrough() | chain).ainvoke(QUESTION)

    def test_options_and_retries_around_the_llm(self, llm: RapidLLM, retriever: RecordingRetriever) -> None:
        for wrapped in (llm.bind(temperature=0.5), llm.with_retry(), llm.with_config(tags=["t"])):
            output = create_rapid_chain(wrapped, retriever, documents=TEXT).invoke(QUESTION)
            assert output["context"] == [PEOPLE_DOCUMENTS[1], PEOPLE_DOCUMENTS[2]]
        output = create_rapid_chain(llm.bind(temperature=0.5), documents=TEXT).invoke(QUESTION)
        assert "temperature 0.5" in output["answer"]

    def test_runs_are_one_tree(self, llm: RapidLLM, retriever: RecordingRetriever) -> None:
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
        assert ("retriever", "RecordingRetriever") in runs_below
        assert ("llm", "RapidLLM") in runs_below
        assert ("prompt", "RapidPromptTemplate") in runs_below

    async def test_stream_events(self, llm: RapidLLM, retriever: RecordingRetriever) -> None:
        chain = create_rapid_chain(llm, retriever, documents=TEXT)
        events = [event async for event in chain.astream_events(QUESTION, version="v2")]
        names = [event["event"] for event in events]
        assert names.count("on_retriever_end") == names.count("on_llm_end") == 1
        assert names.count("on_llm_stream") > 5
        (end,) = [e for e in events if e["event"] == "on_chain_end" and e["name"] == "rapid_chain"]
        assert end["data"]["output"]["context"] == [PEOPLE_DOCUMENTS[1], PEOPLE_DOCUMENTS[2]]

    async def test_the_event_loop_ticks_while_it_answers(
        self, llm: RapidLLM, retriever: RecordingRetriever
    ) -> None:
        chain = create_rapid_chain(llm, retriever, documents=TEXT)
        _, ticks = await ticks_during(chain.ainvoke(QUESTION))
        assert ticks > 5
