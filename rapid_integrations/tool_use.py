"""Which tools a call offers to the model, and how it is made sure that one of them is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.prompts import PromptParts, Segment
from rapid_integrations.tools import ToolFormat, check_format_name, find_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO, ANY, NONE = "auto", "any", "none"
_COMPOSED = frozenset(("$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties"))


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one call.

    Attributes:
        tools: Their definitions, as OpenAI's.
        choice: ``"auto"``, ``"any"``, or ``"tool:<name>"`` for one that must be called.
        format_name: The family's format, if the caller said.
    """

    tools: tuple[dict[str, Any], ...]
    choice: str
    format_name: str | None

    @classmethod
    def parse(
        cls, definitions: Sequence[dict[str, Any]], choice: Any, format_name: str | None = None
    ) -> Self | None:
        """The meaning of a host's tools and ``tool_choice``; ``None`` where nothing may be called.

        Args:
            definitions: OpenAI's.
            choice: What :func:`normalised_choice` takes.
            format_name: As the attribute.

        Raises:
            ConfigurationError: The choice names no tool, or leaves none to choose; the format is unknown.
        """
        check_format_name(format_name)
        names = [definition["function"]["name"] for definition in definitions]
        chosen = normalised_choice(choice, names)
        return None if chosen == NONE or not definitions else cls(tuple(definitions), chosen, format_name)

    @property
    def forced_tool(self) -> str | None:
        """The one tool that must be called, if it is known which."""
        name = self.choice.removeprefix("tool:")
        if name != self.choice:
            return name
        return self.tools[0]["function"]["name"] if self.choice == ANY and len(self.tools) == 1 else None

    def format(self, tokenizer: PreTrainedTokenizerBase) -> ToolFormat:
        """How the model writes calls.

        Raises:
            PromptError: Its chat template takes no tools.
            ConfigurationError: Its format is not known.
        """
        return find_format(tokenizer, self.format_name)

    def offered(self, parts: PromptParts, tokenizer: PreTrainedTokenizerBase) -> PromptParts:
        """The prompt with the tools in it, and the beginning of the call where one must be made."""
        tool_format = self.format(tokenizer)
        return replace(
            parts,
            tools=self.tools,
            answer_start=self.answer_start(tool_format),
            visible_controls=tool_format.visible_controls(tokenizer),
        )

    @property
    def forced_arguments(self) -> dict[str, Any] | None:
        """The schema of what is left to write of a call that must be made; ``None`` where it is not known."""
        for tool in self.tools:
            if tool["function"]["name"] == self.forced_tool:
                return _closed(tool["function"].get("parameters", {"properties": {}}))
        return None

    def answer_start(self, tool_format: ToolFormat) -> tuple[Segment, ...]:
        """The beginning of a call that must be made; empty where the model may choose."""
        if self.choice == AUTO:
            return ()
        return tuple(
            Segment("scaffold" if trusted else "query", text)
            for text, trusted in tool_format.forced_start(self.forced_tool)
        )


def _closed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments that allows those it names only, unless it says that it allows more.

    One that names none, or is put together of others, stays as it is.
    """
    schema = {"type": "object", **parameters}
    if "properties" in schema and not _COMPOSED & schema.keys():
        schema.setdefault("additionalProperties", False)
    return schema


def normalised_choice(choice: Any, names: Sequence[str]) -> str:
    """``tool_choice`` as ``"auto"``, ``"any"``, ``"none"`` or ``"tool:<name>"``.

    Raises:
        ConfigurationError: It is none of these, or ``names`` lacks the tool, or there is none to call.
    """
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        choice = function.get("name") or choice.get("type") if isinstance(function, Mapping) else function
    if isinstance(choice, str) and choice in names:
        return f"tool:{choice}"
    if choice is None or choice == AUTO:
        return AUTO
    if choice is False or choice == NONE:
        return NONE
    if choice is True or choice in (ANY, "required"):
        if not names:
            raise ConfigurationError(f"tool_choice={choice!r} asks for a call, but no tools were given.")
        return ANY
    raise ConfigurationError(
        f"tool_choice={choice!r} is none of 'auto', 'none', 'any', 'required', True, False, nor the name of "
        f"a tool that was given ({', '.join(names) or 'none was'})."
    )
