"""What prompts are made of: messages of segments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model asks for.

    Attributes:
        name: The tool's.
        arguments: By name, as JSON has them.
        id: Tells calls of a conversation apart; ``None`` where it does not matter.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


SegmentKind = Literal["scaffold", "context", "query"]


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
