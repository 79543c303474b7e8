"""Describe a tokenizer to llguidance: the text of each token.

llguidance reads byte-level and byte-fallback tokenizers itself, and then also knows how they tokenize a text.
Any other tokenizer is described by the text that each token adds when it is decoded. In both cases this
module checks that a token adds the same text in every position, because a grammar works on texts of tokens.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from rapid_integrations.errors import UnsupportedModelError

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """llguidance's view of a tokenizer.

    Attributes:
        tokenizer: The tokenizer object of llguidance.
        canonical: Whether llguidance knows how the tokenizer tokenizes a text.
        drops_first_space: Whether decoding drops a leading space of the first token.
    """

    tokenizer: LLTokenizer
    canonical: bool
    drops_first_space: bool


_cache: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, frozenset[int]], Vocabulary]] = (
    WeakKeyDictionary()
)
_lock = threading.Lock()


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, eos_token_ids: frozenset[int]) -> Vocabulary:
    """Return llguidance's view of ``tokenizer``, cached until its number of tokens changes.

    Args:
        tokenizer: A transformers tokenizer.
        eos_token_ids: The tokens that end an answer.

    Raises:
        UnsupportedModelError: The text of a token depends on its position.
    """
    with _lock:
        views = _cache.setdefault(tokenizer, {})
        key = (len(tokenizer), eos_token_ids)
        if key not in views:
            views[key] = _describe(tokenizer, eos_token_ids)
        return views[key]


def _describe(tokenizer: PreTrainedTokenizerBase, eos_token_ids: frozenset[int]) -> Vocabulary:
    from llguidance import LLTokenizer, TokenizerWrapper
    from llguidance.hf import from_tokenizer

    texts, drops_first_space = _token_texts(tokenizer)
    eos = sorted(eos_token_ids)
    try:
        view = from_tokenizer(tokenizer, eos_token=eos)  # type: ignore[arg-type]  # raises for slow ones
    except ValueError:  # neither byte-level nor byte fallback, or slow
        view = LLTokenizer(TokenizerWrapper(_TokenTexts(texts, tokenizer, eos[0])), eos_token=eos)
        return Vocabulary(view, canonical=False, drops_first_space=drops_first_space)
    for token_id, text in enumerate(texts):
        if text is not None and view.decode_bytes([token_id]) != text.encode():
            raise _unsupported(tokenizer, f"llguidance has another text than {text!r} for token {token_id}")
    return Vocabulary(view, canonical=True, drops_first_space=drops_first_space)


class _TokenTexts:
    """A vocabulary with the interface that llguidance's ``TokenizerWrapper`` requires."""

    def __init__(
        self, texts: list[str | None], tokenizer: PreTrainedTokenizerBase, eos_token_id: int
    ) -> None:
        self.tokens = [(text or "").encode() for text in texts]
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted({*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids})

    def __call__(self, text: bytes) -> list[int]:
        # llguidance calls this once, to detect the argument type. Grammars over such a vocabulary force no
        # text.
        return []


def _token_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str | None], bool]:
    """Find the text that each token adds after another token, by decoding it in different positions.

    Returns:
        A text per token (``None`` for control tokens and for parts of characters), and whether decoding drops
        a leading space of the first token.

    Raises:
        UnsupportedModelError: The text of a token depends on its position.
    """
    size = len(tokenizer)
    added = tokenizer.added_tokens_decoder
    ids = [token_id for token_id in range(size) if token_id not in added]

    def decode(sequences: list[list[int]]) -> list[str]:
        return list(tokenizer.batch_decode(sequences, clean_up_tokenization_spaces=False))

    alone = dict(zip(ids, decode([[i] for i in ids]), strict=True))
    anchor = next(
        (
            token_id
            for token_id, text in alone.items()
            if text.isascii() and text.isalnum() and not _is_byte(tokenizer, token_id, text)
        ),
        None,
    )
    if anchor is None:
        raise _unsupported(tokenizer, "none of its tokens is a word or a digit")
    before = alone[anchor]
    after = decode([[anchor, anchor]])[0][len(before) :]
    texts: list[str | None] = [None] * size
    dropped: list[int] = []
    kept: list[int] = []
    for token_id, two, three in zip(
        ids, decode([[anchor, i] for i in ids]), decode([[anchor, i, anchor] for i in ids]), strict=True
    ):
        text = two[len(before) :]
        if _REPLACEMENT in text:
            continue
        if three != before + text + after or alone[token_id] not in (text, text.removeprefix(" ")):
            token = tokenizer.convert_ids_to_tokens(token_id)
            raise _unsupported(tokenizer, f"the text of its token {token!r} depends on its position")
        texts[token_id] = text
        if text.startswith(" "):
            (kept if alone[token_id] == text else dropped).append(token_id)
    if dropped and kept:
        raise _unsupported(tokenizer, "it drops the first space of some tokens only")
    return texts, bool(dropped)


def _is_byte(tokenizer: PreTrainedTokenizerBase, token_id: int, text: str) -> bool:
    """Whether a token is a byte such as ``<0x41>``, whose text depends on the bytes next to it."""
    return not str(tokenizer.convert_ids_to_tokens(token_id)).endswith(text)


def _unsupported(tokenizer: PreTrainedTokenizerBase, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"json_schema, regex and choices do not work with this {type(tokenizer).__name__}: {reason}. Use a "
        "model with a byte-level or SentencePiece tokenizer, or describe the format in the prompt."
    )
