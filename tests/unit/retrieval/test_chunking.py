"""Tests of cutting a document into chunks."""

from __future__ import annotations

import pytest
from helpers.small_tokenizers import tokenizer_named
from hypothesis import given, settings
from hypothesis import strategies as st

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.retrieval.chunking import cut_into_chunks, head_and_tail
from rapid_integrations.tokenization.encoding import token_offsets

CHATML = tokenizer_named("chatml")


def cut(text, max_tokens, tokenizer=CHATML):
    return cut_into_chunks(text, token_offsets(text, tokenizer), max_tokens)


@settings(deadline=None, max_examples=150)
@given(text=st.text("ab .\n龙é", max_size=120), max_tokens=st.integers(1, 20))
@pytest.mark.parametrize("family", ["chatml", "gemma"])
def test_chunks_are_slices_that_cover_the_document(family, text, max_tokens):
    tokenizer = tokenizer_named(family)
    starts = token_offsets(text, tokenizer)
    chunks = cut_into_chunks(text, starts, max_tokens)
    assert "".join(chunk.text for chunk in chunks) == text
    assert [chunk.position for chunk in chunks] == list(range(len(chunks)))
    assert all(chunk.text for chunk in chunks)
    at = 0
    for chunk in chunks:
        tokens = sum(at <= start < at + len(chunk.text) for start in starts)
        assert tokens <= max_tokens or len(chunk.text) == 1
        at += len(chunk.text)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("aaaa bbbb. cccc\ndddd eeee\n\nffff gggg hhhh iiii jjjj", "aaaa bbbb. cccc\ndddd eeee\n\n"),
        ("aaaa bbbb. cccc dddd\neeee. ffff gggg hhhh iiii jjjj", "aaaa bbbb. cccc dddd\n"),
        ("aaaa bbbb cccc dddd. eeee ffff gggg hhhh iiii jjjj", "aaaa bbbb cccc dddd. "),
        ("aaaa bbbb cccc dddd eeee ffff gggg hhhh iiii jjjj", "aaaa bbbb cccc dddd eeee "),
        ("a" * 60, "a" * 29),
    ],
)
def test_the_best_boundary_is_taken(text, first):
    starts = list(range(len(text)))  # one token a character
    assert cut_into_chunks(text, starts, 29)[0].text == first


def test_a_document_that_fits_is_one_chunk():
    assert [chunk.text for chunk in cut("the answer", 100)] == ["the answer"]
    assert cut("", 100) == ()


def test_max_tokens_below_one_raises():
    with pytest.raises(ConfigurationError, match="max_tokens=0"):
        cut("the answer", 0)


@settings(deadline=None, max_examples=100)
@given(text=st.text("ab .\n龙", max_size=80), budget=st.integers(1, 20))
def test_head_and_tail_are_the_ends_of_the_document(text, budget):
    starts = token_offsets(text, CHATML)
    pieces = head_and_tail(text, starts, budget)
    for piece in pieces:
        assert text[piece.position :].startswith(piece.text)
    if len(starts) <= budget:
        assert "".join(piece.text for piece in pieces) == (text if text.strip() else "")
    else:
        covered = sum(any(p.position <= start < p.position + len(p.text) for p in pieces) for start in starts)
        assert covered <= budget + 2  # a character of several tokens is taken whole
