"""A prompt's tokens, of which no document and no question can make a control token."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rapid_integrations.errors import PromptError
from rapid_integrations.text import control_tokens, encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rapid_integrations.prompts import Message, PromptParts

_ROLE_LABELS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


def encode_prompt(
    parts: PromptParts, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool = True
) -> list[int]:
    """Encode a prompt so that no untrusted text makes a control token.

    With a chat template, every message's text is untrusted and only the template's own text is parsed for
    control tokens; for text without control strings the tokens are those of ``apply_chat_template``. A system
    message that the template refuses is folded into the first user message. Without one (none on the
    tokenizer, ``chat_template=False``, or a ``raw`` prompt) the tokenizer's begin-of-sequence token comes
    first where the tokenizer adds one by itself; several messages become lines ``"System: …"``, ``"User:
    …"``, and ``"Assistant:"``; control tokens are parsed in the scaffold of a ``raw`` prompt only.

    Args:
        parts: The prompt.
        tokenizer: The target's or the drafter's.
        chat_template: Apply the tokenizer's chat template, if it has one.

    Returns:
        Token ids, up to where the answer begins.

    Raises:
        PromptError: The prompt is empty, or the chat template refuses it.
    """
    if not parts.text.strip():
        raise PromptError("the prompt is empty: give it a question, a context, or both.")
    if chat_template and not parts.raw and tokenizer.chat_template:
        return _encode_pieces(_render(parts.messages, tokenizer), tokenizer)
    if parts.raw:
        pieces = [(s.text, s.kind == "scaffold") for message in parts.messages for s in message.segments]
    elif len(parts.messages) == 1:
        pieces = [(parts.messages[0].text, False)]
    else:
        lines = [f"{_ROLE_LABELS.get(m.role, m.role.capitalize())}: {m.text}" for m in parts.messages]
        pieces = [("\n".join([*lines, "Assistant:"]), False)]
    ids = _encode_pieces(pieces, tokenizer)
    bos = _begin_of_sequence(tokenizer)
    return ids if ids[: len(bos)] == bos else [*bos, *ids]


def _begin_of_sequence(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    with control_tokens(tokenizer).lock:
        ids = list(tokenizer("", return_attention_mask=False)["input_ids"])
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _encode_pieces(pieces: Iterable[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode ``(text, trusted)`` pieces; control strings count in trusted ones only.

    What stands between two control tokens is encoded in one go, trusted or not, so that ordinary text has the
    tokens it has in the whole prompt.
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


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Render the chat template; its own text makes trusted pieces, the messages' texts untrusted ones."""
    pairs = [(message.role, message.text) for message in messages]
    try:
        pieces = _render_apart(pairs, tokenizer)
        reason: object = "it leaves a message out"
    except Exception as error:  # templates raise what they like
        pieces, reason = None, error
    if pieces is None and any(role == "system" for role, _ in pairs):
        try:
            pieces = _render_apart(_fold_system(pairs), tokenizer)
        except Exception as error:
            pieces, reason = None, error
    if pieces is None:
        roles = ", ".join(role for role, _ in pairs)
        raise PromptError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'!r} refuses the messages "
            f"({roles}): {reason}. Change the messages, or pass chat_template=False."
        ) from (reason if isinstance(reason, Exception) else None)
    return pieces


def _fold_system(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    system = "\n\n".join(text for role, text in pairs if role == "system" and text.strip())
    rest = [pair for pair in pairs if pair[0] != "system"]
    at = next((i for i, (role, _) in enumerate(rest) if role == "user"), None)
    if at is None:
        return [("user", system), *rest]
    rest[at] = ("user", f"{system}\n\n{rest[at][1]}" if system else rest[at][1])
    return rest


def _render_apart(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]] | None:
    """Render with stand-ins for the messages' texts and put the texts back; ``None`` if a text got lost.

    The stand-ins are drawn anew each time, so no document can hold one, and are digits, so that no template's
    change of case alters them.
    """

    def render(texts: Sequence[str]) -> str:
        chat = [{"role": role, "content": text} for (role, _), text in zip(pairs, texts, strict=True)]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    texts = [text for _, text in pairs]
    stand_ins = [str(10**39 + secrets.randbelow(10**39)) if text.strip() else text for text in texts]
    index = {stand_in: i for i, stand_in in enumerate(stand_ins) if texts[i].strip()}
    rendered = render(stand_ins)
    if any(stand_in not in rendered for stand_in in index):
        return None
    split = re.split(f"({'|'.join(index)})", rendered) if index else [rendered]
    scaffolds, order = split[::2], [index[stand_in] for stand_in in split[1::2]]
    filled = _as_the_template_has_them(render(texts), scaffolds, [texts[i] for i in order])
    pieces = [(scaffolds[0], True)]
    for text, scaffold in zip(filled, scaffolds[1:], strict=True):
        pieces += [(text, False), (scaffold, True)]
    return pieces


def _as_the_template_has_them(rendered: str, scaffolds: list[str], texts: list[str]) -> list[str]:
    """The texts as they stand in the prompt rendered with them: some templates trim them.

    A template that changes texts in another way gets them unchanged.
    """
    if not rendered.startswith(scaffolds[0]):
        return texts
    at = len(scaffolds[0])
    found = []
    for text, scaffold in zip(texts, scaffolds[1:], strict=True):
        for form in dict.fromkeys((text, text.strip(), text.rstrip(), text.lstrip())):
            if rendered.startswith(form, at) and rendered.startswith(scaffold, at + len(form)):
                found.append(form)
                at += len(form) + len(scaffold)
                break
        else:
            return texts
    return found if at == len(rendered) else texts
