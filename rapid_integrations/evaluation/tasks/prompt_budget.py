"""How long a document may be for a prompt to fit, and documents cut to that length."""

from __future__ import annotations

from collections.abc import Sequence

from rapid_integrations.errors import ContextLengthError
from rapid_integrations.evaluation.tasks.prompts import question_prompt
from rapid_integrations.evaluation.tasks.task import Task, TaskFormat, TaskQuestion
from rapid_integrations.pipeline import RapidPipeline
from rapid_integrations.tokenization.encoding import token_offsets

# Tokens may merge differently where the document meets the template, and where its halves meet.
_SLACK_TOKENS = 8


def document_budget(
    pipeline: RapidPipeline,
    questions: Sequence[TaskQuestion],
    form: TaskFormat,
    *,
    sequence_tokens: int,
) -> int:
    """The most tokens of a document with which every prompt and its answer fit.

    Args:
        pipeline: Whose tokenizer and chat template to count with.
        questions: Those that are asked about the document, at least one.
        form: With a prompt template; where it has no longest answer, the pipeline's is taken.
        sequence_tokens: For prompt and answer together.

    Raises:
        ContextLengthError: Nothing is left for the document, or the target reads fewer tokens.
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
    """Cut the middle out of a text that is too long: its first and its last half of the tokens stay.

    The way of ∞Bench and LongBench, which cut the whole prompt; here the instructions stay whole.

    Args:
        text: Any text.
        max_tokens: The most tokens to keep, at least 1.
        pipeline: Whose tokenizer to count with.

    Returns:
        The text itself where it is short enough.
    """
    starts = token_offsets(text, pipeline.tokenizer)
    if len(starts) <= max_tokens:
        return text
    kept = max_tokens
    while True:
        head, tail = kept // 2, kept - kept // 2
        shortened = text[: starts[head]] + text[starts[len(starts) - tail] :]
        # Counted anew: where the halves meet, a token may have been split.
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
    """A task whose document lost as much of its middle as it takes for every prompt and answer to fit.

    Args:
        pipeline: Whose tokenizer, chat template and window count.
        document: The whole document; evidence in it is no longer where it was, so questions name none.
        questions: About it, at least one.
        form: With a prompt template and the longest answer.
        sequence_tokens: For prompt and answer together, the task's nominal length; ``None`` takes the
            target's window.

    Raises:
        ContextLengthError: As :func:`document_budget`.
    """
    length = pipeline.context_window if sequence_tokens is None else sequence_tokens
    budget = document_budget(pipeline, questions, form, sequence_tokens=length)
    return Task(truncate_middle(document, budget, pipeline), tuple(questions), length, format=form)
