"""``PromptParts``: a prompt as messages with marked context and question.

:class:`PromptParts` keeps a prompt's scaffold (template text), context (the long document) and query apart,
so that a retriever can find the drafter's context, and both models' prompts are made of one description.
:func:`~rapid_integrations.prompts.encode_prompt` turns it into tokens: only the chat template's own text, or
the scaffold of a ``raw`` prompt, may hold control tokens; ``<|im_start|>`` in a document is plain text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rapid_integrations.errors import PromptError
from rapid_integrations.prompts.messages import Message, Segment, SegmentKind
from rapid_integrations.prompts.segmentation import insert_context, mark_messages, without_markup

DEFAULT_TAGS: tuple[tuple[str, str], ...] = (
    ("<context>", "</context>"),
    ("<document>", "</document>"),
    ("<documents>", "</documents>"),
)

_ROLE = re.compile(r"[A-Za-z][\w-]*")


@dataclass(frozen=True, slots=True)
class PromptParts:
    """A prompt as messages of segments.

    Attributes:
        messages: The messages in order. A prompt that is a plain text is one ``"user"`` message.
        raw: Whether the text is already formatted for the model: no chat template is applied, and control
            tokens in scaffold segments are parsed.
        retrieval_query: The question for retrieval, if it differs from the query segments.
        tools: The tools that the model may call, as OpenAI's and transformers' ``{"type": "function", …}``.
        answer_start: The beginning of the answer, written for the model. It belongs to the prompt. Control
            tokens are parsed in scaffold segments only.
        visible_controls: Control tokens that are kept in the answer's text, because they mark tool calls.
        forced_tool: The tool of a forced call, if the model only writes its arguments.
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
        """Parse a text prompt.

        Args:
            text: The whole prompt.
            query: The question, if known. Its last occurrence outside the context and the results of tools
                becomes the query segment. If it does not occur, it is used for retrieval only, and the text
                is not changed.
            context: The long document, if known. If it does not occur in the text, it is put before it.
            raw: Whether ``text`` is already formatted for the model. The question then stays part of the
                scaffold, unless it is given.
            tags: Opening and closing strings around a context in the text, used if ``context`` is not given.
                Without tags in the text, :mod:`rapid_integrations.prompts.text_layout` finds the context.

        Raises:
            PromptError: Text and context contain only whitespace.
        """
        messages, outside = mark_messages([Message.of("user", text)], query, context, tags, raw=raw)
        parts = cls(messages, raw=raw, retrieval_query=outside)
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
        """Parse a conversation.

        The context is found in a system or user message; otherwise it is the longest result of a tool, if
        that is long. The query is the last user message without its context, also if tools were called since.
        A given context that does not occur is put before the first user message, so that its position does
        not change as the conversation continues.

        Args:
            messages: ``(role, text)`` pairs or messages; roles are those of chat templates (``"system"``,
                ``"user"``, …).
            query: As in :meth:`from_text`.
            context: As in :meth:`from_text`.
            tags: As in :meth:`from_text`.
            tools: The tools that the model may call, see :attr:`tools`.

        Raises:
            PromptError: There is no message, all messages are empty, or a role is not a plain word.
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
        marked, outside = mark_messages(given, query, context, tags, raw=False)
        parts = cls(marked, retrieval_query=outside, tools=tuple(tools))
        if not parts.text.strip():
            raise PromptError(
                f"the prompt is empty ({len(given)} messages, no text): give it a question or a context."
            )
        return parts

    @property
    def context(self) -> str:
        """The context segments joined by blank lines; ``""`` if there are none."""
        return "\n\n".join(self._texts("context"))

    @property
    def query(self) -> str:
        """The question for retrieval. Empty only if the prompt has no text outside its context."""
        if self.retrieval_query is not None:
            return self.retrieval_query
        if query := "\n\n".join(self._texts("query")).strip():
            return query
        for message in reversed(self.messages):
            outside = "".join(s.text for s in message.segments if s.kind != "context")
            if message.role == "user" and (text := without_markup(outside)):
                return text
        return without_markup("\n".join(self._texts("scaffold")))

    @property
    def text(self) -> str:
        """All messages' text, for display."""
        return "\n\n".join(message.text for message in self.messages)

    def with_context(self, context: str) -> PromptParts:
        """The same prompt with another context.

        Args:
            context: Replaces the first context segment; further ones are removed. In a prompt without
                context, it is put before the last user message. ``""`` removes the context.
        """
        query = self.query
        if not self._texts("context"):
            messages = (
                insert_context(self.messages, context, first=False) if context.strip() else self.messages
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
