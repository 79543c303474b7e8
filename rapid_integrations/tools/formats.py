"""The formats in which model families write tool calls.

The ``ResponseParser`` of transformers finds the calls in an answer by a declarative ``response_template``.
Some tokenizers bring their own; :data:`FORMATS` has one for each known family, and :func:`detect_family`
recognizes a family by its chat template. ``README.md`` in this folder says how to add a format.
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
    """A tool definition in OpenAI's format whose arguments pydantic validates.

    Its schema comes from Python types. A grammar may therefore ignore the constraints that it cannot enforce
    (the items of a set differ, a path exists).
    """


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The format in which a model family writes tool calls.

    Attributes:
        name: The key in :data:`FORMATS`, or ``"own"`` for the response template of an unknown family's
            tokenizer.
        response_template: The template for the ``ResponseParser`` of transformers.
        openings: The text before the name of a call, and the text between the name and the arguments. To
            force a call, an answer begins with them. ``None`` if they are unknown, or if the arguments are
            not a JSON object.
        closing: The text after the arguments of a call that is the whole answer.
        generation_prompt: The part of the answer that the chat template has already written.
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
        """Return the control tokens that the parser needs, although decoding omits them by default."""
        return frozenset(
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and any(token.content in anchor for anchor in self.anchors)
        )

    def forced_start(self, name: str | None) -> tuple[tuple[str, bool], ...]:
        """Return the beginning of an answer that calls the tool ``name``, or any tool if it is ``None``.

        Returns:
            ``(text, trusted)`` pieces; the name of the tool is not trusted.

        Raises:
            ConfigurationError: The format has no ``openings``.
        """
        if self.openings is None:
            raise ConfigurationError(
                f"tool_choice cannot force a call: the tool format {self.name!r} says how to parse calls, "
                f"but not how to begin one. Pass tool_format= (one of {', '.join(FORMATS)}), or let the "
                "model choose."
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
                    # A call without its tag must begin the answer; other JSON objects are text.
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
"""The known formats by name, the values of the option ``tool_format``.

No field has a ``content`` parser: a call's body is text, which :mod:`rapid_integrations.tools.parsing`
decodes, so that one malformed call does not affect the others.
"""


def detect_family(chat_template: str) -> str | None:
    """Return the key in :data:`FORMATS` of the family that a chat template belongs to, or ``None``."""
    # Newer models write other call bodies in the same tags: Mistral a name, [ARGS] and an object; others XML.
    if "[TOOL_CALLS]" in chat_template:
        return None if "[ARGS]" in chat_template else "mistral"
    if "<tool_call>" in chat_template:
        return None if any(tag in chat_template for tag in ("<function=", "<arg_key>")) else "hermes"
    if "<|python_tag|>" in chat_template or (
        '"parameters"' in chat_template and "<|eot_id|>" in chat_template
    ):
        return "llama3"
    return None


def find_format(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> ToolFormat:
    """Return the tool format of a model.

    Args:
        tokenizer: The model's tokenizer. The family is detected by its chat template; its
            ``response_template``, if it has one, is used to parse answers.
        name: The format to use instead, a key in :data:`FORMATS`.

    Raises:
        PromptError: The chat template does not support tools.
        ConfigurationError: ``name`` is unknown, or no format is detected.
    """
    check_format_name(name)
    model = tokenizer.name_or_path or "the tokenizer"
    template = chat_template_with_tools(tokenizer)
    if not re.search(r"\btools\b", template):
        raise PromptError(
            f"the chat template of {model!r} does not support tools: use a model that was trained to call "
            "tools, or bind none."
        )
    if name is not None:
        return FORMATS[name]
    family = detect_family(template)
    if own := getattr(tokenizer, "response_template", None):
        base = ToolFormat("own", own, None) if family is None else FORMATS[family]
        return replace(base, response_template=own, generation_prompt=_generation_prompt(tokenizer))
    if family is None:
        raise ConfigurationError(
            f"the chat template of {model!r} supports tools, but its format is unknown: pass tool_format= "
            f"(one of {', '.join(FORMATS)}), or set the tokenizer's response_template."
        )
    return FORMATS[family]


def supports_tools(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> bool:
    """Whether :func:`find_format` returns a format."""
    try:
        find_format(tokenizer, name)
    except (PromptError, ConfigurationError):
        return False
    return True


def check_format_name(name: str | None) -> None:
    """Check the option ``tool_format``.

    Raises:
        ConfigurationError: ``name`` is neither ``None`` nor a key in :data:`FORMATS`.
    """
    if name is not None and name not in FORMATS:
        raise ConfigurationError(f"tool_format={name!r} is unknown: pass one of {', '.join(FORMATS)}.")


def chat_template_with_tools(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template that the tokenizer uses for conversations with tools, or ``""``."""
    if not tokenizer.chat_template:
        return ""
    return str(tokenizer.get_chat_template(tools=[{}]))


def _generation_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    chat = [{"role": "user", "content": "x"}]
    with_prompt, without = (
        str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add))
        for add in (True, False)
    )
    return with_prompt[len(without) :] if with_prompt.startswith(without) else with_prompt
