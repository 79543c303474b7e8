"""A prompt divided into scaffold (template text), context (the long document) and query.

The target reads the whole prompt; for the drafter, :meth:`PromptParts.with_context` replaces the context by
the chunks that a retriever chose. :func:`~rapid_integrations.prompts.encode_prompt` encodes either.
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
        messages: In order; a plain text is one ``"user"`` message.
        raw: Whether the text is already formatted for the model. Then no chat template is applied, and
            control tokens in the scaffold are parsed.
        retrieval_query: The question to retrieve with, if it differs from the query segments.
        tools: The tools that the model may call, each in the format of OpenAI and transformers,
            ``{"type": "function", …}``.
        answer_start: The text that the answer must begin with. It belongs to the prompt, not to the answer.
            Control tokens are parsed in its scaffold segments only.
        visible_controls: Control tokens that stay in the text of the answer, because they mark its tool
            calls.
        forced_tool: The tool whose call ``answer_start`` begins, so that the answer consists of its
            arguments.
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
        """Divide a text prompt into segments.

        Args:
            text: The whole prompt.
            query: The question, if known. Its last occurrence outside the context and the tool results
                becomes the query segment. If it does not occur, it is only used to retrieve.
            context: The long document, if known. If it does not occur in the text, it is put in front of it.
            raw: Whether ``text`` is already formatted for the model. Then only a given query becomes a
                segment.
            tags: Pairs of strings that enclose a context in the text, used if ``context`` is not given. If
                none occurs, the layout of the text decides (:mod:`rapid_integrations.prompts.text_layout`).

        Raises:
            PromptError: The text and the context are empty or whitespace.
        """
        messages, retrieval_query = mark_messages([Message.of("user", text)], query, context, tags, raw=raw)
        parts = cls(messages, raw=raw, retrieval_query=retrieval_query)
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
        """Divide a conversation into segments.

        The context is searched for in system and user messages; if they have none, the longest tool result is
        the context, provided that it is long. The query is the last user message without its context, even if
        tools were called after it. A given context that does not occur in any message is put in front of the
        first user message, so that it keeps its position as the conversation grows.

        Args:
            messages: ``(role, text)`` pairs or messages. Roles are those of chat templates (``"system"``,
                ``"user"``, …).
            query: As in :meth:`from_text`.
            context: As in :meth:`from_text`.
            tags: As in :meth:`from_text`.
            tools: The tools that the model may call, see :attr:`tools`.

        Raises:
            PromptError: There is no message, all messages are empty, or a role is not a plain word.
        """
        unmarked = [
            replace(m, segments=(Segment("scaffold", m.text),)) if isinstance(m, Message) else Message.of(*m)
            for m in messages
        ]
        for message in unmarked:
            if not _ROLE.fullmatch(message.role):
                raise PromptError(
                    f"a message has the role {message.role!r}: roles are words such as 'system' or 'user'."
                )
        marked, retrieval_query = mark_messages(unmarked, query, context, tags, raw=False)
        parts = cls(marked, retrieval_query=retrieval_query, tools=tuple(tools))
        if not parts.text.strip():
            raise PromptError(
                f"the prompt is empty ({len(unmarked)} messages, no text): give it a question or a context."
            )
        return parts

    @property
    def context(self) -> str:
        """The context segments joined by blank lines; ``""`` if there are none."""
        return "\n\n".join(self._texts("context"))

    @property
    def query(self) -> str:
        """The question to retrieve with. Empty only if the prompt has no text outside its context."""
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
        """The text of all messages, for display."""
        return "\n\n".join(message.text for message in self.messages)

    def with_context(self, context: str) -> PromptParts:
        """Return the same prompt with another context.

        Args:
            context: Replaces the first context segment; further context segments are removed. In a prompt
                without a context it is put in front of the last user message. ``""`` removes the context.
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
