"""Prompt templates."""

from rapid_integrations.evaluation.tasks.prompts import question_prompt


def test_a_question_about_braces_is_only_text():
    prompt = question_prompt("{context} | {question}", context="{question} {0}", question="{context}?")
    assert prompt.text == "{question} {0} | {context}?"
    assert (prompt.context, prompt.query) == ("{question} {0}", "{context}?")
