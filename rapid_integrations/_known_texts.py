"""Tokens of long texts, of which what an earlier text began with is not encoded again.

Questions about one document are prompts that begin alike; encoding the document for each takes a tenth of a
second for 100,000 tokens and more. Where a tokenizer takes text apart into words from left to right, and
every word's tokens depend on that word alone, what stands before a word that both texts have, far enough
before they differ, has the same tokens in both. So it is with the byte-level tokenizers of the Llama 3, Qwen
and GPT families; a tokenizer that takes a text as one word (SentencePiece's, of Llama 2 and Gemma) gets whole
texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

# Characters from which a text is kept, and how many are: one takes some 160 bytes a token beside itself.
_LONG = 16_384
_MOST_TEXTS = 4
# Where encoding sets in: so many characters before the texts differ, or a word's begin some tokens before.
_OVERLAP = 1024
_MOST_TOKENS_BACK = 256
# What is that near to where the texts differ may have other tokens in each of them.
_UNSURE = 128

_PARTS = frozenset(
    {"ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "Metaspace"}
    | {"NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Lowercase", "Replace", "Strip", "Prepend"}
)
# Looking around, but for whether white space follows, and anchors: a word would depend on what is far away.
_LOOKS_AROUND = re.compile(r"\(\?(?!:|i:|!\\S\))|(?<!\\)[$]|(?<![\\[])\^|\\[bBAzZG]")


@dataclass(frozen=True, slots=True)
class _Known:
    text: str
    ids: list[int]
    encoding: Encoding


class KnownTexts:
    """The long texts that a tokenizer encoded last. Not thread-safe.

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._usable = tokenizer.is_fast and _words_stand_alone(tokenizer.backend_tokenizer)
        self._known: list[_Known] = []

    def encode(self, text: str, encode: Callable[[str], tuple[list[int], Encoding | None]]) -> list[int]:
        """The token ids of ``text``: those that ``encode`` gives it, where the tokenizer's words stand alone.

        That is told by its parts when it is first used. It is not exact for words that reach further than
        texts overlap (between quotes or brackets, say, or an added token of a thousand characters), nor
        after the tokenizer's parts were exchanged.

        Args:
            text: Any text.
            encode: Encodes a text with the tokenizer; the encoding itself, too, where the tokenizer is fast.
        """
        if not self._usable or len(text) < _LONG:
            return encode(text)[0]
        shared, known = max(
            ((_common_prefix_length(known.text, text), known) for known in self._known),
            key=lambda pair: pair[0],
            default=(0, None),
        )
        if known is not None and shared >= len(text) // 2:
            # The last is the first to be forgotten.
            self._known.remove(known)
            self._known.insert(0, known)
            sure = _token_at(known.encoding, shared - _UNSURE)
            for token, character in _cuts(known, shared - _OVERLAP):
                ids = encode(text[character:])[0]
                if token < sure and ids[: sure - token] == known.ids[token:sure]:
                    return known.ids[:token] + ids
        ids, encoding = encode(text)
        if encoding is not None:
            self._known = [_Known(text, ids, encoding), *self._known[: _MOST_TEXTS - 1]]
        return ids


def _cuts(known: _Known, end: int) -> list[tuple[int, int]]:
    """Where words begin before character ``end``: tokens, and the characters where the words before them end.

    The last one behind a space, then the last one behind anything but white space. Some tokenizers count the
    space among a word's characters, others do not, and some begin every text with one.
    """
    encoding, text = known.encoding, known.text
    found: dict[bool, tuple[int, int]] = {}
    last = _token_at(encoding, end)
    for token in range(last, max(last - _MOST_TOKENS_BACK, 0), -1):
        before, after = encoding.token_to_chars(token - 1), encoding.token_to_chars(token)
        if before is None or after is None:
            continue
        if encoding.token_to_word(token - 1) == encoding.token_to_word(token):
            continue
        at = before[1]
        spaced = text[at] == " "
        begins = at + spaced
        if after[0] in (at, begins) and not text[at - 1].isspace() and not text[begins].isspace():
            found.setdefault(spaced, (token, at))
            if spaced:
                break
    return [found[spaced] for spaced in (True, False) if spaced in found]


def _token_at(encoding: Encoding, character: int) -> int:
    """The token of a character, or of one not far before it; else the first: a lookup takes a while."""
    tokens = (encoding.char_to_token(place) for place in range(character, max(character - _UNSURE, 0), -1))
    return next((token for token in tokens if token is not None), 0)


def _common_prefix_length(left: str, right: str) -> int:
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _words_stand_alone(backend: Any) -> bool:
    """Whether each word's tokens depend on it alone, and words on what is near."""
    if type(backend.model).__name__ not in ("BPE", "WordPiece", "WordLevel"):
        return False
    if getattr(backend.model, "dropout", None) or backend.pre_tokenizer is None:
        return False
    wholes = [whole for whole in (backend.normalizer, backend.pre_tokenizer) if whole is not None]
    try:
        described = [json.loads(whole.__getstate__()) for whole in wholes]
    except Exception:  # what tokenizers raises for parts that are written in Python
        return False
    return all(
        part["type"] in _PARTS and not _LOOKS_AROUND.search(_pattern(part))
        for each in described
        for part in _parts(each)
    )


def _parts(described: dict[str, Any]) -> Iterator[dict[str, Any]]:
    inner = described.get("pretokenizers", described.get("normalizers"))
    if inner is None:
        yield described
    else:
        for part in inner:
            yield from _parts(part)


def _pattern(part: dict[str, Any]) -> str:
    pattern = part.get("pattern") or {}
    return str(pattern.get("Regex", "")) if isinstance(pattern, dict) else ""
