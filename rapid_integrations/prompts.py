"""Prompts in parts, and their tokens.

:class:`PromptParts` keeps a prompt's scaffold (template text), context (the long document) and query apart,
so that a retriever can pick the drafter's context and both models' prompts come from one description.
:func:`encode_prompt` turns it into tokens: only the chat template's own text, or the scaffold of a ``raw``
prompt, may hold control tokens; ``<|im_start|>`` in a document is plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from rapid_integrations import _layout
from rapid_integrations._prompt_encoding import encode_prompt
from rapid_integrations.errors import PromptError
from rapid_integrations.tools import ToolCall

__all__ = ["DEFAULT_TAGS", "Message", "PromptParts", "Segment", "SegmentKind", "encode_prompt"]

SegmentKind = Literal["scaffold", "context", "query"]

DEFAULT_TAGS: tuple[tuple[str, str], ...] = (
    ("<context>", "</context>"),
    ("<document>", "</document>"),
    ("<documents>", "</documents>"),
)

# What separates messages and turns in prompts that are formatted for a model.
_MARKUP = re.compile(
    r"<[|｜][^<>\n]{1,60}?[|｜]>(?:(?:system|user|assistant)\b)?"
    r"|\[/?INST\]|<</?SYS>>|</?s>|<bos>|<(?:start|end)_of_turn>(?:user|model)?"
)
_ROLE = re.compile(r"[A-Za-z][\w-]*")


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of text of one kind."""

    kind: SegmentKind
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message; its segments joined are its text.

    Attributes:
        role: That of chat templates: ``"system"``, ``"user"``, ``"assistant"``, ``"tool"``, …
        segments: Its text.
        tool_calls: What an assistant's message asks for.
        tool_call_id: Which call a tool's message answers.
        name: The tool that a tool's message comes from.
    """

    role: str
    segments: tuple[Segment, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @classmethod
    def of(cls, role: str, text: str, **rest: Any) -> Message:
        """A message of one text; ``rest`` are the other attributes."""
        return cls(role, (Segment("scaffold", text),), **rest)

    @property
    def text(self) -> str:
        """The message's text."""
        return "".join(segment.text for segment in self.segments)


@dataclass(frozen=True, slots=True)
class PromptParts:
    """A prompt as messages of segments.

    Attributes:
        messages: In order; a prompt that is one text is one ``"user"`` message.
        raw: The text is formatted for the model already: no chat template is applied, and control tokens in
            the scaffold are parsed.
        retrieval_query: The question to retrieve with, where it is not what the query segments say.
        tools: What the model may call, each as OpenAI's and transformers' ``{"type": "function", …}``.
        answer_start: Text the answer must begin with: it is part of the prompt, not of the answer. Control
            tokens are parsed in scaffold segments only.
        visible_controls: Control tokens that stay in the answer's text, since they mark its tool calls.
        forced_tool: The tool whose arguments are all that is left to write of the answer.
    """

    messages: tuple[Message, ...]
    raw: bool = False
    retrieval_query: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    answer_start: tuple[Segment, ...] = ()
    visible_controls: frozenset[str] = frozenset()
    forced_tool: str | None = None

    @classmethod
    def from_text(
        cls,
        text: str,
        *,
        query: str | None = None,
        context: str | None = None,
        raw: bool = False,
        tags: Sequence[tuple[str, str]] = DEFAULT_TAGS,
    ) -> PromptParts:
        """Take a text prompt apart.

        Args:
            text: The whole prompt.
            query: The question, if known. Its last occurrence outside the context and the results of tools is
                the query segment; if there is none, it is what is retrieved with and the text stays as it is.
            context: The long document, if known. One that does not occur in the text is put in front of it.
            raw: ``text`` is formatted for the model already. The query then stays part of the scaffold,
                unless given.
            tags: Opening and closing strings around a context in the text, tried where ``context`` is not
                given. Without any, :mod:`rapid_integrations._layout` says what the context is.

        Raises:
            PromptError: Neither the text nor the context holds anything but whitespace.
        """
        parts = _take_apart([Message.of("user", text)], query, context, tags, raw=raw)
        if not parts.text.strip():
            raise PromptError("the prompt is empty: give it a question, a context, or both.")
        return parts

    @classmethod
    def from_messages(
        cls,
        messages: Sequence[tuple[str, str] | Message],
        *,
        query: str | None = None,
        context: str | None = None,
        tags: Sequence[tuple[str, str]] = DEFAULT_TAGS,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> PromptParts:
        """Take a conversation apart.

        The context may stand in a system or a user message, else it is the longest result of a tool, if that
        is long. The query is the last user message less its context, also where tools were called since. A
        given context that does not occur is put in front of the first user message, so that it stays in its
        place when the conversation goes on.

        Args:
            messages: ``(role, text)`` pairs or messages; roles are those of chat templates (``"system"``,
                ``"user"``, …).
            query: As in :meth:`from_text`.
            context: As in :meth:`from_text`.
            tags: As in :meth:`from_text`.
            tools: What the model may call, see :attr:`tools`.

        Raises:
            PromptError: There is no message, all are empty, or a role is not a plain word.
        """
        given = [
            replace(m, segments=(Segment("scaffold", m.text),)) if isinstance(m, Message) else Message.of(*m)
            for m in messages
        ]
        for message in given:
            if not _ROLE.fullmatch(message.role):
                raise PromptError(
                    f"a message has the role {message.role!r}: roles are words such as 'system' or 'user'."
                )
        parts = _take_apart(given, query, context, tags, raw=False)
        if not parts.text.strip():
            raise PromptError(
                f"the prompt is empty ({len(given)} messages, no text): give it a question or a context."
            )
        return replace(parts, tools=tuple(tools))

    @property
    def context(self) -> str:
        """The context segments joined by blank lines; ``""`` if there are none."""
        return "\n\n".join(self._texts("context"))

    @property
    def query(self) -> str:
        """What to retrieve with. Empty only where the prompt has no text outside its context."""
        if self.retrieval_query is not None:
            return self.retrieval_query
        if query := "\n\n".join(self._texts("query")).strip():
            return query
        for message in reversed(self.messages):
            outside = "".join(s.text for s in message.segments if s.kind != "context")
            if message.role == "user" and (text := _without_markup(outside)):
                return text
        return _without_markup("\n".join(self._texts("scaffold")))

    @property
    def text(self) -> str:
        """All messages' text, for display."""
        return "\n\n".join(message.text for message in self.messages)

    def with_context(self, context: str) -> PromptParts:
        """The same prompt on another context.

        Args:
            context: Takes the place of the first context segment; the others go. In a prompt without one it
                is put in front of the last user message. ``""`` leaves no context.
        """
        query = self.query
        if not self._texts("context"):
            messages = (
                _insert_context(self.messages, context, first=False) if context.strip() else self.messages
            )
        else:
            pending = [Segment("context", context)] if context else []
            rebuilt = []
            for message in self.messages:
                segments: list[Segment] = []
                for segment in message.segments:
                    if segment.kind != "context":
                        segments.append(segment)
                    elif pending:
                        segments.append(pending.pop())
                rebuilt.append(replace(message, segments=tuple(segments)))
            messages = tuple(rebuilt)
        return replace(self, messages=messages, retrieval_query=query)

    def _texts(self, kind: SegmentKind) -> list[str]:
        return [s.text for message in self.messages for s in message.segments if s.kind == kind]


def _take_apart(
    given: list[Message],
    query: str | None,
    context: str | None,
    tags: Sequence[tuple[str, str]],
    *,
    raw: bool,
) -> PromptParts:
    query = query if query and query.strip() else None
    context = context if context and context.strip() else None
    messages = tuple(given)
    asking = max((i for i, message in enumerate(given) if message.role == "user"), default=len(given) - 1)

    if context is not None:
        messages = _mark_first(messages, context, "context")
        if not _has(messages, "context"):
            messages = _insert_context(messages, context, first=True)
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
    parts = PromptParts(kept, raw=raw)
    if query is not None and not _has(kept, "query"):
        return replace(parts, retrieval_query=query)
    if raw and query is None and (outside := _question_of_raw(kept)):
        return replace(parts, retrieval_query=outside)
    return parts


def _has(messages: Iterable[Message], kind: SegmentKind) -> bool:
    return any(s.kind == kind and s.text for message in messages for s in message.segments)


def _insert_context(messages: Sequence[Message], context: str, *, first: bool) -> tuple[Message, ...]:
    """Put a context, followed by a blank line, in front of the first or last user message."""
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
    """Mark what stands between tags. A lone opening tag pairs with the last closing one: texts quote tags."""
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
    """Mark the long document by the layout rule: in the asking message, else in an earlier one."""
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
        else:  # long instructions of a system message are a document only if they say so
            body = _layout.find_body(inner, (0, len(inner))) if _layout.announced(inner) else None
        if body is None or body[1] - body[0] < len(message.text.strip()) / 2:
            continue
        marked = _mark(message.segments[longest], start + body[0], start + body[1], "context")
        segments = (*message.segments[:longest], *marked, *message.segments[longest + 1 :])
        return (*messages[:i], replace(message, segments=segments), *messages[i + 1 :])
    return messages


def _mark_longest_result(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Mark the longest text that a tool returned, if it is as long as a document must be."""
    results = [i for i, message in enumerate(messages) if message.role == "tool"]
    at = max(results, key=lambda i: len(messages[i].text), default=None)
    if at is None or len(messages[at].text.strip()) < _layout.MIN_BODY_CHARS:
        return messages
    marked = (Segment("context", messages[at].text),)
    return (*messages[:at], replace(messages[at], segments=marked), *messages[at + 1 :])


def _mark_question(
    messages: tuple[Message, ...], asking: int, tags: Sequence[tuple[str, str]]
) -> tuple[Message, ...]:
    """Mark the question of the asking message: in the text after its context, else in that before it."""
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


def _without_markup(text: str) -> str:
    """``text`` less its markup, unless it is all markup."""
    return re.sub(r"[ \t]{2,}", " ", _MARKUP.sub(" ", text)).strip() or text.strip()


def _question_of_raw(messages: tuple[Message, ...]) -> str | None:
    """The last piece between a formatted prompt's markup that says something outside the context."""
    for segment in reversed(messages[-1].segments):
        if segment.kind == "context":
            continue
        for piece in reversed(_MARKUP.split(segment.text)):
            if len(piece.split()) > 1 and (span := _layout.find_question_in(piece)):
                return piece[slice(*span)]
    return None
