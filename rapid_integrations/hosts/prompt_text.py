"""A prompt as the frameworks pass it: a string that remembers its messages, its query and its context.

Both frameworks hand an LLM one formatted string. :class:`PromptText` is that string: chains, callbacks,
retries and caches see ordinary text, and its attributes keep the document and the question, so that they need
not be searched in the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Self, TypedDict

from rapid_integrations.prompts import Message, PromptParts

QUERY_NAMES = ("query", "query_str", "question", "input")
CONTEXT_NAMES = ("context", "context_str", "context_msg", "documents")


class PromptText(str):
    """A formatted prompt and its parts.

    Attributes:
        messages: The messages that the text was formatted from; ``None`` for a prompt that is one text.
        query: The question, if the framework gave it.
        context: The long document, if the framework gave it.
        raw: Whether the text is already formatted for the model, so that no chat template is applied.
        arguments: Keyword arguments of the call that the framework must not see: it writes the arguments that
            it sees into its events, and can store only plain data.
    """

    messages: tuple[Message, ...] | None
    query: str | None
    context: str | None
    raw: bool
    arguments: Mapping[str, Any]

    def __new__(
        cls,
        text: str,
        *,
        messages: Iterable[tuple[str, str] | Message] | None = None,
        query: str | None = None,
        context: str | None = None,
        raw: bool = False,
    ) -> Self:
        """Make the string; see the class for the arguments. Messages may be ``(role, text)`` pairs."""
        self = super().__new__(cls, text)
        self.messages = None
        if messages is not None:
            self.messages = tuple(m if isinstance(m, Message) else Message.of(*m) for m in messages)
        self.query, self.context, self.raw = query, context, raw
        self.arguments = {}
        return self

    def parts(
        self, *, query: str | None = None, context: str | None = None, system_prompt: str | None = None
    ) -> PromptParts:
        """The prompt in parts.

        Args:
            query: The question; ``None`` uses that of the text.
            context: The long document; ``None`` uses that of the text.
            system_prompt: Becomes the first message, unless the prompt is raw or has a system message.
        """
        query = self.query if query is None else query
        context = self.context if context is None else context
        messages = self.messages
        if system_prompt and not self.raw and not any(m.role == "system" for m in messages or ()):
            messages = (
                Message.of("system", system_prompt),
                *(messages or (Message.of("user", str(self)),)),
            )
        if messages is not None:
            return PromptParts.from_messages(messages, query=query, context=context)
        return PromptParts.from_text(str(self), query=query, context=context, raw=self.raw)

    def identity(self) -> list[Any]:
        """Everything besides the text that an answer depends on, as plain data."""
        messages = None if self.messages is None else [asdict(message) for message in self.messages]
        return [messages, self.query, self.context, self.raw]


def value_text(value: Any) -> str:
    """The text of a template variable: a string, a document or node of either framework, or a list."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "\n\n".join(map(value_text, value))
    for attribute in ("page_content", "text"):
        if isinstance(text := getattr(value, attribute, None), str):
            return text
    if node := getattr(value, "node", None):
        return value_text(node)
    return str(value)


def find_variable(variables: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of ``names`` that has a value in ``variables``; ``None`` if none has."""
    return next((name for name in names if variables.get(name)), None)


class Segments(TypedDict):
    """The question and the document among the variables of a template."""

    query: str | None
    context: str | None


def find_segments(variables: Mapping[str, Any]) -> Segments:
    """Find the query and the context among template variables by their customary names."""
    query, context = find_variable(variables, QUERY_NAMES), find_variable(variables, CONTEXT_NAMES)
    if query == "input" and context is None:
        query = None  # it may just as well be the document: "Summarise: {input}"
    return Segments(
        query=value_text(variables[query]) if query else None,
        context=value_text(variables[context]) if context else None,
    )
