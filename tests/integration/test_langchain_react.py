"""LangChain's classic ReAct agent: steps as text, with a stop string at the observation."""

from __future__ import annotations

import re

import pytest
from helpers.fake_pipeline import FakePipeline
from langchain_classic.agents import AgentExecutor, create_react_agent
from langchain_core.prompts import PromptTemplate
from langchain_core.tools import tool

from rapid_integrations import RapidLLM
from rapid_integrations.config import GenerationOptions
from rapid_integrations.prompts import PromptParts

PROMPT = PromptTemplate.from_template(
    "Answer the question with the tools: {tools}\nThought: …\nAction: one of {tool_names}\nAction Input: …\n"
    "Observation: …\nFinal Answer: …\n\nQuestion: {input}\n{agent_scratchpad}"
)
QUESTION = "What is the passcode of the Balbra depot?"


@tool
def look_up(place: str) -> str:
    """Look up a passcode."""
    return f"the passcode of the {place} is 314159"


class ReActPipeline(FakePipeline):
    """Writes an invented observation after its action, as models do."""

    def answer(self, parts: PromptParts, options: GenerationOptions) -> str:
        observed = re.search(r"Observation: the passcode of the Balbra depot is (\d+)", parts.text)
        if observed:
            return f" I know.\nFinal Answer: {observed.group(1)}"
        return (
            " I look it up.\nAction: look_up\nAction Input: Balbra depot\nObservation: the passcode is 271828"
        )


@pytest.fixture
def pipeline() -> ReActPipeline:
    return ReActPipeline()


@pytest.fixture
def executor(pipeline: ReActPipeline) -> AgentExecutor:
    agent = create_react_agent(RapidLLM(pipeline), [look_up], PROMPT)
    return AgentExecutor(agent=agent, tools=[look_up], return_intermediate_steps=True)


def check(result: dict, pipeline: ReActPipeline) -> None:
    assert result["output"] == "314159"
    ((action, observation),) = result["intermediate_steps"]
    assert (action.tool, action.tool_input) == ("look_up", "Balbra depot")
    assert observation == "the passcode of the Balbra depot is 314159"
    assert all("\nObservation" in request.options.sampling.stop for request in pipeline.requests)
    assert "271828" not in pipeline.requests[-1].parts.text


def test_it_looks_up_and_answers(executor: AgentExecutor, pipeline: ReActPipeline) -> None:
    check(executor.invoke({"input": QUESTION}), pipeline)


async def test_it_does_without_blocking_the_event_loop(
    executor: AgentExecutor, pipeline: ReActPipeline
) -> None:
    check(await executor.ainvoke({"input": QUESTION}), pipeline)
