import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rapid_integrations.demo.tokenizer import (
    ASSISTANT,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    SYSTEM,
    TOOL,
    USER,
    save_tokenizer,
    sentence_encoder,
)
from rapid_integrations.demo.tool_dialogues import lookups, tool_example
from rapid_integrations.demo.training_data import ANSWER, Example
from rapid_integrations.demo.world import TRAINING_MIX, compose
from rapid_integrations.prompts import Message, PromptParts, encode_prompt
from rapid_integrations.tool_parsing import parse_answer
from rapid_integrations.tools import ToolCall, find_format

TURN = re.compile(
    "({})(.*?){}".format("|".join(map(re.escape, (SYSTEM, USER, ASSISTANT, TOOL))), re.escape(EOS))
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def examples(count: int) -> list[Example]:
    rng = random.Random(5)
    return [tool_example(rng, 1024, max_position=4096, near_duplicates=0.7) for _ in range(count)]


def conversation(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Message], list[Any]]:
    """The messages and tools of an example's text."""
    messages, tools, calls = [], [], 0
    for role, content in TURN.findall(text):
        name = role.strip("<|>")
        if role == SYSTEM:
            at = content.index('{"type"')
            decoder, left = json.JSONDecoder(), content[at:].strip()
            while left:
                tool, end = decoder.raw_decode(left)
                tools.append(tool)
                left = left[end:].strip()
            if content[:at].strip():
                messages.append(Message.of(name, content[:at].strip()))
        elif "<tool_call>" in content:
            (call,) = parse_answer(content, find_format(tokenizer), tools=tools)
            assert isinstance(call, ToolCall)
            calls += 1
            messages.append(Message(name, (), tool_calls=(call,)))
        else:
            messages.append(Message.of(name, re.sub("</?tool_response>", "", content).strip()))
    assert calls
    return messages, tools


def test_they_are_what_the_chat_template_writes(tokenizer: PreTrainedTokenizerBase) -> None:
    assert find_format(tokenizer).name == "hermes"
    for example in examples(20):
        ids = [i for i in example.ids if i != SPECIAL_TOKENS.index(PAD)]
        messages, tools = conversation(tokenizer.decode(ids), tokenizer)
        parts = PromptParts(tuple(messages), tools=tuple(tools))
        assert encode_prompt(parts, tokenizer) == [*ids, SPECIAL_TOKENS.index(ASSISTANT)]


def test_calls_and_answers_are_learnt_and_results_are_not(tokenizer: PreTrainedTokenizerBase) -> None:
    for example in examples(20):
        learnt = tokenizer.decode(
            [i for i, label in zip(example.ids, example.labels, strict=True) if label == ANSWER]
        )
        text = tokenizer.decode(example.ids)
        assert learnt.count("<tool_call>") == text.count(TOOL) > 0
        assert "<tool_response>" not in learnt
        assert learnt.count(EOS) == text.count(ASSISTANT)


def test_a_two_hop_question_is_looked_up_twice_and_an_adjective_by_its_name() -> None:
    rng = random.Random(1)
    composition = compose(rng, 4096, sentence_encoder().count)
    asked = composition.ask(rng, 60, TRAINING_MIX)
    by_kind = {kind: [q for q in asked if q.kind == kind] for kind in TRAINING_MIX}
    assert all(by_kind.values())
    for question in by_kind["two_hop"]:
        first, second = lookups(composition, question)
        assert f"{first.answer} {second.answer}" == question.answer
        person = first.answer.removesuffix(".").split(" manager is ")[1]
        assert person in second.query
    for question in by_kind["inflected"]:
        (lookup,) = lookups(composition, question)
        entity = composition.sentences[question.evidence[0]].fact
        assert entity is not None
        assert entity[0].stem in lookup.query.replace(".", " ").replace("?", " ").split()
    for question in by_kind["single"] + by_kind["describe"]:
        (lookup,) = lookups(composition, question)
        assert (lookup.query, lookup.answer) == (question.question, question.answer)
