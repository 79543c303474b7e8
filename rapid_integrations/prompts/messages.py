"""Messages of segments, which prompts consist of, and the tool calls of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that a model requests.

    Attributes:
        name: The name of the tool.
        arguments: The arguments by name, as JSON values.
        id: Distinguishes the calls of a conversation; ``None`` if the model gave none.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


SegmentKind = Literal["scaffold", "context", "query"]
"""``"context"`` is the long document, ``"query"`` the question, ``"scaffold"`` the rest of a prompt."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of text of one kind."""

    kind: SegmentKind
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: The role in chat templates: ``"system"``, ``"user"``, ``"assistant"``, ``"tool"``, …
        segments: The text of the message, in order and without gaps.
        tool_calls: The calls that an assistant message requests.
        tool_call_id: The id of the call that a tool message answers.
        name: The name of the tool that a tool message comes from.
    """

    role: str
    segments: tuple[Segment, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @classmethod
    def of(cls, role: str, text: str, **attributes: Any) -> Message:
        """Make a message with a single scaffold segment; ``attributes`` sets the other fields."""
        return cls(role, (Segment("scaffold", text),), **attributes)

    @property
    def text(self) -> str:
        """The text of all segments."""
        return "".join(segment.text for segment in self.segments)
