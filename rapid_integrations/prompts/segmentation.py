"""Division of messages into scaffold, context and query segments.

The context is, in this order of preference: the one that the caller gave; the text between tags; the long
body of a message (:mod:`rapid_integrations.prompts.text_layout`); the longest result of a tool. The query is
the one that the caller gave, or the question of the last user message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from rapid_integrations.prompts import text_layout
from rapid_integrations.prompts.messages import Message, Segment, SegmentKind
from rapid_integrations.prompts.text_layout import Span

# Separators of messages and turns in prompts that are formatted for a model.
_MARKUP = re.compile(
    r"<[|｜][^<>\n]{1,60}?[|｜]>(?:(?:system|user|assistant)\b)?"
    r"|\[/?INST\]|<</?SYS>>|</?s>|<bos>|<(?:start|end)_of_turn>(?:user|model)?"
)


def mark_messages(
    unmarked: Sequence[Message],
    query: str | None,
    context: str | None,
    tags: Sequence[tuple[str, str]],
    *,
    raw: bool,
) -> tuple[tuple[Message, ...], str | None]:
    """Mark the context and the question in messages.

    Args:
        unmarked: Messages with one scaffold segment each.
        query: The question, if known.
        context: The long document, if known. It is put before the first user message if it does not occur.
        tags: Opening and closing strings around a context.
        raw: Whether the text is already formatted for the model.

    Returns:
        The messages, and the question for retrieval if it differs from the marked one.
    """
    query = query if query and query.strip() else None
    context = context if context and context.strip() else None
    messages = tuple(unmarked)
    # The index of the message with the question
    asking = max((i for i, m in enumerate(unmarked) if m.role == "user"), default=len(unmarked) - 1)

    if context is not None:
        messages = _mark_given_context(messages, context)
        if not _has(messages, "context"):
            messages = insert_context(messages, context, first=True)
            asking += len(messages) - len(unmarked)
    else:
        messages = tuple(replace(m, segments=_mark_tagged(m.text, tags)) for m in messages)
    if query is not None:
        messages = _mark_given_query(messages, query)
    if messages and not _has(messages, "context"):
        messages = _mark_body(messages, asking, raw=raw)
    if not _has(messages, "context"):
        messages = _mark_longest_result(messages)
    if query is None and messages and not raw:
        messages = _mark_question(messages, asking, tags)
    messages = tuple(replace(m, segments=_without_empty(m.segments)) for m in messages)

    if query is not None:
        return messages, None if _has(messages, "query") else query
    return messages, _question_of_raw(messages) if raw else None


def _without_empty(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    return tuple(s for s in segments if s.text) or (Segment("scaffold", ""),)


def _has(messages: Iterable[Message], kind: SegmentKind) -> bool:
    return any(s.kind == kind and s.text for message in messages for s in message.segments)


def insert_context(messages: Sequence[Message], context: str, *, first: bool) -> tuple[Message, ...]:
    """Put a context and a blank line before the first or last user message."""
    added = (Segment("context", context), Segment("scaffold", "\n\n"))
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    if not users:
        return (*messages, Message("user", added[:1]))
    at = users[0 if first else -1]
    return (
        *messages[:at],
        replace(messages[at], segments=(*added, *messages[at].segments)),
        *messages[at + 1 :],
    )


def _mark_span(
    messages: Sequence[Message], message_index: int, segment_index: int, span: Span, kind: SegmentKind
) -> tuple[Message, ...]:
    """Make a span of one segment's text a segment of its own."""
    message = messages[message_index]
    segment = message.segments[segment_index]
    start, end = span
    divided = (
        Segment(segment.kind, segment.text[:start]),
        Segment(kind, segment.text[start:end]),
        Segment(segment.kind, segment.text[end:]),
    )
    segments = (
        *message.segments[:segment_index],
        *(s for s in divided if s.text),
        *message.segments[segment_index + 1 :],
    )
    return (
        *messages[:message_index],
        replace(message, segments=segments),
        *messages[message_index + 1 :],
    )


def _mark_given_context(messages: tuple[Message, ...], context: str) -> tuple[Message, ...]:
    """Mark the first occurrence of the context."""
    for wanted in (context, context.strip()):
        for i, message in enumerate(messages):
            if (start := message.text.find(wanted)) >= 0:
                return _mark_span(messages, i, 0, (start, start + len(wanted)), "context")
    return messages


def _mark_given_query(messages: tuple[Message, ...], query: str) -> tuple[Message, ...]:
    """Mark the last occurrence of the query outside the context and the results of tools."""
    for wanted in (query, query.strip()):
        for i in reversed(range(len(messages))):
            segments = messages[i].segments if messages[i].role != "tool" else ()
            for j in reversed(range(len(segments))):
                if segments[j].kind == "scaffold" and (start := segments[j].text.rfind(wanted)) >= 0:
                    return _mark_span(messages, i, j, (start, start + len(wanted)), "query")
    return messages


def _mark_tagged(text: str, tags: Sequence[tuple[str, str]]) -> tuple[Segment, ...]:
    """Mark the text between tags.

    An opening tag pairs with the last closing tag before the next opening one, because a document may quote a
    closing tag.
    """
    for opening, closing in tags:
        starts = [match.end() for match in re.finditer(re.escape(opening), text)]
        segments: list[Segment] = []
        done = 0
        for start, following in pairwise([*starts, len(text) + len(opening)]):
            end = text.rfind(closing, start, following - len(opening))
            if end > start and text[start:end].strip():
                start, end = text_layout.trim(text, (start, end))
                segments += [Segment("scaffold", text[done:start]), Segment("context", text[start:end])]
                done = end
        if segments:
            return (*segments, Segment("scaffold", text[done:]))
    return (Segment("scaffold", text),)


def _mark_body(messages: tuple[Message, ...], asking: int, *, raw: bool) -> tuple[Message, ...]:
    """Mark the long document by the layout of the text, in the message at ``asking`` or an earlier one."""
    candidates = [asking] + [i for i in reversed(range(asking)) if messages[i].role in ("system", "user")]
    for i in candidates:
        message = messages[i]
        longest = max(range(len(message.segments)), key=lambda j: len(message.segments[j].text), default=0)
        if not message.segments or message.segments[longest].kind != "scaffold":
            continue
        text = message.segments[longest].text
        start, end = _longest_between_markup(text) if raw else (0, len(text))
        inner = text[start:end]
        if _has((message,), "query"):
            query_follows = any(s.kind == "query" for s in message.segments[longest:])
            body = text_layout.find_body_beside(inner, query_follows=query_follows)
        elif i == asking:
            body = text_layout.find_layout(inner).body
        elif message.role == "user":
            body = text_layout.find_layout(inner, asks=False).body or text_layout.find_body(
                inner, (0, len(inner))
            )
        else:  # a long system message is a document only if it announces one
            body = text_layout.find_body(inner, (0, len(inner))) if text_layout.announced(inner) else None
        if body is None or body[1] - body[0] < len(message.text.strip()) / 2:
            continue
        return _mark_span(messages, i, longest, (start + body[0], start + body[1]), "context")
    return messages


def _mark_longest_result(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Mark the longest result of a tool, if it has the minimum length of a document."""
    results = [i for i, message in enumerate(messages) if message.role == "tool"]
    longest = max(results, key=lambda i: len(messages[i].text), default=None)
    if longest is None or len(messages[longest].text.strip()) < text_layout.MIN_BODY_CHARS:
        return messages
    return _mark_span(messages, longest, 0, (0, len(messages[longest].text)), "context")


def _mark_question(
    messages: tuple[Message, ...], asking: int, tags: Sequence[tuple[str, str]]
) -> tuple[Message, ...]:
    """Mark the question of the message at ``asking``, in the text after its context or else before it."""
    segments = messages[asking].segments
    contexts = [i for i, s in enumerate(segments) if s.kind == "context"]
    after = range(contexts[-1] + 1, len(segments)) if contexts else range(len(segments))
    before = range(contexts[0]) if contexts else range(0)
    for i in (*after, *before):
        if segments[i].kind != "scaffold":
            continue
        text = segments[i].text
        start, end = 0, len(text)
        if contexts and i in after:
            start = next((text.find(c) + len(c) for _, c in tags if text.lstrip().startswith(c)), 0)
        elif contexts:
            end = next((text.rfind(o) for o, _ in tags if text.rstrip().endswith(o)), end)
        span = text_layout.find_question_in(text[start:end], whole=not contexts)
        if span is None or not re.search(r"\w", text[start:end][slice(*span)]):
            continue
        return _mark_span(messages, asking, i, (start + span[0], start + span[1]), "query")
    return messages


def _longest_between_markup(text: str) -> Span:
    edges = [0, *(edge for match in _MARKUP.finditer(text) for edge in match.span()), len(text)]
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    return max(spans, key=lambda span: span[1] - span[0])


def without_markup(text: str) -> str:
    """``text`` without markup; ``text`` itself if it consists of markup only."""
    return re.sub(r"[ \t]{2,}", " ", _MARKUP.sub(" ", text)).strip() or text.strip()


def _question_of_raw(messages: tuple[Message, ...]) -> str | None:
    """The last piece of text between the markup of a formatted prompt that is outside the context."""
    for segment in reversed(messages[-1].segments):
        if segment.kind == "context":
            continue
        for piece in reversed(_MARKUP.split(segment.text)):
            if len(piece.split()) > 1 and (span := text_layout.find_question_in(piece)):
                return piece[slice(*span)]
    return None
