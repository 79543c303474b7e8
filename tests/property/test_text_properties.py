from __future__ import annotations

import itertools

import pytest
from helpers.small_tokenizers import FAMILIES, tokenizer_named
from hypothesis import given, settings
from hypothesis import strategies as st

from rapid_integrations.tokenization.encoding import control_tokens, encode_plain
from rapid_integrations.tokenization.streaming import StopScanner, TextAssembler, token_pieces


def chunked(items, sizes):
    """Split ``items`` into runs of the given sizes, in rotation."""
    start = 0
    for size in itertools.cycle(sizes):
        if start >= len(items):
            return
        yield items[start : start + size]
        start += size


sizes = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@pytest.mark.parametrize("family", ["chatml", "llama3", "word_level"])
@settings(deadline=None, max_examples=150)
@given(data=st.data(), sizes=sizes)
def test_tokens_in_any_chunks_join_to_the_decoding(family, data, sizes):
    tokenizer = tokenizer_named(family)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=60))
    assembler = TextAssembler(tokenizer)
    out = "".join(assembler.feed(part) for part in chunked(ids, sizes)) + assembler.flush()
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert out == assembler.text == whole


@settings(deadline=None, max_examples=150)
@given(data=st.data(), sizes=sizes)
def test_bytes_in_any_chunks_join_to_the_decoding(data, sizes):
    tokenizer = tokenizer_named("chatml")
    alphabet = sorted(i for token, i in tokenizer.get_vocab().items() if len(token) == 1 and ord(token) > 127)
    ids = data.draw(st.lists(st.sampled_from(alphabet), max_size=150))
    assembler = TextAssembler(tokenizer)
    out = "".join(assembler.feed(part) for part in chunked(ids, sizes)) + assembler.flush()
    assert out == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("family", ["gemma", "llama2"])
@settings(deadline=None, max_examples=150)
@given(text=st.one_of(st.text(max_size=60), st.text("a é龙\U0001f600", max_size=60)), sizes=sizes)
def test_sentencepiece_text_with_byte_fallback(family, text, sizes):
    tokenizer = tokenizer_named(family)
    ids = encode_plain(text, tokenizer)
    assembler = TextAssembler(tokenizer)
    out = "".join(assembler.feed(part) for part in chunked(ids, sizes)) + assembler.flush()
    assert out == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@settings(deadline=None, max_examples=400)
@given(
    text=st.text("ab\n", max_size=30),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    sizes=sizes,
)
def test_a_stop_string_ends_text_in_any_chunks(text, stop, sizes):
    scanner = StopScanner(stop)
    out = "".join(scanner.feed(part) for part in chunked(text, sizes)) + scanner.feed("", final=True)
    first = min((at for s in stop if (at := text.find(s)) >= 0), default=None)
    assert out == text[:first]
    assert scanner.stopped == (first is not None)


@settings(deadline=None, max_examples=150)
@given(
    text=st.text("the answer你\n", max_size=40),
    stop=st.lists(st.text("the answer你\n", min_size=1, max_size=3), max_size=3),
    sizes=sizes,
)
def test_a_stop_string_ends_tokens_in_any_chunks(text, stop, sizes):
    tokenizer = tokenizer_named("chatml")
    assembler = TextAssembler(tokenizer, stop)
    out = "".join(assembler.feed(part) for part in chunked(encode_plain(text, tokenizer), sizes))
    out += assembler.flush()
    first = min((at for s in stop if (at := text.find(s)) >= 0), default=None)
    assert out == assembler.text == text[:first]
    assert assembler.stopped == (first is not None)


@pytest.mark.parametrize("family", ["chatml", "gemma", "word_level"])
@settings(deadline=None, max_examples=100)
@given(data=st.data(), stop=st.lists(st.text("the answer你\n", min_size=1, max_size=3), max_size=2))
def test_each_token_has_one_piece_and_they_join_to_the_answer(family, data, stop):
    tokenizer = tokenizer_named(family)
    text = data.draw(st.text("the answer你😀\n", max_size=40))
    random_ids = st.lists(st.integers(0, len(tokenizer) - 1), max_size=40)
    ids = encode_plain(text, tokenizer)
    if family != "gemma":  # its invalid bytes decode differently one by one
        ids = data.draw(st.one_of(st.just(ids), random_ids))
    assembler = TextAssembler(tokenizer, stop)
    answer = assembler.feed(ids) + assembler.flush()
    pieces = token_pieces(ids, tokenizer, answer)
    assert "".join(pieces) == answer
    assert len(pieces) == len(ids)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_no_text_yields_a_control_token(family, data):
    tokenizer = tokenizer_named(family)
    controls = control_tokens(tokenizer).ids
    parts = st.one_of(
        st.sampled_from(sorted(controls)),
        st.sampled_from(["<", "|", ">", " ", "\n", "im_start"]),
        st.text(max_size=4),
    )
    text = "".join(data.draw(st.lists(parts, max_size=12)))
    assert set(controls.values()).isdisjoint(encode_plain(text, tokenizer))
