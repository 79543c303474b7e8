from __future__ import annotations

import pytest
from helpers.small_tokenizers import tokenizer_named, tool_tokenizer

from rapid_integrations.tokenization.encoding import encode_plain
from rapid_integrations.tokenization.streaming import StopScanner, TextAssembler, token_pieces

CHATML = tokenizer_named("chatml")


def test_a_character_of_several_tokens_is_emitted_whole():
    ids = encode_plain("a龙b", CHATML)
    assert len(ids) == 5
    assembler = TextAssembler(CHATML)
    assert [assembler.feed([i]) for i in ids] == ["a", "", "", "龙", "b"]
    assert assembler.flush() == ""
    assert assembler.text == "a龙b"


def test_an_incomplete_character_is_emitted_at_the_flush():
    ids = encode_plain("a龙", CHATML)[:-1]
    assembler = TextAssembler(CHATML)
    assert assembler.feed(ids) == "a"
    assert assembler.flush() == "\N{REPLACEMENT CHARACTER}"
    assert assembler.flush() == ""
    assert assembler.text == CHATML.decode(ids)


def test_a_replacement_character_in_the_text_is_kept():
    text = "x\N{REPLACEMENT CHARACTER}"
    assembler = TextAssembler(CHATML)
    out = assembler.feed(encode_plain(text, CHATML)) + assembler.flush()
    assert out == text


def test_spaces_between_words_are_kept():
    tokenizer = tokenizer_named("llama2")
    ids = encode_plain("the end  and the rest", tokenizer)
    assembler = TextAssembler(tokenizer)
    assert "".join(assembler.feed([i]) for i in ids) == "the end  and the rest"


def test_special_tokens_have_no_text():
    special = CHATML.convert_tokens_to_ids("<|im_start|>")
    ids = encode_plain("a龙", CHATML)
    assembler = TextAssembler(CHATML)
    fed = [special, ids[0], special, *ids[1:3], special, *ids[3:], special, CHATML.eos_token_id]
    assert "".join(assembler.feed([i]) for i in fed) == "a龙"


def test_visible_special_tokens_are_text():
    tokenizer = tool_tokenizer("mistral")
    markup = tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    ids = [*encode_plain("龙", tokenizer), markup, *encode_plain("[{", tokenizer), tokenizer.bos_token_id]
    for visible, expected in ((["[TOOL_CALLS]"], "龙[TOOL_CALLS][{"), ([], "龙[{")):
        assembler = TextAssembler(tokenizer, visible=visible)
        assert "".join(assembler.feed([i]) for i in ids) == expected
    stopping = TextAssembler(tokenizer, ["S]["], visible=["[TOOL_CALLS]"])
    assert stopping.feed(ids) == "龙[TOOL_CALL"
    assert stopping.stopped


class CountingTokenizer:
    """Counts the tokens that it decodes."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.decoded = 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __len__(self):
        return len(self._tokenizer)

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **options)


@pytest.mark.parametrize("text", ["the keeper ", "龙", "\N{REPLACEMENT CHARACTER}"])
def test_the_cost_of_a_token_does_not_grow_with_the_answer(text):
    counting = CountingTokenizer(CHATML)
    ids = encode_plain(text * 400, CHATML)
    assembler = TextAssembler(counting)
    for token_id in ids:
        assembler.feed([token_id])
    assembler.flush()
    assert assembler.text == text * 400
    assert counting.decoded < 80 * len(ids)


def test_invalid_bytes_are_emitted_before_the_end():
    byte = CHATML.convert_tokens_to_ids("ÿ")  # byte 0xFF in byte-level BPE
    ids = [byte] * 200 + encode_plain("end", CHATML)
    assembler = TextAssembler(CHATML)
    pieces = [assembler.feed([i]) for i in ids]
    assert "".join(pieces) == CHATML.decode(ids)
    assert any(pieces[:200])


def test_a_stop_string_of_several_tokens():
    ids = encode_plain("the answer\n\nQuestion: what", CHATML)
    assembler = TextAssembler(CHATML, stop=["\n\nQuestion:"])
    assert "".join(assembler.feed([i]) for i in ids) == "the answer"
    assert assembler.stopped
    assert assembler.feed(ids) == ""
    assert assembler.flush() == ""
    assert assembler.text == "the answer"


def test_an_incomplete_stop_string_is_emitted_as_text():
    assembler = TextAssembler(CHATML, stop=["END."])
    assert assembler.feed(encode_plain("the EN", CHATML)) == "the "
    assert assembler.feed(encode_plain("Dx", CHATML)) == "ENDx"
    assert assembler.feed(encode_plain("EN", CHATML)) == ""
    assert assembler.flush() == "EN"
    assert not assembler.stopped


@pytest.mark.parametrize(
    ("pieces", "stop", "expected", "stopped"),
    [
        (["abcd"], ["cd", "bc"], "a", True),
        (["ab", "x"], ["abc", "b"], "a", True),
        (["ab", "c"], ["abc", "b"], "", True),
        (["ab"], ["abc", "b"], "a", True),
        (["aab", "aac"], ["aac"], "aab", True),
        (["a" * 5], ["aa"], "", True),
        (["xyz"], [], "xyz", False),
        (["stop"], ["stop"], "", True),
    ],
)
def test_the_earliest_stop_string_ends_the_text(pieces, stop, expected, stopped):
    scanner = StopScanner(stop)
    out = "".join(scanner.feed(piece) for piece in pieces) + scanner.feed("", final=True)
    assert (out, scanner.stopped) == (expected, stopped)


def test_only_a_possible_beginning_of_a_stop_string_is_held_back():
    scanner = StopScanner(["\nUser:", "###"])
    assert scanner.feed("fine\nUse") == "fine"
    assert scanner.feed("ful ##") == "\nUseful "
    assert scanner.feed("x") == "##x"


def test_a_character_belongs_to_the_token_that_completes_it():
    ids = encode_plain("a 龙", CHATML)
    pieces = token_pieces(ids, CHATML, "a 龙")
    assert len(pieces) == len(ids) > 2
    assert "".join(pieces) == "a 龙"
    assert pieces[-1] == "龙"
    assert "" in pieces


def test_no_pieces_if_the_tokens_do_not_spell_the_text():
    assert token_pieces(encode_plain("one", CHATML), CHATML, "two") == ()
    assert token_pieces([], CHATML, "two") == ()
    assert token_pieces([], CHATML, "") == ()
