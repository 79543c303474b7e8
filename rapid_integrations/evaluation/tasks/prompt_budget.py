"""The maximum length of a document in a prompt, and truncation to this length."""

from __future__ import annotations

from collections.abc import Sequence

from rapid_integrations.errors import ContextLengthError
from rapid_integrations.evaluation.tasks.prompts import question_prompt
from rapid_integrations.evaluation.tasks.task import Task, TaskFormat, TaskQuestion
from rapid_integrations.pipeline import RapidPipeline
from rapid_integrations.tokenization.encoding import token_offsets

# Tokens may merge differently at the borders between the document and the template, and between its halves.
_SLACK_TOKENS = 8


def document_budget(
    pipeline: RapidPipeline,
    questions: Sequence[TaskQuestion],
    form: TaskFormat,
    *,
    sequence_tokens: int,
) -> int:
    """Compute the maximum number of document tokens with which all prompts and answers fit.

    Args:
        pipeline: The pipeline with the tokenizer and the chat template.
        questions: The questions about the document, at least one.
        form: A format with a prompt template. If it has no ``max_new_tokens``, the pipeline's is used.
        sequence_tokens: Maximum length of prompt and answer together.

    Raises:
        ContextLengthError: No tokens are left for the document, or the target has a shorter context window.
    """
    if sequence_tokens > pipeline.context_window:
        raise ContextLengthError(
            f"'{pipeline.name}' reads {pipeline.context_window:,} tokens, not {sequence_tokens:,}: lower "
            "--contexts."
        )
    template, max_new_tokens = form.prompt_template or "", form.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = pipeline.options.sampling.max_new_tokens
    around = max(
        len(
            pipeline.encode(
                question_prompt(template, context="", question=q.question, answer_start=q.answer_start)
            )
        )
        for q in questions
    )
    budget = sequence_tokens - max_new_tokens - around - _SLACK_TOKENS
    if budget < 1:
        raise ContextLengthError(
            f"{sequence_tokens:,} tokens leave no room for a document: the question takes {around:,} and the "
            f"answer up to {max_new_tokens:,}. Allow more tokens with --contexts, lower --max-new-tokens, or "
            "take a model with a longer context window."
        )
    return budget


def truncate_middle(text: str, max_tokens: int, pipeline: RapidPipeline) -> str:
    """Shorten a text by removing its middle: equal numbers of tokens remain at the start and the end.

    ∞Bench and LongBench truncate the whole prompt in this way. Here the instructions stay complete.

    Args:
        text: Any text.
        max_tokens: Maximum number of tokens to keep, at least 1.
        pipeline: The pipeline with the tokenizer.

    Returns:
        The shortened text, or the same text if it is short enough.
    """
    starts = token_offsets(text, pipeline.tokenizer)
    if len(starts) <= max_tokens:
        return text
    kept = max_tokens
    while True:
        head, tail = kept // 2, kept - kept // 2
        shortened = text[: starts[head]] + text[starts[len(starts) - tail] :]
        # Count again: a token at the border of the halves may have been split.
        excess = pipeline.count_tokens(shortened) - max_tokens
        if excess <= 0 or kept == 1:
            return shortened
        kept = max(1, kept - excess)


def truncated_task(
    pipeline: RapidPipeline,
    document: str,
    questions: Sequence[TaskQuestion],
    form: TaskFormat,
    *,
    sequence_tokens: int | None,
) -> Task:
    """Make a task whose document is truncated in the middle so that all prompts and answers fit.

    Args:
        pipeline: The pipeline with the tokenizer, the chat template and the context window.
        document: The whole document.
        questions: At least one question, without evidence: truncation would move its spans.
        form: A format with a prompt template and a maximum length of answers.
        sequence_tokens: Maximum length of prompt and answer together, which is the task's nominal length;
            ``None`` is the target's context window.

    Raises:
        ContextLengthError: As :func:`document_budget`.
    """
    length = pipeline.context_window if sequence_tokens is None else sequence_tokens
    budget = document_budget(pipeline, questions, form, sequence_tokens=length)
    return Task(truncate_middle(document, budget, pipeline), tuple(questions), length, format=form)
