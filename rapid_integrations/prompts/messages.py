"""The elements of prompts: messages, their segments, and tool calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of a model.

    Attributes:
        name: The name of the tool.
        arguments: JSON values by name.
        id: Identifies the call in its conversation; ``None`` if it is not needed.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


SegmentKind = Literal["scaffold", "context", "query"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text of one kind: template text, the long document, or the question."""

    kind: SegmentKind
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """A message; its text is the concatenation of its segments.

    Attributes:
        role: The role in chat templates: ``"system"``, ``"user"``, ``"assistant"``, ``"tool"``, …
        segments: The pieces of its text.
        tool_calls: The tool calls of an assistant's message.
        tool_call_id: The id of the call that a tool's message answers.
        name: The tool of a tool's message.
    """

    role: str
    segments: tuple[Segment, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @classmethod
    def of(cls, role: str, text: str, **rest: Any) -> Message:
        """A message with one scaffold segment; ``rest`` are the other attributes."""
        return cls(role, (Segment("scaffold", text),), **rest)

    @property
    def text(self) -> str:
        """The message's text."""
        return "".join(segment.text for segment in self.segments)
