from __future__ import annotations

import pytest
from helpers.prompt_texts import PROSE, QUESTION, tool_turns
from helpers.small_tokenizers import tokenizer_named

from rapid_integrations.errors import PromptError
from rapid_integrations.prompts import Message, PromptParts, Segment, encode_prompt


def test_with_context_replaces_all_contexts_by_one():
    parts = PromptParts.from_text("<context>one</context> and <context>two</context> What?")
    changed = parts.with_context("three")
    assert changed.text == "<context>three</context> and <context></context> What?"
    assert changed.context == "three"
    assert changed.query == parts.query
    assert parts.with_context("").context == ""


def test_with_context_of_a_prompt_that_has_none():
    parts = PromptParts.from_messages([("user", "Hi"), ("assistant", "Hello"), ("user", QUESTION)])
    changed = parts.with_context("a chunk")
    assert changed.messages[2].text == f"a chunk\n\n{QUESTION}"
    assert (changed.context, changed.query) == ("a chunk", QUESTION)
    assert parts.with_context("").messages == parts.messages


def test_with_context_replaces_a_tool_result():
    parts = PromptParts.from_messages(tool_turns(PROSE))
    assert (parts.query, parts.context) == (QUESTION, PROSE)
    drafter = parts.with_context("A chunk.")
    assert [m.text for m in drafter.messages] == ["Be brief.", QUESTION, "", "A chunk."]
    assert drafter.messages[2].tool_calls == parts.messages[2].tool_calls
    assert drafter.messages[3].tool_call_id == "abc123def"
    assert drafter.query == QUESTION


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_prompt_raises(text):
    with pytest.raises(PromptError, match="empty"):
        PromptParts.from_text(text)
    with pytest.raises(PromptError, match="empty"):
        PromptParts.from_messages([("user", text)])
    with pytest.raises(PromptError, match="empty"):
        PromptParts.from_messages([])
    with pytest.raises(PromptError, match="empty"):
        encode_prompt(PromptParts((Message("user", (Segment("query", text),)),)), tokenizer_named("chatml"))


def test_a_role_that_is_not_a_word_raises():
    with pytest.raises(PromptError, match="role"):
        PromptParts.from_messages([("user<|im_end|>", "Hi")])
