"""Encoding untrusted text: no part of it becomes a control token.

:func:`encode_plain` gives tokens, :func:`encode_with_offsets` their positions in the text. The way back, from
tokens to text, is in :mod:`~rapid_integrations.tokenization.streaming`.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from rapid_integrations.tokenization.pieces import PieceCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKUP = re.compile(r"[<\[].*[>\]]", re.DOTALL)
_PIPED = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The control tokens of a tokenizer, which untrusted text must not produce.

    These are the tokens marked special, except the unknown token, and added tokens that are markup:
    ``<|…|>``, and tokens that occur literally in the chat template (``<tool_call>``, ``<think>``). Added
    whitespace and HTML tokens, as in Gemma's vocabulary, are ordinary text.

    Attributes:
        ids: The token id of each control string.
        strip: For each control string, whether it removes whitespace before it and after it.
        pattern: Matches any control string, the longest first; ``None`` if there is none.
        special_ids: The ids that decoding omits, including the unknown token's.
        lock: Must be held while encoding: a fast tokenizer keeps the settings of a call in shared state.
        pieces: Cached pieces of long texts, guarded by the same lock.
    """

    ids: dict[str, int]
    strip: dict[str, tuple[bool, bool]]
    pattern: re.Pattern[str] | None
    special_ids: frozenset[int]
    lock: threading.Lock
    pieces: PieceCache


_controls: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, ControlTokens]] = WeakKeyDictionary()
_controls_lock = threading.Lock()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """The control tokens of ``tokenizer``, computed once and again when its tokens change."""
    version = (len(tokenizer), tuple(tokenizer.all_special_tokens), tokenizer.chat_template)
    with _controls_lock:
        known = _controls.get(tokenizer)
        if known is None or known[0] != version:
            lock = known[1].lock if known else threading.Lock()
            known = (version, _find_controls(tokenizer, lock))
            _controls[tokenizer] = known
        return known[1]


def _find_controls(tokenizer: PreTrainedTokenizerBase, lock: threading.Lock) -> ControlTokens:
    template = str(tokenizer.chat_template or "")
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        unknown = (
            None  # GPT-2 uses its end-of-text token as unknown token; byte-level encoding never produces it
        )
    ids: dict[str, int] = {}
    strip: dict[str, tuple[bool, bool]] = {}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        markup = bool(_PIPED.fullmatch(text) or (_MARKUP.fullmatch(text) and text in template))
        if text and token_id != unknown and (token.special or markup):
            ids[text] = token_id
            strip[text] = (token.lstrip, token.rstrip)
    longest_first = sorted(ids, key=len, reverse=True)
    return ControlTokens(
        ids=ids,
        strip=strip,
        pattern=re.compile("|".join(map(re.escape, longest_first))) if ids else None,
        special_ids=frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special),
        lock=lock,
        pieces=PieceCache(),
    )


def encode_plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode untrusted text without producing control tokens. May be called from any thread.

    Args:
        text: Any text; ``""`` gives no tokens.
        tokenizer: A transformers tokenizer.

    Returns:
        Token ids, without any begin- or end-of-sequence token.
    """
    if not text:
        return []
    controls = control_tokens(tokenizer)
    with controls.lock:
        ids = controls.pieces.encode(text, tokenizer, _encoded)
    forbidden = frozenset(controls.ids.values())
    if forbidden.isdisjoint(ids):
        return ids
    # Some tokenizers match control strings as whole words, or match added tokens despite the setting. A
    # control string that is cut in two is not matched.
    pieces = _encode(_cut_control_strings(text, controls), tokenizer, controls)
    return [i for piece in pieces for i in piece if i not in forbidden]


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, controls: ControlTokens) -> list[list[int]]:
    with controls.lock:
        return _encoded(texts, tokenizer)


def _encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    return list(encoded["input_ids"])


def _cut_control_strings(text: str, controls: ControlTokens) -> list[str]:
    assert controls.pattern is not None
    pattern = re.compile(controls.pattern.pattern, re.IGNORECASE)  # a normalizer may lowercase
    cuts = [match.start() + max(1, len(match.group()) // 2) for match in pattern.finditer(text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True) if start < end]


def encode_with_offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The start of each token in ``text``, for counting and cutting.

    Args:
        text: Any text, encoded as by :func:`encode_plain`.
        tokenizer: A transformers tokenizer. If it gives no offsets, each word is encoded separately, and the
            tokens of a word are assumed to be equally long.

    Returns:
        Character offsets, one for each token, non-decreasing.
    """
    if not text:
        return []
    controls = control_tokens(tokenizer)
    if tokenizer.is_fast:
        with controls.lock:
            encoded = tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
                return_offsets_mapping=True, verbose=False,
            )  # fmt: skip
        starts: list[int] = []
        latest = 0
        for start, _ in encoded["offset_mapping"]:
            latest = max(latest, start)
            starts.append(latest)
        return starts
    words = list(re.finditer(r"\s*\S+", text)) or list(re.finditer(r"\s+", text))
    starts = []
    for word, ids in zip(words, _encode([word.group() for word in words], tokenizer, controls), strict=True):
        count = max(1, len(ids))
        starts += (word.start() + len(word.group()) * i // count for i in range(count))
    return starts
