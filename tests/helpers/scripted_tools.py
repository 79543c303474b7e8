"""A pipeline without models that calls the offered tools, in the markup of a model family, and answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from helpers.fake_pipeline import FakePipeline
from helpers.small_tokenizers import tool_tokenizer

from rapid_integrations.config import GenerationOptions
from rapid_integrations.prompts import PromptParts, encode_prompt
from rapid_integrations.tools.formats import FORMATS

MARKUP: dict[str, Callable[[str, str], str]] = {
    "hermes": lambda name, args: f'<tool_call>\n{{"name": {name}, "arguments": {args}}}\n</tool_call>',
    "llama3": lambda name, args: f'{{"name": {name}, "parameters": {args}}}',
    "mistral": lambda name, args: f'[TOOL_CALLS] [{{"name": {name}, "arguments": {args}}}]',
}


def value_for(schema: dict[str, Any], query: str) -> Any:
    """A value that the schema allows, taken from the query if it contains one."""
    match schema.get("type"):
        case "integer" | "number":
            found = re.search(r"\d+", query)
            return int(found.group()) if found else 7
        case "boolean":
            return True
        case "array":
            return []
        case "object":
            return {name: value_for(item, query) for name, item in schema.get("properties", {}).items()}
        case _:
            quoted = re.search(r"[\"'](.+?)[\"']", query)
            return schema["enum"][0] if "enum" in schema else quoted.group(1) if quoted else "some text"


def call_text(family: str, name: str, arguments: Any) -> str:
    """A tool call in the markup of a model family."""
    return MARKUP[family](json.dumps(name), json.dumps(arguments, ensure_ascii=False))


@dataclass
class ScriptedTools(FakePipeline):
    """Answers ``script(parts)`` if given; otherwise calls a tool, and then repeats the tool's result."""

    family: str = "hermes"
    script: Callable[[PromptParts], str] | None = None
    tokenizer: Any = field(default=None)
    prompts: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = self.tokenizer or tool_tokenizer(self.family)
        super().__post_init__()

    def answer(self, parts: PromptParts, options: GenerationOptions) -> str:
        self.prompts.append(encode_prompt(parts, self.tokenizer))  # raises where the chat template would
        start = "".join(segment.text for segment in parts.answer_start)
        text = self.script(parts) if self.script else self._answer(parts, start)
        assert text.startswith(start)
        text = text[len(start) :]
        if start and options.output_format:  # a constrained answer ends with its format
            text = text.removesuffix(FORMATS[self.family].closing)
        return text

    def _answer(self, parts: PromptParts, start: str) -> str:
        last = parts.messages[-1]
        if not parts.tools or (last.role == "tool" and not start):
            return f"It is: {last.text}"
        functions = [tool["function"] for tool in parts.tools]
        chosen = next((f for f in functions if json.dumps(f["name"]) in start), functions[0])
        arguments = value_for({"type": "object", **chosen["parameters"]}, parts.query)
        return call_text(self.family, chosen["name"], arguments)
