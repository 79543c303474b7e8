"""From a prompt to tokens. No document and no question can produce a control token."""

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
    """Encode a prompt; untrusted text does not produce control tokens.

    With a chat template, the texts of messages, tool calls and tool definitions are untrusted; only the
    template's own text is parsed for control tokens. For text without control strings, the tokens equal those
    of ``apply_chat_template``. A system message that the template refuses becomes part of the first user
    message.

    Without a chat template (the tokenizer has none, ``chat_template=False``, or a ``raw`` prompt), the prompt
    begins with the begin-of-sequence token if the tokenizer adds one. Several messages become lines
    ``"System: …"``, ``"User: …"`` and ``"Assistant:"``. Control tokens are parsed in the scaffold of a
    ``raw`` prompt only.

    Args:
        parts: The prompt.
        tokenizer: The target's or the drafter's tokenizer.
        chat_template: Whether to apply the tokenizer's chat template, if it has one.

    Returns:
        Token ids up to the beginning of the answer.

    Raises:
        PromptError: The prompt is empty, or the chat template refuses it or does not support tools.
    """
    if not parts.text.strip():
        raise PromptError("the prompt is empty: give it a question, a context, or both.")
    begun = [(s.text, s.kind == "scaffold") for s in parts.answer_start]
    if chat_template and not parts.raw and tokenizer.chat_template:
        return _encode_pieces([*render(parts.messages, tokenizer, parts.tools), *begun], tokenizer)
    if parts.tools or any(message.tool_calls for message in parts.messages):
        raise PromptError(
            "tools and tool calls need a chat template that takes them: use a model that has one, with "
            "chat_template=True."
        )
    if parts.raw:
        pieces = [(s.text, s.kind == "scaffold") for message in parts.messages for s in message.segments]
    elif len(parts.messages) == 1:
        pieces = [(parts.messages[0].text, False)]
    else:
        lines = [f"{_ROLE_LABELS.get(m.role, m.role.capitalize())}: {m.text}" for m in parts.messages]
        pieces = [("\n".join([*lines, "Assistant:"]), False)]
    ids = _encode_pieces([*pieces, *begun], tokenizer)
    bos = _begin_of_sequence(tokenizer)
    return ids if ids[: len(bos)] == bos else [*bos, *ids]


def _begin_of_sequence(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    with control_tokens(tokenizer).lock:
        ids = list(tokenizer("", return_attention_mask=False)["input_ids"])
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _encode_pieces(pieces: Iterable[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode ``(text, trusted)`` pieces; control strings are parsed in trusted pieces only.

    The text between two control tokens is encoded as one string, trusted or not, so that its tokens are the
    same as in the whole prompt.
    """
    controls = control_tokens(tokenizer)
    runs: list[str] = [""]
    between: list[str] = []
    for text, trusted in pieces:
        done = 0
        for match in controls.pattern.finditer(text) if trusted and controls.pattern else ():
            runs[-1] += text[done : match.start()]
            between.append(match.group())
            runs.append("")
            done = match.end()
        runs[-1] += text[done:]
    ids: list[int] = []
    for i, run in enumerate(runs):
        if i and controls.strip[between[i - 1]][1]:
            run = run.lstrip()
        if i < len(between) and controls.strip[between[i]][0]:
            run = run.rstrip()
        ids += encode_plain(run, tokenizer)
        if i < len(between):
            ids.append(controls.ids[between[i]])
    return ids
