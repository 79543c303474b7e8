"""Tokenizers that cannot be described to llguidance."""

from __future__ import annotations

import copy

import pytest
from helpers.small_tokenizers import tokenizer_named
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from rapid_integrations.errors import UnsupportedModelError
from rapid_integrations.structured.vocabulary import vocabulary_of


def test_tokens_whose_text_depends_on_their_position_are_an_error() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 2, "##b": 3, ".": 4}))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.decoder = decoders.BPEDecoder(suffix="a")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]")
    with pytest.raises(UnsupportedModelError, match="do not work with this"):
        vocabulary_of(tokenizer, frozenset({tokenizer.eos_token_id}))


def test_tokens_that_llguidance_decodes_differently_are_an_error() -> None:
    tokenizer = copy.deepcopy(tokenizer_named("gemma"))
    steps = [decoders.Replace("t", "T"), decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    with pytest.raises(UnsupportedModelError, match=r"llguidance decodes token .* to other text than 'T'"):
        vocabulary_of(tokenizer, frozenset({tokenizer.eos_token_id}))
