from typing import Any

import pytest
from helpers.fake_pipeline import PROMPT, FakePipeline
from helpers.langchain_calls import Person, count, search
from helpers.scripted_tools import ScriptedTools
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.prompts import PromptTemplate

from rapid_integrations import ChatRapid, RapidChatPromptTemplate, RapidLLM, RapidPromptTemplate
from rapid_integrations.langchain.messages import tool_definitions


class TestTextLLM:
    def test_a_batch_uses_the_answers_of_single_calls(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline, cache=InMemoryCache())
        first = llm.invoke(PROMPT)
        assert llm.batch([PROMPT, "other"])[0] == first
        assert len(pipeline.requests) == 2

    def test_everything_that_changes_the_answer_is_in_the_key(self, pipeline: FakePipeline) -> None:
        cache = InMemoryCache()
        llm = RapidLLM(pipeline, cache=cache)
        retriever = lambda query: ["chunk"]  # noqa: E731 # a retriever is identified as an object
        calls: list[dict[str, Any]] = [
            {}, {"temperature": 0.5}, {"transfer_strength": 1}, {"num_draft_tokens": 3},
            {"acceptance": "lossless"}, {"context": "Ada"}, {"query": "Ada"}, {"retriever": retriever},
            {"stop": ["Ada"]}, {"seed": 3}, {"max_tokens": 5}, {"json_schema": Person}, {"regex": "a+"},
            {"regex": "b+"}, {"choices": ["a"]},
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


def test_everything_that_changes_a_chat_models_answer_is_in_the_key() -> None:
    cache = InMemoryCache()
    pipeline = ScriptedTools()
    chat = ChatRapid(pipeline, cache=cache)
    prompt = RapidChatPromptTemplate.from_messages([("human", "{context} {question}")])

    def first(query: str) -> list[str]:
        return [query]

    def second(query: str) -> list[str]:
        return [query]

    calls = [
        lambda: chat.invoke("Go"),
        lambda: chat.invoke("Go", temperature=0.5),
        lambda: chat.invoke("Go", stop=["x"]),
        lambda: chat.invoke("Go", context="Ada."),
        lambda: chat.invoke("Go", query="who?"),
        lambda: chat.invoke("Go", retriever=first),
        lambda: chat.invoke("Go", retriever=second),
        lambda: chat.bind_tools([search]).invoke("Go"),
        lambda: chat.bind_tools([search], tool_choice="any").invoke("Go"),
        lambda: chat.bind_tools([count]).invoke("Go"),
        lambda: (prompt | chat).invoke({"context": "a b", "question": "c"}),
        lambda: (prompt | chat).invoke({"context": "a", "question": "b c"}),
        lambda: ChatRapid(ScriptedTools(), cache=cache).invoke("Go"),
        lambda: ChatRapid(pipeline, cache=cache, temperature=0.7).invoke("Go"),
        lambda: ChatRapid(pipeline, cache=cache, tool_format="llama3").invoke("Go"),
        lambda: chat.bind_tools([dict(tool_definitions([search])[0])]).invoke("Go"),
    ]
    for call in calls:
        call()
    assert len(cache._cache) == len(calls)
    asked = len(pipeline.requests)
    for call in [*calls[:12], *calls[13:]]:  # calls[12] makes a new pipeline each time
        call()
    assert len(pipeline.requests) == asked
