"""Prompts of single questions, and follow-ups."""

from dataclasses import replace

import pytest
from helpers.evaluation_pipelines import ScriptedPipeline

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation import TaskFormat, demo_tasks, evaluate
from rapid_integrations.evaluation.running.follow_up import follow_up_prompt

TASKS = demo_tasks(context=512, num_questions=2, seed=2)


def test_a_task_format_sets_the_prompt_and_the_length():
    document = TASKS[0].document
    form = TaskFormat("f1", prompt_template="Look: {context}! {question}", max_new_tokens=77)
    pipeline = ScriptedPipeline(lambda call: "x")
    evaluate(pipeline, [replace(TASKS[0], format=form)], ["lc", "rapid"])
    calls = pipeline.measured_calls
    assert {call.options.sampling.max_new_tokens for call in calls} == {77}
    assert calls[0].prompt.text == f"Look: {document}! {TASKS[0].questions[0].question}"
    with pytest.raises(ConfigurationError, match="no metric 'bleu'"):
        evaluate(pipeline, [replace(TASKS[0], format=TaskFormat("bleu"))], ["lc"])


def test_the_follow_up_must_name_question_and_answer():
    prompt = follow_up_prompt("Q: {question} A: {answer}.", question="{answer}?", answer="{x}")
    assert prompt.text == "Q: {answer}? A: {x}."
    with pytest.raises(ConfigurationError, match=r"must hold \{question\} and then \{answer\}"):
        follow_up_prompt("{answer} {question}", question="", answer="")
