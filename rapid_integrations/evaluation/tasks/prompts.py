"""Prompt templates: text with placeholders for a document and a question."""

from __future__ import annotations

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.prompts import Message, PromptParts, Segment, SegmentKind


def question_prompt(template: str, *, context: str, question: str, answer_start: str = "") -> PromptParts:
    """The prompt that asks a question about a context.

    Args:
        template: Text with ``{context}`` and ``{question}`` once each, in this order.
        context: The document. Braces in it are plain text.
        question: The question.
        answer_start: The beginning of the answer, which becomes a part of the prompt.

    Raises:
        ConfigurationError: The template lacks a placeholder.
    """
    segments = fill_template(
        "prompt template", template, ("context", "context", context), ("question", "query", question)
    )
    return PromptParts(
        (Message("user", segments),),
        answer_start=(Segment("scaffold", answer_start),) if answer_start else (),
    )


def fill_template(what: str, template: str, *fields: tuple[str, SegmentKind, str]) -> tuple[Segment, ...]:
    """Fill a template's placeholders. Braces in the texts that are filled in are plain text.

    Args:
        what: The template's name in error messages.
        template: Text with one ``{name}`` for each field, in the same order.
        fields: The name, the segment kind and the text of each field.

    Returns:
        Segments whose texts join to the filled template, without empty ones.

    Raises:
        ConfigurationError: The template lacks a placeholder.
    """
    segments, rest = [], template
    for name, kind, text in fields:
        before, placeholder, rest = rest.partition(f"{{{name}}}")
        if not placeholder:
            names = " and then ".join(f"{{{field}}}" for field, _, _ in fields)
            raise ConfigurationError(f"the {what} {template!r} must hold {names}, once each.")
        segments += [Segment("scaffold", before), Segment(kind, text)]
    return tuple(segment for segment in (*segments, Segment("scaffold", rest)) if segment.text)
