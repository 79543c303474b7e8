from __future__ import annotations

import copy

import pytest
from helpers.small_tokenizers import tokenizer_named
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rapid_integrations.errors import UnsupportedModelError
from rapid_integrations.structured.vocabulary import Vocabulary, vocabulary_of


def describe(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    return vocabulary_of(tokenizer, frozenset({tokenizer.eos_token_id}))


@pytest.mark.parametrize(
    ("family", "canonical", "drops_first_space"),
    [("chatml", True, False), ("gemma", True, False), ("llama2", True, True), ("word_level", False, True)],
)
def test_the_view_of_a_tokenizer(family: str, canonical: bool, drops_first_space: bool) -> None:
    vocabulary = describe(tokenizer_named(family))
    assert (vocabulary.canonical, vocabulary.drops_first_space) == (canonical, drops_first_space)
    assert describe(tokenizer_named(family)) is vocabulary


def test_a_tokenizer_with_texts_that_depend_on_the_position_raises() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 2, "##b": 3, ".": 4}))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.decoder = decoders.BPEDecoder(suffix="a")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]")
    with pytest.raises(UnsupportedModelError, match="do not work with this"):
        describe(tokenizer)


def test_a_tokenizer_that_llguidance_decodes_differently_raises() -> None:
    tokenizer = copy.deepcopy(tokenizer_named("gemma"))
    steps = [decoders.Replace("t", "T"), decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    with pytest.raises(UnsupportedModelError, match=r"llguidance has another text than 'T' for token"):
        describe(tokenizer)
