r"""Encode long texts in pieces, and cache the tokens of each piece.

Prompts with questions about one document begin alike, and encoding a document of 100,000 tokens takes a tenth
of a second or more. A text is cut before a space between two printable ASCII characters, at the first such
place after every few thousand characters, so that texts with the same beginning have the same pieces up to
their difference.

The tokens of a text equal those of its pieces if the tokenizer

* has no normalizer that acts across such a space,
* splits text into words by patterns in which a space can only be the first character of a match, which look
  ahead no further than whether whitespace follows (``\s+(?!\S)``), and which never look behind. Then each
  match before the space ends there, wherever the text ends, and the matches after it are those at the
  beginning of a text. Parts that split these words further do not matter,
* encodes each word independently, has no added tokens that contain whitespace or that strip their
  surroundings, and has no post-processor that changes the tokens of the text.

The patterns of the GPT, Llama 3, Qwen, Mistral and DeepSeek families meet these conditions and are listed
here. A tokenizer with any other part encodes whole texts. The property tests compare both ways for every
listed pattern.
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

_MIN_PIECE_CHARACTERS = 4096
# Reading the tokenizer's parts takes 0.1 ms, or 1 ms with 800 added tokens. It does not pay for shorter
# texts.
_MIN_TEXT_CHARACTERS = 2 * _MIN_PIECE_CHARACTERS
# Of all cached pieces. With their tokens, English texts take about two bytes per character.
_MAX_CACHED_CHARACTERS = 2**23
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
"""Patterns that split text into words, in which a space that follows another character begins a word."""

# Patterns that match no space and precede those above.
_PATTERNS_WITHOUT_SPACES = (r"\p{N}{1,3}", r"\p{N}", "[一-龥぀-ゟ゠-ヿ]+")
# Normalizers that do not act across a space between printable ASCII characters.
_LOCAL_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Lowercase")
# The bundled pair's parts: the normalizer prepends a space to the text, so that its first word is encoded
# like any other.
_DEMO_NORMALIZER = [
    {"type": "NFKD"},
    {"type": "StripAccents"},
    {"type": "Replace", "pattern": {"Regex": r"[\s\x00-\x1f\x7f▁]+"}, "content": " "},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
]
_DEMO_PATTERN = rf"▁{'-' * 21}|▁?[A-Za-z]{{1,64}}|▁?[0-9]{{1,64}}|▁?[^A-Za-z0-9▁]"


class PieceCache:
    """The most recently used pieces of long texts and their tokens, for one tokenizer. Not thread-safe."""

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
        """Return the tokens of ``text``, equal to ``encode([text], tokenizer)[0]``.

        Args:
            text: Any text.
            tokenizer: The same tokenizer in every call. Each long text checks its parts: tokens may have been
                added, and the normalizer, pre-tokenizer and post-processor replaced, but the model must not
                change.
            encode: Encodes a batch of texts with ``tokenizer``, without special tokens.
        """
        pieces = _cut_into_pieces(text) if len(text) >= _MIN_TEXT_CHARACTERS else [text]
        parts = _parts(tokenizer.backend_tokenizer) if len(pieces) > 1 and tokenizer.is_fast else None
        if parts is None:
            return list(encode([text], tokenizer)[0])
        if parts != self._parts:
            self._parts = parts
            self._ids.clear()
            self._characters = 0
        *complete, last = pieces
        missing = list(dict.fromkeys(piece for piece in complete if piece not in self._ids))
        *encoded, last_ids = encode([*missing, last], tokenizer)
        for piece, ids in zip(missing, encoded, strict=True):
            self._ids[piece] = np.array(ids, dtype=np.int32)
            self._characters += len(piece)
        token_ids: list[int] = []
        for piece in complete:
            self._ids.move_to_end(piece)
            token_ids += self._ids[piece].tolist()
        while self._characters > _MAX_CACHED_CHARACTERS:
            oldest, _ = self._ids.popitem(last=False)
            self._characters -= len(oldest)
        return [*token_ids, *last_ids]


def _cut_into_pieces(text: str) -> list[str]:
    starts = [0]
    while cut := _CUT.search(text, starts[-1] + _MIN_PIECE_CHARACTERS):
        starts.append(cut.start())
    return [text[start:end] for start, end in pairwise([*starts, len(text)])]


class _AddedToken(NamedTuple):
    """An added token with every property that decides where it is matched."""

    id: int
    content: str
    special: bool
    normalized: bool
    single_word: bool
    strips: bool


def _parts(backend: Any) -> object:
    """Return the parts of a tokenizer for comparison, or ``None`` if it must encode whole texts."""
    model = backend.model
    if type(model).__name__ not in ("BPE", "WordPiece") or getattr(model, "dropout", None):
        return None
    try:
        states = [
            b"" if part is None else part.__getstate__()
            for part in (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
        ]
    except Exception:  # tokenizers raises it for parts that are written in Python
        return None
    normalizers, splitters, processors = (
        list(_flatten(json.loads(state))) if state else [] for state in states
    )
    added = [
        _AddedToken(
            token_id,
            token.content,
            token.special,
            token.normalized,
            token.single_word,
            token.lstrip or token.rstrip,
        )
        for token_id, token in backend.get_added_tokens_decoder().items()
    ]
    is_demo = normalizers == _DEMO_NORMALIZER and list(map(_regex, splitters)) == [_DEMO_PATTERN]
    is_listed = all(part["type"] in _LOCAL_NORMALIZERS for part in normalizers) and _splits_at_spaces(
        splitters
    )
    if not (is_demo or is_listed) or not all(map(_adds_only_special_tokens, processors)):
        return None
    for token in added:
        # A token that is matched in normalized text is normalized as well, which may turn it into whitespace.
        may_change = token.normalized and (is_demo or (bool(normalizers) and not token.content.isascii()))
        if token.strips or may_change or any(map(str.isspace, token.content)):
            return None
    return states, added


def _flatten(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the parts of a normalizer, pre-tokenizer or post-processor in order, without nested sequences."""
    for name in ("normalizers", "pretokenizers", "processors"):
        if name in state:
            for part in state[name]:
                yield from _flatten(part)
            return
    yield state


def _splits_at_spaces(splitters: list[dict[str, Any]]) -> bool:
    """Whether words begin at spaces, whatever the text: all parts are listed, and one begins words there."""
    rest = list(dropwhile(_ignores_spaces, splitters))
    if not rest or not _begins_words_at_spaces(rest[0]):
        return False
    return all(
        _ignores_spaces(part) or _begins_words_at_spaces(part) or part["type"] == "ByteLevel"
        for part in rest[1:]
    )


def _ignores_spaces(splitter: dict[str, Any]) -> bool:
    return splitter["type"] == "Digits" or _regex(splitter) in _PATTERNS_WITHOUT_SPACES


def _begins_words_at_spaces(splitter: dict[str, Any]) -> bool:
    is_gpt2 = splitter["type"] == "ByteLevel" and bool(splitter["use_regex"])
    return is_gpt2 or _regex(splitter) in PATTERNS.values()


def _regex(splitter: dict[str, Any]) -> str | None:
    """Return the pattern of a part whose matches and gaps are words, or ``None`` for any other part."""
    if splitter["type"] != "Split" or splitter["behavior"] != "Isolated" or splitter["invert"]:
        return None
    regex: str | None = splitter["pattern"].get("Regex")
    # Some tokenizer files contain literal line breaks, others escape sequences.
    return None if regex is None else regex.replace("\r", r"\r").replace("\n", r"\n")


def _adds_only_special_tokens(processor: dict[str, Any]) -> bool:
    """Whether a post-processor only adds special tokens, which ``add_special_tokens=False`` turns off."""
    if processor["type"] == "TemplateProcessing":
        return [list(part) for part in processor["single"]].count(["Sequence"]) == 1
    return processor["type"] in ("ByteLevel", "BertProcessing", "RobertaProcessing")
