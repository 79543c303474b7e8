import dataclasses
import itertools
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
from rapid_integrations.demo.training.tool_dialogues import TOOL_MIX, lookups, tool_example
from rapid_integrations.demo.training.training_data import ANSWER, CALL, Example
from rapid_integrations.demo.world import compose
from rapid_integrations.prompts import Message, PromptParts, ToolCall, encode_prompt
from rapid_integrations.tools.formats import find_format
from rapid_integrations.tools.parsing import AnswerText, parse_answer

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
            *said, call = parse_answer(content, find_format(tokenizer), tools=tools)
            assert isinstance(call, ToolCall)
            calls += 1
            text = "".join(part.text for part in said if isinstance(part, AnswerText))
            messages.append(dataclasses.replace(Message.of(name, text), tool_calls=(call,)))
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
        labelled = list(zip(example.ids, example.labels, strict=True))
        calls, answers = (
            tokenizer.decode([i for i, label in labelled if label == wanted]) for wanted in (CALL, ANSWER)
        )
        text = tokenizer.decode(example.ids)
        assert calls.count("<tool_call>") == calls.count(EOS) == text.count(TOOL) > 0
        assert answers.count(EOS) == text.count(USER)
        assert "tool_" not in answers
        assert "<tool_response>" not in calls


def test_most_results_that_are_passages_end_in_their_query(tokenizer: PreTrainedTokenizerBase) -> None:
    repeated = passages = 0
    for example in examples(30):
        messages, _ = conversation(tokenizer.decode(example.ids), tokenizer)
        for call, result in itertools.pairwise(messages):
            if result.role == "tool":
                (query,) = call.tool_calls[0].arguments.values()
                text = result.text
                passages += text.count(".") + text.count("?") > 3
                repeated += text.removesuffix(query) != text
    assert passages > 50
    assert 0.7 * passages < repeated < 0.9 * passages


def test_the_second_call_of_a_question_states_the_first_result(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    seconds = 0
    for example in examples(30):
        messages, _ = conversation(tokenizer.decode(example.ids), tokenizer)
        for before, message, after in zip(messages, messages[1:], messages[2:], strict=False):
            if message.tool_calls:
                assert bool(message.text) == (before.role == "tool")
                if before.role == "tool":
                    seconds += 1
                    assert " manager is " in message.text
                    person = message.text.removesuffix(".").split(" manager is ")[1]
                    assert person in str(message.tool_calls[0].arguments)
                assert after.role == "tool"
    assert seconds > 5


def test_a_two_hop_question_is_looked_up_twice_and_an_adjective_by_its_name() -> None:
    rng = random.Random(1)
    composition = compose(rng, 4096, sentence_encoder().count)
    asked = composition.ask(rng, 60, TOOL_MIX)
    by_kind = {kind: [q for q in asked if q.kind == kind] for kind in TOOL_MIX}
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
