"""Find the context and the question in messages: by arguments, by tags, or by the layout of the text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from rapid_integrations.prompts import text_layout
from rapid_integrations.prompts.messages import Message, Segment, SegmentKind

# The separators of messages in prompts that are formatted for a model.
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
    """Mark the context and the question of a conversation.

    The context is the given one; else the text between tags; else a long text by its layout; else a long tool
    result.

    Args:
        unmarked: Messages of one scaffold segment each.
        query: The question, if known.
        context: The long document, if known. If it does not occur, it is put in front of the first user
            message.
        tags: Pairs of strings that enclose a context.
        raw: Whether the text is already formatted for the model.

    Returns:
        The messages with their segments marked, and the question to retrieve with if it differs from the
        query segments.
    """
    query = query if query and query.strip() else None
    context = context if context and context.strip() else None
    messages = tuple(unmarked)
    # The index of the message that asks the question.
    asking = max((i for i, m in enumerate(messages) if m.role == "user"), default=len(messages) - 1)

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
    if query is None and not raw:
        messages = _mark_question(messages, asking, tags)
    messages = tuple(
        replace(m, segments=tuple(s for s in m.segments if s.text) or (Segment("scaffold", ""),))
        for m in messages
    )
    if query is not None and not _has(messages, "query"):
        return messages, query
    return messages, _question_of_raw(messages) if raw and query is None else None


def _has(messages: Iterable[Message], kind: SegmentKind) -> bool:
    return any(s.kind == kind and s.text for message in messages for s in message.segments)


def insert_context(messages: Sequence[Message], context: str, *, first: bool) -> tuple[Message, ...]:
    """Put a context, followed by a blank line, in front of the first or last user message."""
    inserted = (Segment("context", context), Segment("scaffold", "\n\n"))
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    if not users:
        return (*messages, Message("user", inserted[:1]))
    i = users[0 if first else -1]
    return _with_segments(messages, i, (*inserted, *messages[i].segments))


def _with_segments(
    messages: Sequence[Message], index: int, segments: Sequence[Segment]
) -> tuple[Message, ...]:
    return (*messages[:index], replace(messages[index], segments=tuple(segments)), *messages[index + 1 :])


def _mark(
    messages: tuple[Message, ...], message: int, segment: int, span: text_layout.Span, kind: SegmentKind
) -> tuple[Message, ...]:
    """Give the characters ``span`` of a segment, named by two indices, another kind."""
    segments = messages[message].segments
    divided, (start, end) = segments[segment], span
    marked = [
        Segment(divided.kind, divided.text[:start]),
        Segment(kind, divided.text[start:end]),
        Segment(divided.kind, divided.text[end:]),
    ]
    marked = [part for part in marked if part.text]
    return _with_segments(messages, message, [*segments[:segment], *marked, *segments[segment + 1 :]])


def _mark_given_context(messages: tuple[Message, ...], context: str) -> tuple[Message, ...]:
    """Mark the first occurrence of ``context``."""
    for text in (context, context.strip()):
        for i, message in enumerate(messages):
            if (start := message.text.find(text)) >= 0:
                return _mark(messages, i, 0, (start, start + len(text)), "context")
    return messages


def _mark_given_query(messages: tuple[Message, ...], query: str) -> tuple[Message, ...]:
    """Mark the last occurrence of ``query`` outside the context and the tool results."""
    for text in (query, query.strip()):
        for i in reversed(range(len(messages))):
            segments = messages[i].segments if messages[i].role != "tool" else ()
            for j in reversed(range(len(segments))):
                if segments[j].kind == "scaffold" and (start := segments[j].text.rfind(text)) >= 0:
                    return _mark(messages, i, j, (start, start + len(text)), "query")
    return messages


def _mark_tagged(text: str, tags: Sequence[tuple[str, str]]) -> tuple[Segment, ...]:
    """Mark the texts between the first pair of tags that occurs.

    An opening tag pairs with the last closing tag before the next opening one, because a document may quote
    tags.
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
    """Mark the long document by its layout, in the asking message or else in the latest earlier one."""
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
        else:  # a long system message may be instructions: it needs a head that announces a document
            body = (
                text_layout.find_body(inner, (0, len(inner)))
                if text_layout.announces_document(inner)
                else None
            )
        if body is None or body[1] - body[0] < len(message.text.strip()) / 2:
            continue
        return _mark(messages, i, longest, (start + body[0], start + body[1]), "context")
    return messages


def _mark_longest_result(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Mark the longest tool result, if it has the minimum length of a document."""
    results = [i for i, message in enumerate(messages) if message.role == "tool"]
    longest = max(results, key=lambda i: len(messages[i].text), default=None)
    if longest is None or len(messages[longest].text.strip()) < text_layout.MIN_BODY_CHARS:
        return messages
    return _with_segments(messages, longest, [Segment("context", messages[longest].text)])


def _mark_question(
    messages: tuple[Message, ...], asking: int, tags: Sequence[tuple[str, str]]
) -> tuple[Message, ...]:
    """Mark the question of the asking message, in the text after its context or else before it."""
    if not messages:
        return messages
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
            closings = (closing for _, closing in tags if text.lstrip().startswith(closing))
            start = next((text.find(closing) + len(closing) for closing in closings), 0)
        elif contexts:
            openings = (opening for opening, _ in tags if text.rstrip().endswith(opening))
            end = next((text.rfind(opening) for opening in openings), end)
        span = text_layout.find_question_in(text[start:end], whole=not contexts)
        if span is None or not re.search(r"\w", text[start:end][slice(*span)]):
            continue
        return _mark(messages, asking, i, (start + span[0], start + span[1]), "query")
    return messages


def _longest_between_markup(text: str) -> tuple[int, int]:
    edges = [0, *(edge for match in _MARKUP.finditer(text) for edge in match.span()), len(text)]
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    return max(spans, key=lambda span: span[1] - span[0])


def without_markup(text: str) -> str:
    """Return ``text`` without its markup, or unchanged (but stripped) if it has no other text."""
    return re.sub(r"[ \t]{2,}", " ", _MARKUP.sub(" ", text)).strip() or text.strip()


def _question_of_raw(messages: tuple[Message, ...]) -> str | None:
    """Return the last text of several words between the markup of a formatted prompt, outside the context."""
    for segment in reversed(messages[-1].segments):
        if segment.kind == "context":
            continue
        for piece in reversed(_MARKUP.split(segment.text)):
            if len(piece.split()) > 1 and (span := text_layout.find_question_in(piece)):
                return piece[slice(*span)]
    return None
