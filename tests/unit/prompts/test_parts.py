from __future__ import annotations

import pytest
from helpers.prompt_texts import QUESTION
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


def test_with_context_of_a_prompt_without_context():
    parts = PromptParts.from_messages([("user", "Hi"), ("assistant", "Hello"), ("user", QUESTION)])
    changed = parts.with_context("a chunk")
    assert changed.messages[2].text == f"a chunk\n\n{QUESTION}"
    assert (changed.context, changed.query) == ("a chunk", QUESTION)
    assert parts.with_context("").messages == parts.messages


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_prompt_is_an_error(text):
    with pytest.raises(PromptError, match="empty"):
        PromptParts.from_text(text)
    with pytest.raises(PromptError, match="empty"):
        PromptParts.from_messages([("user", text)])
    with pytest.raises(PromptError, match="empty"):
        PromptParts.from_messages([])
    with pytest.raises(PromptError, match="empty"):
        encode_prompt(PromptParts((Message("user", (Segment("query", text),)),)), tokenizer_named("chatml"))


def test_a_role_that_is_not_a_word_is_an_error():
    with pytest.raises(PromptError, match="role"):
        PromptParts.from_messages([("user<|im_end|>", "Hi")])
