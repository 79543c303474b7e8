"""LlamaIndex's agents on a scripted model: the tool is called, and the answer contains its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.fake_pipeline import FakePipeline
from helpers.scripted_tools import MARKUP, ScriptedTools, call_text
from llama_index.core.agent.workflow import (
    AgentStream,
    AgentWorkflow,
    FunctionAgent,
    ReActAgent,
    ToolCall,
    ToolCallResult,
)
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.tools import FunctionTool

from rapid_integrations import RapidLLM
from rapid_integrations.prompts import PromptParts

# LlamaIndex's workflows read every attribute of an agent, including deprecated ones of pydantic, and its
# ReAct agent reads one that its workflows deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
]

QUESTION = 'What is the passcode of "Balbra depot"?'
ANSWER = "It is: the passcode is 314159"


def look_up(place: str) -> str:
    """Look up a passcode."""
    return f"the passcode is {dict.fromkeys(['Balbra depot'], 314159)[place]}"


def fail(place: str) -> str:
    """Look up a passcode."""
    raise LookupError(f"the archive is closed, so {place} is not found")


def react(parts: PromptParts) -> str:
    """The answer of a model that follows the ReAct prompt."""
    observed = parts.messages[-1].text.removeprefix("Observation: ")
    if observed != parts.messages[-1].text:
        return f"Thought: I know it.\nAnswer: It is: {observed}"
    return 'Thought: I look it up.\nAction: look_up\nAction Input: {"place": "Balbra depot"}'


async def run(workflow: Any) -> tuple[str, list[Any]]:
    # LlamaIndex's default memory leaves its database connection open.
    memory = ChatMemoryBuffer.from_defaults(token_limit=1000, tokenizer_fn=str.split)
    handler = workflow.run(user_msg=QUESTION, memory=memory)
    events = [event async for event in handler.stream_events()]
    return str(await handler), events


def of(kind: type, events: list[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


@pytest.fixture(params=list(MARKUP))
def pipeline(request: pytest.FixtureRequest) -> ScriptedTools:
    return ScriptedTools(family=request.param)


def function_agent(llm: RapidLLM) -> Any:
    return FunctionAgent(tools=[look_up], llm=llm, system_prompt="Use the tools.")


def workflow_of_tools(llm: RapidLLM) -> Any:
    return AgentWorkflow.from_tools_or_functions([look_up], llm=llm, system_prompt="Use the tools.")


@pytest.mark.parametrize("make", [function_agent, workflow_of_tools])
async def test_a_function_agent(pipeline: ScriptedTools, make: Callable[[RapidLLM], Any]) -> None:
    answer, events = await run(make(RapidLLM(pipeline)))
    assert answer == ANSWER
    (call,) = of(ToolCall, [event for event in events if type(event) is ToolCall])
    assert (call.tool_name, call.tool_kwargs) == ("look_up", {"place": "Balbra depot"})
    (result,) = of(ToolCallResult, events)
    assert (str(result.tool_output.content), result.tool_id) == ("the passcode is 314159", call.tool_id)
    streams = of(AgentStream, events)
    assert {c.tool_name for event in streams for c in event.tool_calls} == {"look_up"}
    deltas = [event.delta for event in streams if event.delta]
    assert len(deltas) > 1
    assert "".join(deltas) == ANSWER
    assert streams[-1].raw["rapid"]["completion_tokens"] > 0
    asked, told = (request.parts for request in pipeline.requests)
    assert [m.role for m in asked.messages] == ["system", "user"]
    assert [m.role for m in told.messages] == ["system", "user", "assistant", "tool"]
    assert (asked.query, told.query) == (QUESTION, QUESTION)
    assert told.messages[3].tool_call_id == told.messages[2].tool_calls[0].id == call.tool_id


async def test_a_function_agent_that_does_not_stream(pipeline: ScriptedTools) -> None:
    agent = FunctionAgent(
        tools=[look_up], llm=RapidLLM(pipeline), streaming=False, initial_tool_choice="look_up"
    )
    answer, events = await run(agent)
    assert answer == ANSWER
    assert of(AgentStream, events) == []
    assert [result.tool_name for result in of(ToolCallResult, events)] == ["look_up"]
    assert [bool(request.parts.answer_start) for request in pipeline.requests] == [True, False]


async def test_an_agent_remembers_the_conversation(pipeline: ScriptedTools) -> None:
    agent = FunctionAgent(tools=[look_up], llm=RapidLLM(pipeline))
    memory = ChatMemoryBuffer.from_defaults(token_limit=1000, tokenizer_fn=str.split)
    for _ in range(2):
        assert str(await agent.run(user_msg=QUESTION, memory=memory)) == ANSWER
    roles = [message.role for message in pipeline.requests[-1].parts.messages]
    assert roles == ["user", "assistant", "tool", "assistant", "user", "assistant", "tool"]


async def test_a_tool_that_fails_and_an_unknown_tool(pipeline: ScriptedTools) -> None:
    llm = RapidLLM(pipeline)
    answer, _ = await run(FunctionAgent(tools=[fail], llm=llm))
    assert "the archive is closed" in answer
    family = pipeline.family

    def wrong_name(parts: PromptParts) -> str:
        last = parts.messages[-1]
        return last.text if last.role == "tool" else call_text(family, "look", {"place": "x"})

    pipeline.script = wrong_name
    answer, _ = await run(FunctionAgent(tools=[look_up], llm=llm))
    assert answer.startswith("Tool look not found")


async def test_one_agent_hands_over_to_another(pipeline: ScriptedTools) -> None:
    family, llm = pipeline.family, RapidLLM(pipeline)

    def script(parts: PromptParts) -> str:
        names = [tool["function"]["name"] for tool in parts.tools]
        last = parts.messages[-1]
        if "handoff" in names:
            return call_text(family, "handoff", {"to_agent": "finder", "reason": "It has the archive."})
        if last.role == "tool" and "314159" in last.text:
            return f"It is: {last.text}"
        return call_text(family, "look_up", {"place": "Balbra depot"})

    pipeline.script = script
    greeter = FunctionAgent(name="greeter", description="Greets.", llm=llm, can_handoff_to=["finder"])
    finder = FunctionAgent(name="finder", description="Finds.", llm=llm, tools=[look_up], can_handoff_to=[])
    answer, events = await run(AgentWorkflow(agents=[greeter, finder], root_agent="greeter"))
    assert answer == ANSWER
    assert [result.tool_name for result in of(ToolCallResult, events)] == ["handoff", "look_up"]


async def test_a_react_agent_on_a_model_that_supports_tools(pipeline: ScriptedTools) -> None:
    pipeline.script = react
    answer, events = await run(ReActAgent(tools=[look_up], llm=RapidLLM(pipeline)))
    assert answer == ANSWER
    assert [str(r.tool_output.content) for r in of(ToolCallResult, events)] == ["the passcode is 314159"]
    assert len(of(AgentStream, events)) > 2
    assert all(request.parts.tools == () for request in pipeline.requests)


class ReActPipeline(FakePipeline):
    """A model without a chat template, that follows the ReAct prompt."""

    def answer(self, parts: PromptParts, options: Any) -> str:
        return react(parts)


async def test_a_model_without_tool_support_works_in_a_react_agent() -> None:
    llm = RapidLLM(ReActPipeline())
    workflow = AgentWorkflow.from_tools_or_functions([look_up], llm=llm)
    assert [type(agent) for agent in workflow.agents.values()] == [ReActAgent]
    answer, events = await run(workflow)
    assert answer == ANSWER
    assert [result.tool_name for result in of(ToolCallResult, events)] == ["look_up"]


# LlamaIndex makes a memory for this that it does not use, whose database connection stays open.
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
async def test_predict_and_call_on_a_model_without_tool_support() -> None:
    llm = RapidLLM(ReActPipeline())
    tool = FunctionTool.from_defaults(look_up)
    assert str(llm.predict_and_call([tool], QUESTION)) == "the passcode is 314159"
    history = [ChatMessage(QUESTION)]
    answer = await llm.apredict_and_call([tool], chat_history=history)
    assert [source.tool_name for source in answer.sources] == ["look_up"]
