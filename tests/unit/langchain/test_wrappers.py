"""LLMs inside LangChain's wrappers, in the question-answering chain."""

from typing import Any

import pytest
from helpers.asynchronous import collect
from helpers.fake_pipeline import PEOPLE_QUESTION as QUESTION
from helpers.fake_pipeline import PEOPLE_TEXT as TEXT
from helpers.fake_pipeline import FakePipeline
from helpers.langchain_calls import PEOPLE_DOCUMENTS, RecordingRetriever, total
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.runnables import ConfigurableField, RunnableLambda

from rapid_integrations import ConfigurationError, GenerationError, RapidLLM, create_rapid_chain
from rapid_integrations.events import Completion


class FailsAlways(FakePipeline):
    """Retrieves, but does not answer."""

    def answer(self, parts: Any, options: Any) -> str:
        raise GenerationError("out of luck")


class FailsEverySecondTime(FakePipeline):
    """Fails every second time, after it has retrieved."""

    def answer(self, parts: Any, options: Any) -> str:
        if len(self.requests) % 2:
            raise GenerationError("out of luck")
        return super().answer(parts, options)


async def all_outputs(chain: Any) -> list[dict[str, Any]]:
    """The outputs of the four entry points; streams are summed."""
    return [
        chain.invoke(QUESTION),
        await chain.ainvoke(QUESTION),
        total(chain.stream(QUESTION)),
        total(await collect(chain.astream(QUESTION))),
    ]


class TestWrappers:
    async def test_a_retry(self, retriever: RecordingRetriever, model_class: Any) -> None:
        pipeline = FailsEverySecondTime()
        retrying = model_class(pipeline).with_retry(stop_after_attempt=2, wait_exponential_jitter=False)
        chain = create_rapid_chain(retrying, retriever, documents=TEXT)
        for output in (chain.invoke(QUESTION), await chain.ainvoke(QUESTION), *chain.batch([QUESTION])):
            assert output["context"] == [PEOPLE_DOCUMENTS[1], PEOPLE_DOCUMENTS[2]]
            assert output["answer"].startswith(QUESTION)
        assert len(pipeline.requests) == 6
        with pytest.raises(GenerationError, match="out of luck"):  # LangChain does not retry streams
            list(chain.stream(QUESTION))

    async def test_a_fallback_uses_its_own_retriever(
        self, retriever: RecordingRetriever, model_class: Any
    ) -> None:
        events: list[Any] = []
        fallback = model_class(FakePipeline(), retriever=lambda query: PEOPLE_DOCUMENTS[:1]).bind(
            on_event=events.append
        )
        failing = model_class(FailsAlways(), retriever=retriever)
        for output in await all_outputs(
            create_rapid_chain(failing.with_fallbacks([fallback]), documents=TEXT)
        ):
            assert output["context"] == PEOPLE_DOCUMENTS[:1]
            assert output["answer"].startswith(QUESTION)
            assert output["stats"]["retriever"] == "<lambda>"
        assert len(retriever.questions) == sum(isinstance(event, Completion) for event in events) == 4
        for first in (failing, model_class(FakePipeline(max_prompt_chars=10))):
            chain = create_rapid_chain(first.with_fallbacks([fallback]), retriever, documents=TEXT)
            for output in await all_outputs(chain):
                assert output["context"] == [PEOPLE_DOCUMENTS[1], PEOPLE_DOCUMENTS[2]]

    def test_a_fallback_without_retrieval_has_no_sources(
        self, llm: RapidLLM, retriever: RecordingRetriever
    ) -> None:
        class WithoutRetrieval(FakePipeline):
            def _events(self, *args: Any) -> Any:
                _retrieved, *events = super()._events(*args)
                yield from events

        plain = RapidLLM(FailsAlways()).with_fallbacks([RapidLLM(WithoutRetrieval())])
        output = create_rapid_chain(plain, retriever, documents=TEXT).invoke(QUESTION)
        assert (output["context"], output["stats"]["retriever"]) == ([], "RecordingRetriever")

    @pytest.mark.parametrize("other", [FakeListLLM, FakeListChatModel])
    async def test_a_fallback_of_another_class_gets_the_prompt(
        self, retriever: RecordingRetriever, other: Any
    ) -> None:
        prompts: list[str] = []

        def record(value: Any) -> Any:
            prompts.append(value.to_string())
            return value

        other_llm = RunnableLambda(record) | other(responses=["Grace."])
        failing = RapidLLM(FailsAlways(), temperature=0.5)
        llm = failing.with_fallbacks([other_llm]).bind(retriever=retriever, on_event=lambda event: None)
        for output in await all_outputs(create_rapid_chain(llm, documents=TEXT)):
            assert output == {"question": QUESTION, "context": [], "answer": "Grace.", "stats": None}
        assert len(retriever.questions) == 4
        assert prompts == [f"Context:\n{TEXT}\n\nQuestion: {QUESTION}\nAnswer:"] * 4

    async def test_configurable_fields(self, llm: RapidLLM, retriever: RecordingRetriever) -> None:
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
                assert output["context"] == [PEOPLE_DOCUMENTS[1], PEOPLE_DOCUMENTS[2]]

    async def test_configurable_alternatives(self, llm: RapidLLM, retriever: RecordingRetriever) -> None:
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
            assert output["context"] == [PEOPLE_DOCUMENTS[1], PEOPLE_DOCUMENTS[2]]
            assert "temperature 0.5" in output["answer"]
        with pytest.raises(ConfigurationError, match=r"llm is .*FakeListLLM: create_rapid_chain needs"):
            chain.invoke(QUESTION, {"configurable": {"llm": "foreign"}})

    def test_errors(self, llm: RapidLLM) -> None:
        other = FakeListLLM(responses=["no"])
        with pytest.raises(ConfigurationError, match="FakeListLLM: create_rapid_chain needs"):
            create_rapid_chain(other.with_fallbacks([llm]), documents=TEXT)
        with pytest.raises(ConfigurationError, match="query is bound to the llm"):
            create_rapid_chain(llm.with_fallbacks([llm.bind(query="Who?")]), documents=TEXT)
        with pytest.raises(ConfigurationError, match="a call does not take temprature"):
            create_rapid_chain(llm.with_fallbacks([llm.bind(temprature=1)]), documents=TEXT)
        with pytest.raises(ConfigurationError, match="retriever='bm25' is not allowed"):
            create_rapid_chain(llm.with_fallbacks([other]).bind(retriever="bm25"), documents=TEXT)
