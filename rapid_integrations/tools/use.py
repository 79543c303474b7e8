"""The tools of one request: how the prompt offers them, how a call is forced, and how the answer is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.events import Completion, TextDelta, TextEvent
from rapid_integrations.prompts import PromptParts, Segment
from rapid_integrations.structured.grammar import can_constrain
from rapid_integrations.structured.output_format import validated_schema
from rapid_integrations.tools.formats import CheckedTool, ToolFormat, check_format_name, find_format
from rapid_integrations.tools.parsing import AnswerParser, AnswerPart, AnswerText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rapid_integrations.config import GenerationOptions

AUTO, ANY, NONE = "auto", "any", "none"
_COMPOSED = frozenset(("$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties"))


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request.

    Attributes:
        tools: The definitions, in OpenAI's format.
        choice: ``"auto"``, ``"any"`` (some tool must be called), or ``"tool:<name>"`` (this one must be
            called).
        format_name: The tool format that the caller passed, if any.
        arguments_only: Whether the answer consists of the arguments of a forced call, decoded under their
            schema.
    """

    tools: tuple[dict[str, Any], ...]
    choice: str
    format_name: str | None
    arguments_only: bool = False

    @classmethod
    def parse(
        cls, definitions: Sequence[dict[str, Any]], choice: Any, format_name: str | None = None
    ) -> Self | None:
        """Interpret the tools and the ``tool_choice`` of a host framework.

        Args:
            definitions: The definitions, in OpenAI's format.
            choice: Any value that :func:`normalised_choice` accepts.
            format_name: See the attribute.

        Returns:
            ``None`` if no tool may be called.

        Raises:
            ConfigurationError: The choice is invalid, or the format is unknown.
        """
        check_format_name(format_name)
        names = [definition["function"]["name"] for definition in definitions]
        chosen = normalised_choice(choice, names)
        return None if chosen == NONE or not definitions else cls(tuple(definitions), chosen, format_name)

    @property
    def forced_tool(self) -> str | None:
        """The name of the tool that must be called; ``None`` if the model may choose one, or none."""
        name = self.choice.removeprefix("tool:")
        if name != self.choice:
            return name
        return self.tools[0]["function"]["name"] if self.choice == ANY and len(self.tools) == 1 else None

    def format(self, tokenizer: PreTrainedTokenizerBase) -> ToolFormat:
        """Return the format in which the model writes calls.

        Raises:
            PromptError: The chat template does not support tools.
            ConfigurationError: The format is unknown.
        """
        return find_format(tokenizer, self.format_name)

    def constrain_arguments(self, options: GenerationOptions) -> tuple[Self, GenerationOptions]:
        """Constrain the answer to the arguments of the tool that must be called, if any.

        Nothing changes if the model may choose the tool, or if llguidance is not installed.

        Args:
            options: The options of the request.

        Returns:
            The tool use with ``arguments_only`` set, and the options with the schema of the arguments.

        Raises:
            ConfigurationError: The options already have an output format, or the schema is invalid or too
                long.
        """
        if options.output_format:
            raise ConfigurationError(
                "tools were given together with json_schema, regex or choices, under which no tool can be "
                "called: leave one of the two out, or set tool_choice='none'."
            )
        schema = self.forced_arguments
        if schema is None or not can_constrain():
            return self, options
        try:
            options = options.override(json_schema=schema)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"the schema of the tool {self.forced_tool!r}, which must be called, is not allowed: {error}"
            ) from error
        return replace(self, arguments_only=True), options

    def add_to_prompt(self, parts: PromptParts, tokenizer: PreTrainedTokenizerBase) -> PromptParts:
        """Return the prompt with the tools, and with the beginning of the call if one is forced."""
        tool_format = self.format(tokenizer)
        return replace(
            parts,
            tools=self.tools,
            answer_start=self.answer_start(tool_format),
            visible_controls=tool_format.visible_controls(tokenizer),
            forced_tool=self.forced_tool if self.arguments_only else None,
        )

    @property
    def forced_arguments(self) -> dict[str, Any] | None:
        """The schema of the forced tool's arguments; ``None`` if the model may choose the tool."""
        for tool in self.tools:
            if tool["function"]["name"] == self.forced_tool:
                parameters = tool["function"].get("parameters", {"properties": {}})
                return _without_extra_properties(
                    validated_schema(parameters) if isinstance(tool, CheckedTool) else parameters
                )
        return None

    def answer_start(self, tool_format: ToolFormat) -> tuple[Segment, ...]:
        """Return the beginning of a forced call; empty if the model may answer without a call."""
        if self.choice == AUTO:
            return ()
        return tuple(
            Segment("scaffold" if trusted else "query", text)
            for text, trusted in tool_format.forced_start(self.forced_tool)
        )


class AnswerReader:
    """Takes the events of one answer and returns its parts: text and tool calls.

    Args:
        use: The tools that may be called; ``None`` if the whole answer is text.
        tokenizer: The tokenizer of the model.
    """

    def __init__(self, use: ToolUse | None, tokenizer: PreTrainedTokenizerBase) -> None:
        self._parser: AnswerParser | None = None
        self._closing = ""  # the end of a forced call, which the constraint keeps the model from writing
        if use is not None:
            tool_format = use.format(tokenizer)
            start = "".join(segment.text for segment in use.answer_start(tool_format))
            self._parser = AnswerParser(tool_format, start=start, tools=use.tools)
            self._closing = tool_format.closing if use.arguments_only else ""

    def take(self, event: TextEvent) -> list[AnswerPart]:
        """Return the parts that an event completes."""
        match event:
            case TextDelta(text=text):
                return self._parser.feed(text) if self._parser else [AnswerText(text)]
            case Completion() if self._parser:
                closing = self._closing if event.finish_reason == "stop" else ""
                return [*self._parser.feed(closing), *self._parser.flush()]
        return []


def _without_extra_properties(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Disallow undeclared arguments, unless the schema declares none, allows them or combines schemas."""
    schema = {"type": "object", **parameters}
    if "properties" in schema and not _COMPOSED & schema.keys():
        schema.setdefault("additionalProperties", False)
    return schema


def normalised_choice(choice: Any, names: Sequence[str]) -> str:
    """Convert a ``tool_choice`` to ``"auto"``, ``"any"``, ``"none"`` or ``"tool:<name>"``.

    Args:
        choice: One of the strings ``"auto"``, ``"any"``, ``"required"``, ``"none"`` or a tool's name, a
            boolean, ``None``, or OpenAI's ``{"type": "function", "function": {"name": …}}``.
        names: The names of the tools of the request.

    Raises:
        ConfigurationError: The choice is none of these values, or it requires a call without any tool.
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
            raise ConfigurationError(f"tool_choice={choice!r} requires a call, but no tools were given.")
        return ANY
    raise ConfigurationError(
        f"tool_choice={choice!r} is none of 'auto', 'none', 'any', 'required', True, False, nor the name of "
        f"a given tool ({', '.join(names) or 'none was given'})."
    )
