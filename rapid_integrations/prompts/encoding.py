"""Encode a prompt for one model; only trusted text can produce control tokens.

The chat template's own text and the scaffold of a ``raw`` prompt are trusted. Documents, questions, tool
calls and tool definitions are not: ``<|im_start|>`` in a document is plain text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rapid_integrations.errors import PromptError
from rapid_integrations.prompts.chat_template import render
from rapid_integrations.tokenization.encoding import control_tokens, encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rapid_integrations.prompts.parts import PromptParts

_ROLE_LABELS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


def encode_prompt(
    parts: PromptParts, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool = True
) -> list[int]:
    """Encode a prompt so that untrusted text yields no control token.

    With a chat template, only the template's own text is parsed for control tokens. For messages without
    control strings, the tokens equal those of ``apply_chat_template``. If the template refuses system
    messages, they are put in front of the first user message.

    Without a chat template (the tokenizer has none, ``chat_template=False``, or a ``raw`` prompt), the
    begin-of-sequence token comes first if the tokenizer adds one by default. Several messages become lines
    ``"System: …"``, ``"User: …"``, and a final ``"Assistant:"``. Control tokens are parsed only in the
    scaffold of a ``raw`` prompt.

    Args:
        parts: The prompt.
        tokenizer: The tokenizer of the target or the drafter.
        chat_template: Whether to apply the tokenizer's chat template, if it has one.

    Returns:
        The token ids of the prompt, including the beginning of the answer (``parts.answer_start``).

    Raises:
        PromptError: The prompt is empty, the chat template refuses the messages, or it does not support
            tools.
    """
    if not parts.text.strip():
        raise PromptError("the prompt is empty: give it a question, a context, or both.")
    answer_start = [(s.text, s.kind == "scaffold") for s in parts.answer_start]
    if chat_template and not parts.raw and tokenizer.chat_template:
        return _encode_pieces([*render(parts.messages, tokenizer, parts.tools), *answer_start], tokenizer)
    if parts.tools or any(message.tool_calls for message in parts.messages):
        raise PromptError(
            "tools and tool calls need a chat template that supports them: use a model that has one, with "
            "chat_template=True."
        )
    if parts.raw:
        pieces = [(s.text, s.kind == "scaffold") for message in parts.messages for s in message.segments]
    elif len(parts.messages) == 1:
        pieces = [(parts.messages[0].text, False)]
    else:
        lines = [f"{_ROLE_LABELS.get(m.role, m.role.capitalize())}: {m.text}" for m in parts.messages]
        pieces = [("\n".join([*lines, "Assistant:"]), False)]
    ids = _encode_pieces([*pieces, *answer_start], tokenizer)
    bos = _begin_of_sequence(tokenizer)
    return ids if ids[: len(bos)] == bos else [*bos, *ids]


def _begin_of_sequence(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    with control_tokens(tokenizer).lock:
        ids = list(tokenizer("", return_attention_mask=False)["input_ids"])
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _encode_pieces(pieces: Iterable[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode ``(text, trusted)`` pieces; only trusted ones are parsed for control tokens.

    The text between two control tokens is encoded in one call, trusted or not, because token boundaries may
    cross the pieces.
    """
    controls = control_tokens(tokenizer)
    runs: list[str] = [""]
    separators: list[str] = []  # the control string after each run but the last
    for text, trusted in pieces:
        done = 0
        for match in controls.pattern.finditer(text) if trusted and controls.pattern else ():
            runs[-1] += text[done : match.start()]
            separators.append(match.group())
            runs.append("")
            done = match.end()
        runs[-1] += text[done:]
    ids: list[int] = []
    for i, run in enumerate(runs):
        if i and controls.strip[separators[i - 1]][1]:
            run = run.lstrip()
        if i < len(separators) and controls.strip[separators[i]][0]:
            run = run.rstrip()
        ids += encode_plain(run, tokenizer)
        if i < len(separators):
            ids.append(controls.ids[separators[i]])
    return ids
