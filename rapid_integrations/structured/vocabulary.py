"""The text of each token of a vocabulary, in the form that llguidance needs.

llguidance reads byte-level and byte-fallback tokenizers itself, and knows how they tokenize a text. Any other
tokenizer is described to it by the text that each token adds to a decoded text. In both cases the texts are
checked: a token must add the same text at every position.
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
        tokenizer: llguidance's object.
        canonical: Whether llguidance knows how the tokenizer tokenizes a text.
        drops_first_space: Whether decoding drops a leading space of the first token.
    """

    tokenizer: LLTokenizer
    canonical: bool
    drops_first_space: bool


_views: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, frozenset[int]], Vocabulary]] = (
    WeakKeyDictionary()
)
_lock = threading.Lock()


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, eos_token_ids: frozenset[int]) -> Vocabulary:
    """Describe a tokenizer to llguidance; the description is cached for as long as the tokenizer exists.

    Args:
        tokenizer: A transformers tokenizer.
        eos_token_ids: The tokens that end an answer.

    Raises:
        UnsupportedModelError: The text of a token depends on its position.
    """
    with _lock:
        views = _views.setdefault(tokenizer, {})
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
    except ValueError:  # not byte-level or byte-fallback, or not a fast tokenizer
        view = LLTokenizer(TokenizerWrapper(_TokenTexts(texts, tokenizer, eos[0])), eos_token=eos)
        return Vocabulary(view, canonical=False, drops_first_space=drops_first_space)
    for token_id, text in enumerate(texts):
        if text is not None and view.decode_bytes([token_id]) != text.encode():
            raise _unsupported(tokenizer, f"llguidance decodes token {token_id} to other text than {text!r}")
    return Vocabulary(view, canonical=True, drops_first_space=drops_first_space)


class _TokenTexts:
    """A vocabulary in the form that llguidance's ``TokenizerWrapper`` expects."""

    def __init__(
        self, texts: list[str | None], tokenizer: PreTrainedTokenizerBase, eos_token_id: int
    ) -> None:
        self.tokens = [(text or "").encode() for text in texts]
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted({*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids})

    def __call__(self, text: bytes) -> list[int]:
        # Called once to find the argument type. Grammars over such a vocabulary do not force text.
        return []


def _token_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str | None], bool]:
    """The text that each token adds after another one, and whether the first token loses a leading space.

    The text is ``None`` for control tokens, and for tokens that are part of a character.
    """
    size = len(tokenizer)
    added = tokenizer.added_tokens_decoder
    ids = [token_id for token_id in range(size) if token_id not in added]

    def decode(sequences: list[list[int]]) -> list[str]:
        return list(tokenizer.batch_decode(sequences, clean_up_tokenization_spaces=False))

    alone = dict(zip(ids, decode([[i] for i in ids]), strict=True))
    anchor = next(
        (
            i
            for i, text in alone.items()
            if text.isascii() and text.isalnum() and _spelled(tokenizer, i, text)
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


def _spelled(tokenizer: PreTrainedTokenizerBase, token_id: int, text: str) -> bool:
    # Byte tokens do not qualify: adjacent bytes are decoded together.
    return str(tokenizer.convert_ids_to_tokens(token_id)).endswith(text)


def _unsupported(tokenizer: PreTrainedTokenizerBase, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"json_schema, regex and choices do not work with this {type(tokenizer).__name__}: {reason}. Use a "
        "model with a byte-level or SentencePiece tokenizer, or ask for the format in the prompt."
    )
