"""Prompts in segments (scaffold, context, query): finding them in plain text, and encoding them."""

from rapid_integrations.prompts.encoding import encode_prompt
from rapid_integrations.prompts.messages import Message, Segment, SegmentKind, ToolCall
from rapid_integrations.prompts.parts import DEFAULT_TAGS, PromptParts

__all__ = ["DEFAULT_TAGS", "Message", "PromptParts", "Segment", "SegmentKind", "ToolCall", "encode_prompt"]
