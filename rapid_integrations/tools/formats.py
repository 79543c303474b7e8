"""The formats in which families of models write tool calls.

A format has a ``response_template`` in transformers' declarative syntax, with which ``ResponseParser`` finds
the calls in an answer. Some tokenizers bring one; for other families, :data:`FORMATS` defines one.
:func:`find_format` chooses by the chat template. ``README.md`` in this folder describes how to add a format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rapid_integrations.errors import ConfigurationError, PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CheckedTool(dict[str, Any]):
    """A tool's definition in OpenAI's format, with a schema made of Python types.

    Pydantic validates the arguments of a call. Conditions that a grammar cannot express (distinct items of a
    set, an existing path) are therefore left to pydantic.
    """


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The format in which a family of models writes tool calls.

    Attributes:
        name: ``"hermes"``, ``"llama3"``, ``"mistral"``, or ``"own"`` for a tokenizer's own format.
        response_template: A template for transformers' ``ResponseParser``.
        openings: The text before a call's name, and the text between the name and the arguments, which must
            be a JSON object. A forced call begins with them. ``None`` if calls cannot be forced.
        closing: The text after the arguments of a forced call.
        generation_prompt: The part of the chat template's generation prompt that belongs to the answer, such
            as ``<think>``. The parser reads it first.
    """

    name: str
    response_template: Mapping[str, Any]
    openings: tuple[str, str] | None
    closing: str = ""
    generation_prompt: str = ""

    @property
    def anchors(self) -> tuple[str, ...]:
        """The strings and patterns that open or close a part of an answer."""
        anchors: list[str] = []
        for field in self.response_template["fields"].values():
            for key in ("open", "open_pattern", "close", "close_pattern"):
                value = field.get(key, ())
                anchors += [value] if isinstance(value, str) else value
        return tuple(anchor.replace("\\", "") for anchor in anchors)

    def visible_controls(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
        """The control tokens that a parser of this format needs, and that decoding would omit."""
        return frozenset(
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and any(token.content in anchor for anchor in self.anchors)
        )

    def forced_start(self, name: str | None) -> tuple[tuple[str, bool], ...]:
        """The beginning of an answer that is a call, of the tool ``name`` or of any tool.

        Returns:
            ``(text, trusted)`` pieces; the tool's name is not trusted.

        Raises:
            ConfigurationError: The markup of this format is unknown.
        """
        if self.openings is None:
            raise ConfigurationError(
                "tool_choice cannot force a call here: the tokenizer's response_template describes how to "
                "read calls, not how to begin one. Give tool_format= (one of "
                f"{', '.join(FORMATS)}), or leave the choice to the model."
            )
        before, after = self.openings
        if name is None:
            return ((before, True),)
        if before.endswith('"'):  # the name is part of a JSON string
            name = json.dumps(name, ensure_ascii=False)[1:-1]
        return ((before, True), (name, False), (after, True))


FORMATS: dict[str, ToolFormat] = {
    "hermes": ToolFormat(
        "hermes",
        {
            "start_anchor": "<|im_start|>assistant\n",
            "fields": {
                "tool_calls": {
                    "open_pattern": r"\s*<tool_call>\s*",
                    "close_pattern": r"\s*</tool_call>",
                    "repeats": True,
                },
                "content": {},
            },
        },
        ('<tool_call>\n{"name": "', '", "arguments":'),
        "}\n</tool_call>",
    ),
    "llama3": ToolFormat(
        "llama3",
        {
            "start_anchor": "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "fields": {
                "tool_calls": {
                    # Without the tag, an answer is a call if it begins like this; other JSON is text.
                    "open_pattern": r"\s*<\|python_tag\|>\s*"
                    r'|\A\s*(?=\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?'
                    r'"name"\s*:\s*"(?:[^"\\]|\\.)*"\s*,\s*"(?:parameters|arguments)"\s*:)',
                    "repeats": True,
                },
                "content": {},
            },
        },
        ('{"name": "', '", "parameters":'),
        "}",
    ),
    "mistral": ToolFormat(
        "mistral",
        {
            "start_anchor": "[/INST]",
            "fields": {
                "tool_calls": {"open_pattern": r"\s*\[TOOL_CALLS\]\s*", "repeats": True},
                "content": {},
            },
        },
        ('[TOOL_CALLS] [{"name": "', '", "arguments":'),
        "}]",
    ),
}
"""The supported formats by name.

Their response templates leave the body of a call as text; :mod:`~rapid_integrations.tools.parsing` decodes
its JSON. A malformed call therefore loses neither its own text nor the other calls of the answer.
"""


def find_format(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> ToolFormat:
    """The format of a tokenizer's model.

    Args:
        tokenizer: Its chat template determines the family. Its own ``response_template`` is used if it has
            one.
        name: The format, if it is known. It takes precedence over the tokenizer's ``response_template``.

    Raises:
        PromptError: The chat template does not support tools.
        ConfigurationError: ``name`` is unknown, or the family cannot be determined.
    """
    check_format_name(name)
    model = tokenizer.name_or_path or "the tokenizer"
    template = _template_with_tools(tokenizer)
    if not re.search(r"\btools\b", template):
        raise PromptError(
            f"the chat template of {model!r} takes no tools: use a model that was trained to call tools, or "
            "bind no tools."
        )
    if name is not None:
        return FORMATS[name]
    family = _family(template)
    if response_template := getattr(tokenizer, "response_template", None):
        prompt = _generation_prompt(tokenizer)
        if family is None:
            return ToolFormat("own", response_template, None, generation_prompt=prompt)
        return replace(FORMATS[family], response_template=response_template, generation_prompt=prompt)
    if family is None:
        raise ConfigurationError(
            f"the chat template of {model!r} takes tools, but their format is unknown: give "
            f"tool_format= (one of {', '.join(FORMATS)}), or set the tokenizer's response_template."
        )
    return FORMATS[family]


def supports_tools(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> bool:
    """Whether :func:`find_format` finds a format."""
    try:
        find_format(tokenizer, name)
    except (PromptError, ConfigurationError):
        return False
    return True


def check_format_name(name: str | None) -> None:
    """Check a ``tool_format``.

    Raises:
        ConfigurationError: It is neither ``None`` nor the name of a format.
    """
    if name is not None and name not in FORMATS:
        raise ConfigurationError(f"tool_format={name!r} is unknown: use one of {', '.join(FORMATS)}.")


def _template_with_tools(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template that is used with tools; ``""`` if there is none."""
    if not tokenizer.chat_template:
        return ""
    return str(tokenizer.get_chat_template(tools=[{}]))


def _family(template: str) -> str | None:
    """The name of the format whose markup occurs in a chat template; ``None`` if no format matches.

    Newer models write other bodies in the same tags: Mistral a name, ``[ARGS]`` and an object, others XML.
    Their templates must not match the older formats.
    """
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else "mistral"
    if "<tool_call>" in template:
        return None if any(tag in template for tag in ("<function=", "<arg_key>")) else "hermes"
    if "<|python_tag|>" in template or ('"parameters"' in template and "<|eot_id|>" in template):
        return "llama3"
    return None


def _generation_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    chat = [{"role": "user", "content": "x"}]
    with_prompt, without = (
        str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add))
        for add in (True, False)
    )
    return with_prompt[len(without) :] if with_prompt.startswith(without) else with_prompt
