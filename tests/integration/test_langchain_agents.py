"""Agents on a scripted model: the tools are called and stream as with any other chat model."""

from __future__ import annotations

import pytest
from helpers.scripted_tools import MARKUP, ScriptedTools
from langchain.agents import create_agent
from langchain.agents.structured_output import ToolStrategy
from langchain_core.messages import AIMessageChunk, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from rapid_integrations import ChatRapid

QUESTION = 'What is the passcode of "Balbra depot"?'
PASSCODES = {"Balbra depot": "314159"}


@tool
def look_up(place: str) -> str:
    """Look up a passcode."""
    return f"the passcode is {PASSCODES[place]}"


class Passcode(BaseModel):
    """The passcode that was found."""

    place: str


@pytest.mark.parametrize("family", MARKUP)
class TestAgent:
    def test_it_calls_the_tool_and_answers(self, family: str) -> None:
        pipeline = ScriptedTools(family=family)
        agent = create_agent(ChatRapid(pipeline), [look_up], system_prompt="Use the tools.")
        messages = agent.invoke({"messages": [("human", QUESTION)]})["messages"]
        assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
        assert messages[1].tool_calls[0]["args"] == {"place": "Balbra depot"}
        assert messages[-1].content == "It is: the passcode is 314159"
        assert [request.parts.query for request in pipeline.requests] == [QUESTION] * 2

    async def test_it_streams(self, family: str) -> None:
        agent = create_agent(ChatRapid(ScriptedTools(family=family)), [look_up])
        inputs = {"messages": [("human", QUESTION)]}
        synchronous = [message for message, _ in agent.stream(inputs, stream_mode="messages")]
        asynchronous = [message async for message, _ in agent.astream(inputs, stream_mode="messages")]
        for streamed in (synchronous, asynchronous):
            calls = [m for m in streamed if isinstance(m, AIMessageChunk) and m.tool_call_chunks]
            assert [chunk["name"] for m in calls for chunk in m.tool_call_chunks] == ["look_up"]
            (result,) = [m for m in streamed if isinstance(m, ToolMessage)]
            assert result.content == "the passcode is 314159"
            texts = [m.content for m in streamed if isinstance(m, AIMessageChunk) and m.content]
            assert len(texts) > 1
            assert "".join(texts) == "It is: the passcode is 314159"

    def test_it_answers_with_data(self, family: str) -> None:
        agent = create_agent(
            ChatRapid(ScriptedTools(family=family)), [], response_format=ToolStrategy(Passcode)
        )
        answer = agent.invoke({"messages": [("human", QUESTION)]})
        assert answer["structured_response"] == Passcode(place="Balbra depot")
