"""A follow-up question about the first answer, for tasks in which a model reasons before it chooses."""

from __future__ import annotations

from rapid_integrations.config import GenerationOptions
from rapid_integrations.evaluation.tasks.prompts import fill_template
from rapid_integrations.evaluation.tasks.task import TaskFormat, TaskQuestion
from rapid_integrations.pipeline import RapidPipeline
from rapid_integrations.prompts import Message, PromptParts


def follow_up_prompt(template: str, *, question: str, answer: str) -> PromptParts:
    """The prompt of the follow-up question.

    Args:
        template: Text with ``{question}`` and ``{answer}`` once each, in this order.
        question: The first question; braces in it are plain text.
        answer: The first answer.

    Raises:
        ConfigurationError: The template lacks a placeholder.
    """
    segments = fill_template(
        "follow-up template", template, ("question", "query", question), ("answer", "query", answer)
    )
    return PromptParts((Message("user", segments),))


def asked_again(
    pipeline: RapidPipeline,
    form: TaskFormat,
    question: TaskQuestion,
    answer: str,
    options: GenerationOptions,
) -> str:
    """The target's answer to the follow-up, by plain decoding. Its cost is not measured.

    Args:
        pipeline: The models.
        form: With a follow-up template.
        question: The first question.
        answer: The first answer.
        options: The options of the first answer.

    Raises:
        RapidError: The follow-up cannot be answered.
    """
    prompt = follow_up_prompt(
        form.follow_up_template or "", question=question.question, answer=answer.strip()
    )
    plain = options.override(num_draft_tokens=0, max_new_tokens=form.follow_up_tokens)
    (completion,) = pipeline.generate([prompt], options=plain)
    return completion.text
