r"""Long texts are tokenized in pieces, and a piece that was met before is not tokenized again.

Questions about one document are prompts that begin alike; encoding the document for each takes a tenth of a
second for 100,000 tokens and more. A text is cut before spaces between two printable ASCII characters, at the
first such place behind every few thousand characters: texts that begin alike have the same pieces up to where
they differ.

The tokens of a text are those of its pieces where the tokenizer

* normalises by nothing that acts across such a space,
* takes text apart by patterns of which no match has a space behind anything else, which look no further ahead
  than whether white space follows (``\s+(?!\S)``), and never back: every match before the space ends there,
  wherever the text ends, and those behind it are what they are at the beginning of a text,
* encodes each word by itself, and
* has no added tokens with white space in them or that swallow what is around them.

That is known of the patterns of the GPT, Llama 3, Qwen, Mistral and DeepSeek families, which are listed here.
A tokenizer with anything else gets whole texts.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters of a piece, at least, and those of all pieces that are kept: some two bytes each.
_PIECE = 4096
_MOST_CHARACTERS = 2**23
# Looking the tokenizer's parts over takes a tenth of a millisecond.
_LONG = 2 * _PIECE
_CUT = re.compile(r"(?<=[!-~]) (?=[!-~])")

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_REST = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)

PATTERNS = {
    "llama-3": rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "qwen-2": rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
    "qwen-3.5": (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
        + _REST.replace(r"\p{L}\p{N}", r"\p{L}\p{M}\p{N}")
    ),
    "tekken": rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_REST}",
    "o200k": rf"{_CASED[0]}{_CONTRACTION}?|{_CASED[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_CASED_REST}",
    "deepseek-v3": (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""Patterns that take text apart into words, of which a space behind anything else begins one."""

# Those that come before them, for digits and some scripts, match no space.
_NO_SPACES = (r"\p{N}{1,3}", r"\p{N}", "[一-龥぀-ゟ゠-ヿ]+")
# Nor does what they do to a character depend on one across a space between printable ones.
_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Lowercase")
# The bundled pair's: a text's first word is marked as if a space stood before it.
_MARKED_NORMALIZER = [
    {"type": "NFKD"},
    {"type": "StripAccents"},
    {"type": "Replace", "pattern": {"Regex": r"[\s\x00-\x1f\x7f▁]+"}, "content": " "},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
]
_MARKED_PATTERN = rf"▁{'-' * 21}|▁?[A-Za-z]{{1,64}}|▁?[0-9]{{1,64}}|▁?[^A-Za-z0-9▁]"


class PieceCache:
    """The pieces of long texts that one tokenizer encoded last. Not thread-safe."""

    def __init__(self) -> None:
        self._parts: object = None
        self._ids: OrderedDict[str, np.ndarray] = OrderedDict()
        self._characters = 0

    def encode(
        self,
        text: str,
        tokenizer: PreTrainedTokenizerBase,
        encode: Callable[[list[str]], Sequence[Sequence[int]]],
    ) -> list[int]:
        """The token ids of ``text``: those that ``encode`` gives it.

        Args:
            text: Any text.
            tokenizer: The same one each time. It is looked over for every long text: its parts may be
                exchanged and tokens added, but its vocabulary and merges must stay.
            encode: Encodes texts with it, without special tokens.
        """
        pieces = _pieces(text) if len(text) >= _LONG else [text]
        if len(pieces) == 1 or not self._separable(tokenizer):
            return list(encode([text])[0])
        *kept, last = pieces
        unknown = list(dict.fromkeys(piece for piece in kept if piece not in self._ids))
        *encoded, last_ids = encode([*unknown, last])
        for piece, ids in zip(unknown, encoded, strict=True):
            self._ids[piece] = np.array(ids, dtype=np.int32)
            self._characters += len(piece)
        found: list[int] = []
        for piece in kept:
            self._ids.move_to_end(piece)
            found += self._ids[piece].tolist()
        while self._characters > _MOST_CHARACTERS:
            forgotten, _ = self._ids.popitem(last=False)
            self._characters -= len(forgotten)
        return [*found, *last_ids]

    def _separable(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether a text's tokens are those of its pieces; what other parts made of pieces is forgotten."""
        parts = _parts(tokenizer.backend_tokenizer) if tokenizer.is_fast else None
        if parts != self._parts:
            self._parts = parts
            self._ids.clear()
            self._characters = 0
        return parts is not None


def _pieces(text: str) -> list[str]:
    starts = [0]
    while cut := _CUT.search(text, starts[-1] + _PIECE):
        starts.append(cut.start())
    return [text[start:end] for start, end in pairwise([*starts, len(text)])]


def _parts(backend: Any) -> object:
    """What a tokenizer is made of, to be compared; ``None`` where texts cannot be encoded in pieces."""
    model = backend.model
    if type(model).__name__ not in ("BPE", "WordPiece") or getattr(model, "dropout", None):
        return None
    try:
        described = [
            [] if part is None else list(_flat(json.loads(part.__getstate__())))
            for part in (backend.normalizer, backend.pre_tokenizer)
        ]
    except Exception:  # what tokenizers raises for parts that are written in Python
        return None
    added = [
        (number, token.content, token.normalized, token.single_word, token.lstrip or token.rstrip)
        for number, token in backend.get_added_tokens_decoder().items()
    ]
    normalizers, splitters = described
    marked = normalizers == _MARKED_NORMALIZER and _regexes(splitters) == [_MARKED_PATTERN]
    plain = all(each["type"] in _NORMALIZERS for each in normalizers) and _splits_at_spaces(splitters)
    if not (marked or plain) or any(map(_reaches_out, added)):
        return None
    return described, added


def _flat(described: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer in their order."""
    inner = described.get("pretokenizers", described.get("normalizers"))
    if inner is None:
        yield described
    else:
        for each in inner:
            yield from _flat(each)


def _splits_at_spaces(splitters: list[dict[str, Any]]) -> bool:
    """Whether all parts are known, and one of them begins words at spaces."""
    regexes = _regexes([each for each in splitters if each["type"] not in ("ByteLevel", "Digits")])
    whole = any(each["type"] == "ByteLevel" and each["use_regex"] for each in splitters)
    known = all(regex in _NO_SPACES or regex in PATTERNS.values() for regex in regexes)
    return known and (whole or any(regex in PATTERNS.values() for regex in regexes))


def _regexes(splitters: list[dict[str, Any]]) -> list[str | None]:
    """The patterns whose matches and gaps are words; ``None`` for whatever else a part does."""
    return [
        each["pattern"].get("Regex")
        if each["type"] == "Split" and each["behavior"] == "Isolated" and not each["invert"]
        else None
        for each in splitters
    ]


def _reaches_out(added: tuple[int, str, bool, bool, bool]) -> bool:
    """Whether an added token may be found across a cut, or takes what is around it."""
    _, content, normalized, _, strips = added
    # What is compared with normalised text may be white space when it is normalised itself.
    return strips or any(map(str.isspace, content)) or (normalized and not content.isascii())
