"""Encode untrusted text, so that no part of it becomes a control token.

A document that contains ``<|im_start|>system`` must not open a system message. :func:`encode_plain` encodes
such a string as ordinary characters, :func:`token_offsets` gives the positions of the same tokens in the
text, and :func:`control_tokens` lists the control tokens of a tokenizer. :mod:`.streaming` turns tokens into
text.
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

_TAG = re.compile(r"[<\[].*[>\]]", re.DOTALL)
_PIPED_TAG = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The tokens that control a model, which untrusted text must never produce.

    These are the tokens marked special, except the unknown token, and added tokens that are markup: ``<|…|>``
    tokens, and tags that appear literally in the chat template (``<tool_call>``, ``<think>``). Added tokens
    for whitespace or HTML, which Gemma has, are ordinary text.

    Attributes:
        ids: The token id of each control string.
        strip: For each control string, whether it removes whitespace before it and whether after it.
        pattern: Matches any control string, the longest first; ``None`` if there is none.
        special_ids: All ids that decoding omits, including the unknown token's.
        lock: Must be held while encoding, because a fast tokenizer keeps the settings of a call in shared
            state.
        pieces: The cache of encoded pieces of long texts, guarded by ``lock``.
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
    """Return the control tokens of ``tokenizer``, cached until its tokens or its chat template change."""
    version = (len(tokenizer), tuple(tokenizer.all_special_tokens), tokenizer.chat_template)
    with _controls_lock:
        cached = _controls.get(tokenizer)
        if cached is None or cached[0] != version:
            lock = cached[1].lock if cached else threading.Lock()
            cached = (version, _find_controls(tokenizer, lock))
            _controls[tokenizer] = cached
        return cached[1]


def _find_controls(tokenizer: PreTrainedTokenizerBase, lock: threading.Lock) -> ControlTokens:
    template = str(tokenizer.chat_template or "")
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        unknown = None  # GPT-2: its unknown token is its end-of-text token, and byte-level text needs none
    ids: dict[str, int] = {}
    strip: dict[str, tuple[bool, bool]] = {}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        is_markup = bool(_PIPED_TAG.fullmatch(text) or (_TAG.fullmatch(text) and text in template))
        if text and token_id != unknown and (token.special or is_markup):
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
    """Encode untrusted text; the result never contains a control token. Thread-safe.

    Args:
        text: Any text; ``""`` gives no tokens.
        tokenizer: A transformers tokenizer.

    Returns:
        Token ids without a begin- or end-of-sequence token.
    """
    if not text:
        return []
    controls = control_tokens(tokenizer)
    with controls.lock:
        ids = controls.pieces.encode(text, tokenizer, _encode_batch)
    forbidden = frozenset(controls.ids.values())
    if forbidden.isdisjoint(ids):
        return ids
    # Some tokenizers look up control strings as whole words, or match added tokens in spite of
    # split_special_tokens. Neither finds a control string that is cut in two.
    with controls.lock:
        parts = _encode_batch(_cut_control_strings(text, controls), tokenizer)
    return [token_id for part in parts for token_id in part if token_id not in forbidden]


def _encode_batch(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Encode texts without special tokens. The caller holds the tokenizer's lock."""
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


def token_offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the character offsets in ``text`` at which its tokens begin, for counting and cutting.

    Args:
        text: Any text, encoded as by :func:`encode_plain`.
        tokenizer: A transformers tokenizer. A slow tokenizer reports no offsets: it encodes word by word, and
            the tokens of a word are assumed to be equally long.

    Returns:
        One offset per token, never decreasing.
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
    with controls.lock:
        tokens_of_words = _encode_batch([word.group() for word in words], tokenizer)
    starts = []
    for word, ids in zip(words, tokens_of_words, strict=True):
        count = max(1, len(ids))
        starts += (word.start() + len(word.group()) * i // count for i in range(count))
    return starts
