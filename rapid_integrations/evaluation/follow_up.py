"""A second question about the first answer, for tasks that let a model think before it chooses."""

from __future__ import annotations

from rapid_integrations.config import GenerationOptions
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.tasks import TaskFormat, TaskQuestion
from rapid_integrations.pipeline import Completion, RapidPipeline
from rapid_integrations.prompts import Message, PromptParts, Segment


def follow_up_prompt(template: str, *, question: str, answer: str) -> PromptParts:
    """The prompt that asks again, about a first answer.

    Args:
        template: Text with ``{question}`` and ``{answer}`` once each, in this order.
        question: The first question; braces in it mean nothing.
        answer: The first answer.

    Raises:
        ConfigurationError: The template lacks a place.
    """
    before, found_question, rest = template.partition("{question}")
    between, found_answer, after = rest.partition("{answer}")
    if not (found_question and found_answer):
        raise ConfigurationError(
            f"the follow-up template {template!r} must hold {{question}} and then {{answer}}, once each."
        )
    segments = (
        Segment("scaffold", before),
        Segment("query", question),
        Segment("scaffold", between),
        Segment("query", answer),
        Segment("scaffold", after),
    )
    return PromptParts((Message("user", tuple(s for s in segments if s.text)),))


def asked_again(
    pipeline: RapidPipeline,
    form: TaskFormat,
    question: TaskQuestion,
    answer: str,
    options: GenerationOptions,
) -> str:
    """What the target says to the follow-up, by plain decoding; its cost is in nobody's figures.

    Args:
        pipeline: The models.
        form: With a follow-up template.
        question: The first question.
        answer: The first answer.
        options: Those of the first answer.

    Raises:
        RapidError: The follow-up cannot be answered.
    """
    prompt = follow_up_prompt(
        form.follow_up_template or "", question=question.question, answer=answer.strip()
    )
    plain = options.override(num_draft_tokens=0, max_new_tokens=form.follow_up_tokens)
    for event in pipeline.stream(prompt, options=plain):
        if isinstance(event, Completion):
            return event.text
    raise ConfigurationError("the follow-up ended without a completion.")
