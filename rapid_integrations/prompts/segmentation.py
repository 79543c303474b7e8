"""Finding the context and the question in messages: given ones, tagged ones, or by the layout of the text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from rapid_integrations.prompts import text_layout as _layout
from rapid_integrations.prompts.messages import Message, Segment, SegmentKind

# Separators of messages and turns in prompts that are formatted for a model.
_MARKUP = re.compile(
    r"<[|｜][^<>\n]{1,60}?[|｜]>(?:(?:system|user|assistant)\b)?"
    r"|\[/?INST\]|<</?SYS>>|</?s>|<bos>|<(?:start|end)_of_turn>(?:user|model)?"
)


def mark_messages(
    given: Sequence[Message],
    query: str | None,
    context: str | None,
    tags: Sequence[tuple[str, str]],
    *,
    raw: bool,
) -> tuple[tuple[Message, ...], str | None]:
    """Mark the context and the question in messages.

    Args:
        given: Messages with one scaffold segment each.
        query: The question, if known.
        context: The long document, if known. It is put before the first user message if it does not occur.
        tags: Opening and closing strings around a context.
        raw: Whether the text is already formatted for the model.

    Returns:
        The messages, and the question for retrieval if it differs from the marked one.
    """
    query = query if query and query.strip() else None
    context = context if context and context.strip() else None
    messages = tuple(given)
    asking = max((i for i, message in enumerate(given) if message.role == "user"), default=len(given) - 1)

    if context is not None:
        messages = _mark_first(messages, context, "context")
        if not _has(messages, "context"):
            messages = insert_context(messages, context, first=True)
            asking += len(messages) - len(given)
    else:
        messages = tuple(replace(m, segments=_mark_tagged(m.text, tags)) for m in messages)
    if query is not None:
        messages = _mark_last(messages, query)
    if messages and not _has(messages, "context"):
        messages = _mark_body(messages, asking, raw=raw)
    if not _has(messages, "context"):
        messages = _mark_longest_result(messages)
    if query is None and not raw:
        messages = _mark_question(messages, asking, tags)
    kept = tuple(
        replace(m, segments=tuple(s for s in m.segments if s.text) or (Segment("scaffold", ""),))
        for m in messages
    )
    if query is not None and not _has(kept, "query"):
        return kept, query
    return kept, _question_of_raw(kept) if raw and query is None else None


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


def _mark(segment: Segment, start: int, end: int, kind: SegmentKind) -> list[Segment]:
    text = segment.text
    marked = [
        Segment(segment.kind, text[:start]),
        Segment(kind, text[start:end]),
        Segment(segment.kind, text[end:]),
    ]
    return [s for s in marked if s.text]


def _mark_first(messages: tuple[Message, ...], text: str, kind: SegmentKind) -> tuple[Message, ...]:
    for wanted in (text, text.strip()):
        for i, message in enumerate(messages):
            if (at := message.text.find(wanted)) >= 0:
                segments = tuple(_mark(message.segments[0], at, at + len(wanted), kind))
                return (*messages[:i], replace(message, segments=segments), *messages[i + 1 :])
    return messages


def _mark_last(messages: tuple[Message, ...], query: str) -> tuple[Message, ...]:
    for wanted in (query, query.strip()):
        for i in reversed(range(len(messages))):
            segments = messages[i].segments if messages[i].role != "tool" else ()
            for j in reversed(range(len(segments))):
                if segments[j].kind == "scaffold" and (at := segments[j].text.rfind(wanted)) >= 0:
                    marked = (
                        *segments[:j],
                        *_mark(segments[j], at, at + len(wanted), "query"),
                        *segments[j + 1 :],
                    )
                    return (*messages[:i], replace(messages[i], segments=marked), *messages[i + 1 :])
    return messages


def _mark_tagged(text: str, tags: Sequence[tuple[str, str]]) -> tuple[Segment, ...]:
    """Mark text between tags. A single opening tag pairs with the last closing one: texts may quote tags."""
    for opening, closing in tags:
        starts = [match.end() for match in re.finditer(re.escape(opening), text)]
        segments: list[Segment] = []
        done = 0
        for start, following in pairwise([*starts, len(text) + len(opening)]):
            end = text.rfind(closing, start, following - len(opening))
            if end > start and text[start:end].strip():
                start, end = _layout.trim(text, (start, end))
                segments += [Segment("scaffold", text[done:start]), Segment("context", text[start:end])]
                done = end
        if segments:
            return (*segments, Segment("scaffold", text[done:]))
    return (Segment("scaffold", text),)


def _mark_body(messages: tuple[Message, ...], asking: int, *, raw: bool) -> tuple[Message, ...]:
    """Mark the long document by the layout rule, in the asking message or else in an earlier one."""
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
            body = _layout.find_body_beside(inner, query_follows=query_follows)
        elif i == asking:
            body = _layout.find_layout(inner).body
        elif message.role == "user":
            body = _layout.find_layout(inner, asks=False).body or _layout.find_body(inner, (0, len(inner)))
        else:  # a long system message is a document only if it announces one
            body = _layout.find_body(inner, (0, len(inner))) if _layout.announced(inner) else None
        if body is None or body[1] - body[0] < len(message.text.strip()) / 2:
            continue
        marked = _mark(message.segments[longest], start + body[0], start + body[1], "context")
        segments = (*message.segments[:longest], *marked, *message.segments[longest + 1 :])
        return (*messages[:i], replace(message, segments=segments), *messages[i + 1 :])
    return messages


def _mark_longest_result(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Mark the longest result of a tool, if it has the minimum length of a document."""
    results = [i for i, message in enumerate(messages) if message.role == "tool"]
    at = max(results, key=lambda i: len(messages[i].text), default=None)
    if at is None or len(messages[at].text.strip()) < _layout.MIN_BODY_CHARS:
        return messages
    marked = (Segment("context", messages[at].text),)
    return (*messages[:at], replace(messages[at], segments=marked), *messages[at + 1 :])


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
            start = next((text.find(c) + len(c) for _, c in tags if text.lstrip().startswith(c)), 0)
        elif contexts:
            end = next((text.rfind(o) for o, _ in tags if text.rstrip().endswith(o)), end)
        span = _layout.find_question_in(text[start:end], whole=not contexts)
        if span is None or not re.search(r"\w", text[start:end][slice(*span)]):
            continue
        marked = (
            *segments[:i],
            *_mark(segments[i], start + span[0], start + span[1], "query"),
            *segments[i + 1 :],
        )
        return (*messages[:asking], replace(messages[asking], segments=marked), *messages[asking + 1 :])
    return messages


def _longest_between_markup(text: str) -> tuple[int, int]:
    edges = [0, *(edge for match in _MARKUP.finditer(text) for edge in match.span()), len(text)]
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    return max(spans, key=lambda span: span[1] - span[0])


def without_markup(text: str) -> str:
    """``text`` without markup, unless it is all markup."""
    return re.sub(r"[ \t]{2,}", " ", _MARKUP.sub(" ", text)).strip() or text.strip()


def _question_of_raw(messages: tuple[Message, ...]) -> str | None:
    """The last piece of text between the markup of a formatted prompt that is outside the context."""
    for segment in reversed(messages[-1].segments):
        if segment.kind == "context":
            continue
        for piece in reversed(_MARKUP.split(segment.text)):
            if len(piece.split()) > 1 and (span := _layout.find_question_in(piece)):
                return piece[slice(*span)]
    return None
