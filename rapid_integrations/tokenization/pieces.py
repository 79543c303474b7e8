r"""Tokenizing long texts in pieces; the tokens of a piece are cached.

Prompts with questions about one document begin alike, and encoding the document takes a tenth of a second or
more for 100,000 tokens. A text is cut before a space between two printable ASCII characters, at the first
such position after every few thousand characters. Texts that begin alike therefore have the same pieces up to
the first difference.

The tokens of a text are the concatenated tokens of its pieces if the tokenizer

* has no normalizer that acts across such a space,
* splits text by patterns in which a space can only begin a match, and which look ahead no further than to
  whether whitespace follows (``\s+(?!\S)``), and never look behind. Matches before the space then end there,
  wherever the text ends, and matches after it are the same as at the beginning of a text. Further splits of
  these words do not matter,
* encodes each word separately, has no added tokens that contain whitespace or strip the text around them, and
  does not change the tokens of a text afterwards.

This is known for the patterns of the GPT, Llama 3, Qwen, Mistral and DeepSeek families, which are listed
here. Any other tokenizer encodes whole texts.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import dropwhile, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Minimum length of a piece, in characters.
_MIN_PIECE = 4096
# Minimum length of a text for which checking the tokenizer pays (0.1 ms; 1 ms with 800 added tokens).
_MIN_TEXT = 2 * _MIN_PIECE
# Upper limit on the characters of all cached pieces; their tokens take some two bytes per character in
# English.
_MAX_CHARACTERS = 2**23
_CUT = re.compile(r"(?<=[!-~]) (?=[!-~])")

PATTERNS = {
    "llama-3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen-2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen-3.5": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "deepseek-v3": (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}  # fmt: skip
"""Patterns that split text into words, in which a space can only begin a word."""

# Patterns without spaces, which may precede those.
_NO_SPACES = (r"\p{N}{1,3}", r"\p{N}", "[一-龥぀-ゟ゠-ヿ]+")
# Normalizers that do not act across such a space.
_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Lowercase")
# The bundled pair's normalizer, which marks the first word of a text like a word after a space.
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
    """Caches the tokens of pieces of long texts for one tokenizer. Not thread-safe."""

    def __init__(self) -> None:
        self._parts: object = None
        self._ids: OrderedDict[str, np.ndarray] = OrderedDict()
        self._characters = 0

    def encode(
        self,
        text: str,
        tokenizer: PreTrainedTokenizerBase,
        encode: Callable[[list[str], PreTrainedTokenizerBase], Sequence[Sequence[int]]],
    ) -> list[int]:
        """The token ids of ``text``, equal to those that ``encode`` gives for the whole text.

        Args:
            text: Any text.
            tokenizer: The same object in every call. It is checked for every long text: tokens may be added,
                and the normalizer, pre-tokenizer and post-processor may be replaced, but its model must not
                change.
            encode: Encodes texts with it, without special tokens.
        """
        pieces = _pieces(text) if len(text) >= _MIN_TEXT else [text]
        parts = _parts(tokenizer.backend_tokenizer) if len(pieces) > 1 and tokenizer.is_fast else None
        if parts is None:
            return list(encode([text], tokenizer)[0])
        if parts != self._parts:
            self._parts = parts
            self._ids.clear()
            self._characters = 0
        *kept, last = pieces
        unknown = list(dict.fromkeys(piece for piece in kept if piece not in self._ids))
        *encoded, last_ids = encode([*unknown, last], tokenizer)
        for piece, ids in zip(unknown, encoded, strict=True):
            self._ids[piece] = np.array(ids, dtype=np.int32)
            self._characters += len(piece)
        found: list[int] = []
        for piece in kept:
            self._ids.move_to_end(piece)
            found += self._ids[piece].tolist()
        while self._characters > _MAX_CHARACTERS:
            forgotten, _ = self._ids.popitem(last=False)
            self._characters -= len(forgotten)
        return [*found, *last_ids]


def _pieces(text: str) -> list[str]:
    starts = [0]
    while cut := _CUT.search(text, starts[-1] + _MIN_PIECE):
        starts.append(cut.start())
    return [text[start:end] for start, end in pairwise([*starts, len(text)])]


class _Added(NamedTuple):
    """An added token, with everything that determines where it matches."""

    id: int
    content: str
    special: bool
    normalized: bool
    single_word: bool
    strips: bool


def _parts(backend: Any) -> object:
    """The parts of a tokenizer, for comparison; ``None`` if texts cannot be encoded in pieces."""
    model = backend.model
    if type(model).__name__ not in ("BPE", "WordPiece") or getattr(model, "dropout", None):
        return None
    try:
        states = [
            b"" if part is None else part.__getstate__()
            for part in (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
        ]
    except Exception:  # raised for parts that are written in Python
        return None
    normalizers, splitters, processors = (list(_flat(json.loads(state))) if state else [] for state in states)
    added = [
        _Added(
            number,
            token.content,
            token.special,
            token.normalized,
            token.single_word,
            token.lstrip or token.rstrip,
        )
        for number, token in backend.get_added_tokens_decoder().items()
    ]
    marked = normalizers == _MARKED_NORMALIZER and list(map(_regex, splitters)) == [_MARKED_PATTERN]
    plain = all(each["type"] in _NORMALIZERS for each in normalizers) and _splits_at_spaces(splitters)
    if not (marked or plain) or not all(map(_leaves_alone, processors)):
        return None
    for token in added:
        # A token that is compared with normalized text is normalized itself, possibly to whitespace.
        changes = token.normalized and (marked or (bool(normalizers) and not token.content.isascii()))
        if token.strips or changes or any(map(str.isspace, token.content)):
            return None
    return states, added


def _flat(described: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or post-processor, in order."""
    inner = (described[name] for name in ("normalizers", "pretokenizers", "processors") if name in described)
    parts = next(inner, None)
    if parts is None:
        yield described
    else:
        for part in parts:
            yield from _flat(part)


def _splits_at_spaces(splitters: list[dict[str, Any]]) -> bool:
    """Whether words begin at spaces: by a known pattern, and with known parts before and after it."""
    rest = list(dropwhile(_leaves_spaces, splitters))
    if not rest or not _begins_words(rest[0]):
        return False
    return all(
        _leaves_spaces(each) or _begins_words(each) or each["type"] == "ByteLevel" for each in rest[1:]
    )


def _leaves_spaces(splitter: dict[str, Any]) -> bool:
    return splitter["type"] == "Digits" or _regex(splitter) in _NO_SPACES


def _begins_words(splitter: dict[str, Any]) -> bool:
    whole = splitter["type"] == "ByteLevel" and bool(splitter["use_regex"])
    return whole or _regex(splitter) in PATTERNS.values()


def _regex(splitter: dict[str, Any]) -> str | None:
    """The pattern of a part whose matches and gaps are words; ``None`` for any other part."""
    if splitter["type"] != "Split" or splitter["behavior"] != "Isolated" or splitter["invert"]:
        return None
    regex: str | None = splitter["pattern"].get("Regex")
    # Some files contain line breaks, others escape sequences.
    return None if regex is None else regex.replace("\r", r"\r").replace("\n", r"\n")


def _leaves_alone(processor: dict[str, Any]) -> bool:
    """Whether a post-processor only adds special tokens, which are not requested."""
    if processor["type"] == "TemplateProcessing":
        return [list(part) for part in processor["single"]].count(["Sequence"]) == 1
    return processor["type"] in ("ByteLevel", "BertProcessing", "RobertaProcessing")
