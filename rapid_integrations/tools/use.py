"""The tools of one call of the model: offering them, forcing a tool call, and parsing the answer.

The chat classes of both frameworks use :class:`ToolUse` before generation and :class:`AnswerReader` for the
events of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.events import Completion, TextDelta, TextEvent
from rapid_integrations.output_format import validated_schema
from rapid_integrations.prompts import PromptParts, Segment
from rapid_integrations.structured.grammar import can_constrain
from rapid_integrations.tools.formats import CheckedTool, ToolFormat, check_format_name, find_format
from rapid_integrations.tools.parsing import AnswerParser, AnswerPart, AnswerText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rapid_integrations.config import GenerationOptions

AUTO, ANY, NONE = "auto", "any", "none"
_COMPOSED = frozenset(("$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties"))


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one call.

    Attributes:
        tools: Their definitions in OpenAI's format.
        choice: ``"auto"``, ``"any"`` (a call is forced, of any tool), or ``"tool:<name>"``.
        format_name: The format of calls, if the caller gave it.
        arguments_only: Whether the model only writes the arguments of a forced call.
    """

    tools: tuple[dict[str, Any], ...]
    choice: str
    format_name: str | None
    arguments_only: bool = False

    @classmethod
    def parse(
        cls, definitions: Sequence[dict[str, Any]], choice: Any, format_name: str | None = None
    ) -> Self | None:
        """Parse a framework's tools and ``tool_choice``; ``None`` if no tool may be called.

        Args:
            definitions: Definitions in OpenAI's format.
            choice: A value that :func:`normalised_choice` accepts.
            format_name: As the attribute.

        Raises:
            ConfigurationError: The choice names an unknown tool or asks for a call without tools, or the
                format is unknown.
        """
        check_format_name(format_name)
        names = [definition["function"]["name"] for definition in definitions]
        chosen = normalised_choice(choice, names)
        return None if chosen == NONE or not definitions else cls(tuple(definitions), chosen, format_name)

    @property
    def forced_tool(self) -> str | None:
        """The name of the tool whose call is forced, if it is known."""
        name = self.choice.removeprefix("tool:")
        if name != self.choice:
            return name
        return self.tools[0]["function"]["name"] if self.choice == ANY and len(self.tools) == 1 else None

    def format(self, tokenizer: PreTrainedTokenizerBase) -> ToolFormat:
        """The model's format of calls.

        Raises:
            PromptError: Its chat template does not support tools.
            ConfigurationError: Its format is unknown.
        """
        return find_format(tokenizer, self.format_name)

    def decoded_with(self, options: GenerationOptions) -> tuple[Self, GenerationOptions]:
        """This object and the options with which its answer is decoded.

        If the tool of a forced call is known and llguidance is installed, the model writes only the arguments
        (``arguments_only``), and their schema constrains decoding.

        Raises:
            ConfigurationError: The options already set an output format, or the arguments' schema is invalid
                or too long.
        """
        if options.output_format:
            raise ConfigurationError(
                "tools are offered, but json_schema, regex or choices constrain the answer, so no tool could "
                "be called: leave one of the two out, or set tool_choice='none'."
            )
        schema = self.forced_arguments
        if schema is None or not can_constrain():
            return self, options
        try:
            options = options.override(json_schema=schema)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"the schema of the tool {self.forced_tool!r}, whose call is forced, is not allowed: {error}"
            ) from error
        return replace(self, arguments_only=True), options

    def offered(self, parts: PromptParts, tokenizer: PreTrainedTokenizerBase) -> PromptParts:
        """The prompt with the tools, and with the beginning of a forced call."""
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
        """The schema of the arguments of a forced call; ``None`` if the tool is not known."""
        for tool in self.tools:
            if tool["function"]["name"] == self.forced_tool:
                parameters = tool["function"].get("parameters", {"properties": {}})
                return _closed(validated_schema(parameters) if isinstance(tool, CheckedTool) else parameters)
        return None

    def answer_start(self, tool_format: ToolFormat) -> tuple[Segment, ...]:
        """The beginning of a forced call; empty if the model may choose."""
        if self.choice == AUTO:
            return ()
        return tuple(
            Segment("scaffold" if trusted else "query", text)
            for text, trusted in tool_format.forced_start(self.forced_tool)
        )


class AnswerReader:
    """Turns the events of an answer into parts: text, reasoning and tool calls.

    Args:
        use: The tools that may be called; ``None`` if the whole answer is text.
        tokenizer: The answering model's tokenizer.
    """

    def __init__(self, use: ToolUse | None, tokenizer: PreTrainedTokenizerBase) -> None:
        self._parser: AnswerParser | None = None
        self._closing = ""  # the end of a forced call, which the model does not write itself
        if use is not None:
            tool_format = use.format(tokenizer)
            start = "".join(segment.text for segment in use.answer_start(tool_format))
            self._parser = AnswerParser(tool_format, start=start, tools=use.tools)
            self._closing = tool_format.closing if use.arguments_only else ""

    def take(self, event: TextEvent) -> list[AnswerPart]:
        """The parts that an event completes."""
        match event:
            case TextDelta(text=text):
                return self._parser.feed(text) if self._parser else [AnswerText(text)]
            case Completion() if self._parser:
                closing = self._closing if event.finish_reason == "stop" else ""
                return [*self._parser.feed(closing), *self._parser.flush()]
        return []


def _closed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A schema of arguments that allows only the named ones, unless it explicitly allows more.

    A schema without named arguments, or composed of other schemas, is not changed.
    """
    schema = {"type": "object", **parameters}
    if "properties" in schema and not _COMPOSED & schema.keys():
        schema.setdefault("additionalProperties", False)
    return schema


def normalised_choice(choice: Any, names: Sequence[str]) -> str:
    """``tool_choice`` as ``"auto"``, ``"any"``, ``"none"`` or ``"tool:<name>"``.

    Raises:
        ConfigurationError: The choice is not valid, or names a tool that is not in ``names``, or asks for a
            call without tools.
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
        f"tool_choice={choice!r} is unknown: use 'auto', 'none', 'any', 'required', True, False or the name "
        f"of a given tool ({', '.join(names) or 'there is none'})."
    )
