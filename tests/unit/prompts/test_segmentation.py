from __future__ import annotations

import pytest
from helpers.prompt_texts import LINES, PROSE, QUESTION, TEMPLATES, tool_turns

from rapid_integrations.prompts import Message, PromptParts


def kinds(parts: PromptParts) -> list[str]:
    return [segment.kind for message in parts.messages for segment in message.segments]


def test_given_context_and_query_are_marked_in_the_text():
    text = f"Read: {QUESTION} is asked below.\n{PROSE}\nNow: {QUESTION} Go."
    parts = PromptParts.from_text(text, query=QUESTION, context=PROSE)
    assert parts.text == text
    assert kinds(parts) == ["scaffold", "context", "scaffold", "query", "scaffold"]
    assert parts.messages[0].segments[2].text == "\nNow: "


def test_a_given_query_inside_the_context_is_not_marked():
    parts = PromptParts.from_text(f"{PROSE}\n\nGo.", query="captain number 3", context=PROSE)
    assert parts.context == PROSE
    assert parts.query == "captain number 3"
    assert "query" not in kinds(parts)


def test_a_given_context_that_does_not_occur_is_put_in_front():
    parts = PromptParts.from_text(QUESTION, context="Short document.")
    assert parts.text == f"Short document.\n\n{QUESTION}"
    assert parts.context == "Short document."
    assert parts.query == QUESTION


def test_a_given_query_that_does_not_occur_changes_no_text():
    text = f"{PROSE}\n\nAnd now?"
    parts = PromptParts.from_text(text, query="ships in 1612")
    assert parts.text == text
    assert parts.context == PROSE
    assert parts.query == "ships in 1612"


def test_a_given_query_with_a_context_found_by_layout():
    text = f"Context:\n{PROSE}\n\nTell me, {QUESTION} Thanks."
    parts = PromptParts.from_text(text, query=QUESTION)
    assert parts.query == QUESTION
    assert parts.context == PROSE


def test_custom_tags_and_several_contexts():
    text = f"[[A long tale]] and [[another]] then {QUESTION}"
    parts = PromptParts.from_text(text, tags=[("[[", "]]")])
    assert parts.context == "A long tale\n\nanother"
    assert parts.text == text
    assert kinds(parts).count("context") == 2


def test_a_closing_tag_inside_the_document_does_not_end_it():
    doc = f"{PROSE}\n</context>\n{LINES}"
    parts = PromptParts.from_text(f"<context>{doc}</context>\n{QUESTION}")
    assert (parts.context, parts.query) == (doc, QUESTION)


@pytest.mark.parametrize("text", ["<context></context> What?", "<context>never closed. What?"])
def test_empty_or_unclosed_tags_mark_no_context(text):
    parts = PromptParts.from_text(text)
    assert parts.context == ""
    assert parts.text == text


def test_context_in_the_system_message():
    system = f"Use the following pieces of context to answer.\n----------------\n{PROSE}"
    parts = PromptParts.from_messages([("system", system), ("user", QUESTION)])
    assert (parts.context, parts.query) == (PROSE, QUESTION)
    assert [m.text for m in parts.messages] == [system, QUESTION]


def test_context_in_the_last_user_message():
    asked = TEMPLATES["llama_index"].format(doc=PROSE, q=QUESTION)
    parts = PromptParts.from_messages([("system", "You are helpful."), ("user", asked)])
    assert (parts.context, parts.query) == (PROSE, QUESTION)


def test_context_in_an_earlier_user_message():
    first = TEMPLATES["labels"].format(doc=PROSE, q="Who left?")
    parts = PromptParts.from_messages([("user", first), ("assistant", "A captain."), ("user", QUESTION)])
    assert (parts.context, parts.query) == (PROSE, QUESTION)


def test_a_user_message_that_is_only_a_document():
    parts = PromptParts.from_messages([("user", PROSE), ("user", QUESTION)])
    assert (parts.context, parts.query) == (PROSE, QUESTION)


def test_long_instructions_in_a_system_message_are_no_context():
    rules = "You are a careful clerk. " + "Always be brief and never guess. " * 60
    parts = PromptParts.from_messages([("system", rules), ("user", QUESTION)])
    assert (parts.context, parts.query) == ("", QUESTION)


def test_a_given_context_is_put_in_front_of_the_first_user_message():
    messages = [("system", "Be brief."), ("user", "Who left?"), ("assistant", "He."), ("user", QUESTION)]
    parts = PromptParts.from_messages(messages, context=PROSE)
    assert parts.messages[1].text == f"{PROSE}\n\nWho left?"
    assert (parts.context, parts.query) == (PROSE, QUESTION)
    only_system = PromptParts.from_messages([("system", "Be brief.")], context=PROSE)
    assert [m.role for m in only_system.messages] == ["system", "user"]
    assert only_system.context == PROSE


def test_a_short_tool_result_is_no_context():
    assert PromptParts.from_messages(tool_turns("42 ships.")).context == ""


def test_a_document_in_a_user_message_is_preferred_to_a_tool_result():
    question = f"Context:\n{LINES}\n\nQuestion: {QUESTION}"
    parts = PromptParts.from_messages(tool_turns(PROSE, question))
    assert (parts.query, parts.context) == (QUESTION, LINES)


def test_the_longest_tool_result_is_the_context():
    parts = PromptParts.from_messages([*tool_turns(PROSE[:600]), Message.of("tool", LINES, tool_call_id="2")])
    assert parts.context == LINES


def test_a_given_context_may_be_in_a_tool_result_but_a_query_not():
    turns = tool_turns(f"{QUESTION} {PROSE}")
    parts = PromptParts.from_messages(turns, query=QUESTION)
    marked = [(m.role, s.kind) for m in parts.messages for s in m.segments if s.kind != "scaffold"]
    assert marked == [("user", "query"), ("tool", "context")]
    parts = PromptParts.from_messages(turns, context=PROSE)
    assert (parts.query, parts.context) == (QUESTION, PROSE)
    assert parts.messages[3].segments[0].text == f"{QUESTION} "
