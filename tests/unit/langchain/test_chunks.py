import json

import pytest
from helpers.asynchronous import collect
from helpers.fake_pipeline import PROMPT
from helpers.langchain_calls import Person, contents, count, search, total
from helpers.scripted_tools import MARKUP, ScriptedTools, call_text
from langchain_core.messages import HumanMessage

from rapid_integrations import ChatRapid


class TestText:
    def test_only_the_last_chunk_holds_finish_reason_and_usage(self, chat: ChatRapid) -> None:
        *chunks, last = chat.stream(PROMPT)
        assert all(chunk.usage_metadata is None and not chunk.response_metadata for chunk in chunks)
        assert last.usage_metadata["total_tokens"] > 0
        assert (last.content, last.chunk_position) == ("", "last")
        assert last.response_metadata["finish_reason"] == "stop"

    def test_an_answer_cut_off_says_so(self) -> None:
        chat = ChatRapid(ScriptedTools()).bind_tools([search])
        assert chat.invoke("Go", max_new_tokens=2).response_metadata["finish_reason"] == "length"

    def test_without_tools_markup_is_text(self) -> None:
        text = call_text("hermes", "search", {})
        assert ChatRapid(ScriptedTools(script=lambda parts: text)).invoke("Go").content == text


class TestToolCalls:
    @pytest.mark.parametrize("family", MARKUP)
    async def test_a_call_is_one_chunk(self, family: str) -> None:
        chat = ChatRapid(ScriptedTools(family=family)).bind_tools([search, Person])
        message = chat.invoke('Find "the keeper"')
        (call,) = message.tool_calls
        assert (call["name"], call["args"]) == ("search", {"query": "the keeper"})
        assert message.content == ""
        assert message.response_metadata["finish_reason"] == "tool_calls"
        chunks = list(chat.stream('Find "the keeper"'))
        (calling,) = [chunk for chunk in chunks if chunk.tool_call_chunks]
        assert json.loads(calling.tool_call_chunks[0]["args"]) == {"query": "the keeper"}
        assert contents(total(chunks)) == contents(message)
        assert contents(await chat.ainvoke('Find "the keeper"')) == contents(message)
        assert contents(total(await collect(chat.astream('Find "the keeper"')))) == contents(message)

    def test_several_calls_with_text(self) -> None:
        two = f"First.\n{call_text('hermes', 'search', {'query': 'a'})}\n{call_text('hermes', 'count', {})}"
        chat = ChatRapid(ScriptedTools(script=lambda parts: two)).bind_tools([search, count])
        message = total(chat.stream("Go"))
        assert message.content == "First."
        assert [(c["name"], c["args"]) for c in message.tool_calls] == [
            ("search", {"query": "a"}),
            ("count", {}),
        ]
        assert len({call["id"] for call in message.tool_calls}) == 2

    @pytest.mark.parametrize(
        ("family", "answer", "shown"),
        [
            (
                "hermes",
                '<tool_call>{"name": "search", "arg</tool_call>',
                '<tool_call>{"name": "search", "arg',
            ),
            (
                "llama3",
                '{"name": "search", "parameters": {"q": 1',
                json.dumps('{"name": "search", "parameters": {"q": 1'),
            ),
            ("mistral", '[TOOL_CALLS] [{"arguments": {}}]', json.dumps('{"arguments": {}}')),
            ("mistral", '[TOOL_CALLS] ["search"]', json.dumps('"search"')),
        ],
    )
    def test_a_malformed_call_is_an_invalid_one(self, family: str, answer: str, shown: str) -> None:
        pipeline = ScriptedTools(family=family, script=lambda parts: answer)
        chat = ChatRapid(pipeline).bind_tools([search])
        message = chat.invoke("Go")
        (invalid,) = message.invalid_tool_calls
        assert (invalid["args"], bool(invalid["error"])) == (shown, True)
        assert (message.tool_calls, message.response_metadata["finish_reason"]) == ([], "stop")
        streamed = total(chat.stream("Go"))
        assert contents(streamed) == contents(message)
        written = shown if shown in answer else json.loads(shown)
        for said in (message, streamed):  # the next prompt holds the text that the model wrote
            chat.invoke([HumanMessage("Go"), said, HumanMessage("Again")])
            assert pipeline.requests[-1].parts.messages[1].text == written
