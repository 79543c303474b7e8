"""Training examples of tool use: tools, questions, calls of the search tool, its results, and answers.

The argument of a call is a question, which suits both a retriever and a query engine. For a question with the
adjective of a name, the call uses the name. A two-hop question takes two calls; before the second one, the
model states the result of the first. Most results that are passages end with the query, as prompts do.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from rapid_integrations.demo import language, prompts
from rapid_integrations.demo.domain import Domain
from rapid_integrations.demo.domains import HANDBOOK
from rapid_integrations.demo.tokenizer import ASSISTANT, BOS, EOS, SYSTEM, TOOL, USER, sentence_encoder
from rapid_integrations.demo.training.training_data import (
    ANSWER,
    CALL,
    IGNORED,
    SPECIAL_IDS,
    Example,
    Row,
    excerpt,
)
from rapid_integrations.demo.world import Composition, Question, compose

TOOL_MIX = {"single": 0.2, "describe": 0.3, "two_hop": 0.3, "inflected": 0.2}
"""The weights of the kinds of questions. Two-hop questions are the hardest to learn."""

_VERBS = ("search", "look_up", "find", "retrieve", "query", "lookup", "ask")
_OBJECTS = ("", "_document", "_handbook", "_chronicle", "_passages", "_facts", "_records", "_engine", "_tool")
_PARAMETERS = ("query", "query", "query", "input", "question", "text")
_DESCRIPTIONS = (
    "Searches the document.",
    "Search the document for passages.",
    "Searches the handbook and returns passages.",
    "Look up facts in the records.",
    "Finds passages of the chronicle that answer a question.",
    "Useful for answering questions about the document.",
    "Returns what the document says about something.",
    "Answers a question about facilities and people.",
)
_OTHER_TOOLS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("add", "Adds two numbers.", {"a": "integer", "b": "integer"}),
    ("multiply", "Multiplies two numbers.", {"a": "number", "b": "number"}),
    ("get_weather", "Tells the weather of a town.", {"town": "string"}),
    ("send_mail", "Sends a letter to a person.", {"to": "string", "text": "string"}),
    ("current_time", "Tells what time it is.", {}),
    ("open_gate", "Opens the gate of a garden.", {"name": "string"}),
)


@dataclass(frozen=True)
class Lookup:
    """One tool call: its query, the answer, and the indices of the sentences that contain the answer."""

    query: str
    answer: str
    evidence: tuple[int, ...]


def lookups(composition: Composition, question: Question) -> list[Lookup]:
    """The calls that a question needs."""
    facts = [fact for i in question.evidence if (fact := composition.sentences[i].fact)]
    if question.kind == "two_hop":
        return [
            Lookup(
                entity.kind.attributes[attribute].questions[0].replace("{E}", entity.name),
                entity.statement(attribute),
                (index,),
            )
            for (entity, attribute), index in zip(facts, question.evidence, strict=True)
        ]
    stem = facts[0][0].stem
    query = question.question.replace(language.adjective(stem) or stem, stem)
    return [Lookup(query, question.answer, question.evidence)]


def tool_example(
    rng: random.Random,
    length: int,
    *,
    max_position: int,
    near_duplicates: float,
    domain: Domain = HANDBOOK,
) -> Example:
    """A conversation in which the model calls the search tool before it answers each question.

    Args:
        rng: Source of randomness.
        length: The length of the example in tokens, padding included.
        max_position: The maximum position that skipping between sentences may reach.
        near_duplicates: The share of documents with similar names.
        domain: The document's domain.
    """
    encode = sentence_encoder()
    search = _search_tool(rng)
    tools = [search]
    if rng.random() < 0.3:
        tools += [_tool(*definition) for definition in rng.sample(_OTHER_TOOLS, rng.choice((1, 1, 2)))]
        rng.shuffle(tools)
    systems = {**prompts.SYSTEM_MESSAGES, "": 6, "You are an assistant. Use the tool to answer.": 4}
    system = rng.choices(list(systems), list(systems.values()))[0]
    row = Row()
    row.add([SPECIAL_IDS[BOS], SPECIAL_IDS[SYSTEM]])
    row.add(encode(" ".join([system, *map(json.dumps, tools)])))
    row.add([SPECIAL_IDS[EOS]])
    composition = compose(
        rng,
        int(length * rng.choice((1, 2, 4, 8, 16))),
        encode.count,
        domain=domain,
        filler_share=0.3,
        near_duplicates=rng.random() < near_duplicates,
    )
    for question in composition.ask(rng, 8, TOOL_MIX):
        _add_question(rng, row, composition, question, search["function"], length)
    return row.finish(rng, length, max_position)


def _add_question(
    rng: random.Random,
    row: Row,
    composition: Composition,
    question: Question,
    function: dict[str, Any],
    length: int,
) -> None:
    """Append a question, its calls, their results and the answer, if all of them fit."""
    encode = sentence_encoder()
    parameter = function["parameters"]["required"][0]
    turn: list[tuple[list[int], int, bool]] = [  # tokens, label, whether positions may be skipped before them
        ([SPECIAL_IDS[USER], *encode(question.question), SPECIAL_IDS[EOS]], IGNORED, False),
    ]
    previous_answer = ""
    for lookup in lookups(composition, question):
        call = json.dumps({"name": function["name"], "arguments": {parameter: lookup.query}})
        turn.append(([SPECIAL_IDS[ASSISTANT]], IGNORED, False))
        turn.append(
            (
                [
                    *encode(previous_answer),
                    SPECIAL_IDS["<tool_call>"],
                    *encode(call),
                    SPECIAL_IDS["</tool_call>"],
                    SPECIAL_IDS[EOS],
                ],
                CALL,
                False,
            )
        )
        turn.append(([SPECIAL_IDS[TOOL], SPECIAL_IDS["<tool_response>"]], IGNORED, False))
        if rng.random() < 0.25:
            turn.append((encode(lookup.answer), IGNORED, False))
        else:
            passages = excerpt(
                rng,
                composition,
                rng.choice((192, 288, 384, 512, 640)),
                about=[fact[0].name for i in lookup.evidence if (fact := composition.sentences[i].fact)],
                needed=lookup.evidence,
            )
            if not {i for i, _, whole in passages if whole}.issuperset(lookup.evidence):
                return
            turn += [(ids, IGNORED, True) for _, ids, _ in passages]
            if rng.random() < 0.8:
                turn.append((encode(lookup.query), IGNORED, False))
        turn.append(([SPECIAL_IDS["</tool_response>"], SPECIAL_IDS[EOS]], IGNORED, False))
        previous_answer = lookup.answer
    turn.append(([SPECIAL_IDS[ASSISTANT]], IGNORED, False))
    turn.append(([*encode(question.answer), SPECIAL_IDS[EOS]], ANSWER, False))
    if len(row.ids) + sum(len(ids) for ids, _, _ in turn) > length:
        return
    for ids, label, gap in turn:
        row.add(ids, label, gap=gap)


def _search_tool(rng: random.Random) -> dict[str, Any]:
    name, parameter = rng.choice(_VERBS) + rng.choice(_OBJECTS), rng.choice(_PARAMETERS)
    description = rng.choice(_DESCRIPTIONS)
    if rng.random() < 0.3:
        description = f"{name}({parameter}: str) -> str\n{description}"
    tool = _tool(name, description, {parameter: "string"})
    properties = tool["function"]["parameters"]["properties"]
    style = rng.random()
    if style < 0.3:
        properties[parameter] = {"title": parameter.capitalize(), "type": "string"}
    elif style < 0.6:
        properties[parameter] = {"description": f"{parameter} to look up in retriever", "type": "string"}
    return tool


def _tool(name: str, description: str, parameters: dict[str, str]) -> dict[str, Any]:
    """A tool definition in OpenAI's form, which both host frameworks use."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "properties": {key: {"type": value} for key, value in parameters.items()},
                "required": list(parameters),
                "type": "object",
            },
        },
    }
