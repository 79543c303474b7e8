"""Grammars over real tokenizers: allowed answers are valid, and unsupported formats are errors."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_tokenizers import tokenizer_named
from pydantic import BaseModel, FilePath
from transformers import AutoTokenizer

from rapid_integrations.demo import TARGET_PATH
from rapid_integrations.errors import ConfigurationError, UnsupportedModelError
from rapid_integrations.structured import grammar as structured
from rapid_integrations.structured.grammar import OutputConstraints
from rapid_integrations.structured.output_format import OutputFormat
from rapid_integrations.tokenization.streaming import TextAssembler

PADDING = 9
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["red", "dark blue"]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "flags"],
    "additionalProperties": False,
}


class Answer(BaseModel):
    name: str
    age: int
    kind: str
    flags: list[bool]


PATTERNS = ("the (answer|document) is", r"\d{2,4}/\d", "(?i)yes|no", "[ a]{2,5}", " the", "x|", "a*", "")
FORMATS = [
    *({"regex": regex} for regex in PATTERNS),
    {"choices": ("the answer", "document")},
    {"choices": (" the", 'a"b\\c\n', "日本😀")},
    {"json_schema": SCHEMA},
]
TOKENIZERS = ("chatml", "llama3", "gemma", "llama2", "word_level", "demo")
# The formats that a vocabulary has tokens for, where it does not have them for all formats
SUPPORTED = {"word_level": (0, 5, 6, 7, 8), "demo": (0, 1, 2, 3, 5, 6, 7, 8, 10)}


def named(name: str) -> Any:
    return AutoTokenizer.from_pretrained(str(TARGET_PATH)) if name == "demo" else tokenizer_named(name)


def constraints(tokenizer: Any) -> OutputConstraints:
    return OutputConstraints(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer) + PADDING)


def valid(text: str, asked: dict[str, Any]) -> bool:
    if "regex" in asked:
        return re.fullmatch(asked["regex"], text) is not None
    if "choices" in asked:
        return text in asked["choices"]
    Answer.model_validate(json.loads(text))
    return True


@pytest.mark.parametrize("name", TOKENIZERS)
def test_random_answers_are_valid_and_drafts_do_not_change_the_state(name: str) -> None:
    tokenizer = named(name)
    makes = constraints(tokenizer)
    eos = tokenizer.eos_token_id
    for index in SUPPORTED.get(name, range(len(FORMATS))):
        asked = FORMATS[index]
        ended = set()
        for seed in range(6):
            rng = random.Random(seed)
            constraint, tokens = makes.make(OutputFormat(**asked)), [0] * 0
            while len(tokens) < 100 and eos not in tokens:
                draft = list(tokens)
                for _ in range(rng.choice([0, 0, 1, 4])):
                    if eos not in draft:
                        draft.append(pick(constraint.allowed(draft, 1)[0], rng))
                rows = constraint.allowed(draft, len(draft) - len(tokens) + 1)
                assert rows.shape == (len(draft) - len(tokens) + 1, len(tokenizer) + PADDING)
                assert not rows[0, len(tokenizer) :].any()
                fresh = makes.make(OutputFormat(**asked)).allowed(tokens, 1)
                assert torch.equal(rows[:1], fresh)
                tokens.append(pick(rows[0], rng))
            if tokens[-1] == eos:
                assert constraint.allowed(tokens, 2)[1].all()
                assembler = TextAssembler(tokenizer)
                text = assembler.feed(tokens) + assembler.flush()
                assert valid(text, asked), (asked, text)
                ended.add(text)
        assert ended


def pick(row: torch.Tensor, rng: random.Random) -> int:
    return int(rng.choice(row.nonzero()[:, 0].tolist()))


def test_cached_masks_have_one_bit_per_token() -> None:
    tokenizer = tokenizer_named("chatml")
    vocab = len(tokenizer) + 2000
    ends = frozenset({tokenizer.eos_token_id})
    constraint = OutputConstraints(tokenizer, ends, vocab).make(OutputFormat(regex="[a-z]*"))
    tokens = tokenizer.encode("a" * 100, add_special_tokens=False)
    for end in range(len(tokens)):
        assert constraint.allowed(tokens[:end], 1).shape == (1, vocab)
    kept = [row.nbytes for row in constraint._rows.values()]
    assert len(kept) == len(tokens)
    assert max(kept) <= vocab / 8 + 1


def test_literal_text_is_forced_with_the_tokens_of_the_tokenizer() -> None:
    tokenizer = tokenizer_named("chatml")
    constraint = constraints(tokenizer).make(OutputFormat(regex="the keeper counted (ships|captains)"))
    tokens: list[int] = []
    while (row := constraint.allowed(tokens, 1)[0]).sum() == 1:
        tokens.append(int(row.nonzero()))
    forced = tokenizer.decode(tokens)
    assert len(forced) > 10
    assert tokens == tokenizer.encode("the keeper counted ships", add_special_tokens=False)[: len(tokens)]


def test_a_dead_end_allows_no_token_and_does_not_affect_earlier_positions() -> None:
    tokenizer = named("demo")
    constraint = constraints(tokenizer).make(OutputFormat(regex="ab(é|c)?é"))
    ids = dict(zip("abc", tokenizer.convert_tokens_to_ids(["a", "b", "c"]), strict=True))
    path = [ids["a"], ids["b"]]
    before = constraint.allowed(path, 3)
    assert before[:2].any(-1).all()
    dead = constraint.allowed([*path, ids["c"]], 1)
    assert not dead.any()
    assert torch.equal(constraint.allowed(path, 3), before)


UNSUPPORTED = [
    ({"regex": "a("}, "unclosed group"),
    ({"regex": "a)(b"}, "unopened group"),
    ({"regex": r"(?=a)b"}, "look-ahead"),
    ({"regex": r"(a)\1"}, "backreferences"),
    ({"regex": r"\bword\b"}, "lookarounds"),
    ({"regex": r"[^\s\S]"}, "no text of this model's vocabulary matches"),
    ({"regex": r"a[^\s\S]"}, "no text of this model's vocabulary matches"),
    ({"json_schema": {"not": {}}}, "Unimplemented keys"),
    ({"json_schema": {"type": "array", "uniqueItems": True}}, "Unimplemented keys"),
    ({"json_schema": {"type": "strin"}}, "Invalid type: strin"),
    ({"json_schema": {"$ref": "#/$defs/Gone"}}, "does not exist"),
    ({"json_schema": {"$ref": "https://example.com/schema.json"}}, "not present"),
    ({"json_schema": {"enum": []}}, "Unsatisfiable"),
    ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable"),
    ({"json_schema": {"type": "string", "pattern": "("}}, "regex parse error"),
    ({"regex": "a" * 5000 + "("}, "unclosed group"),
    ({"json_schema": {"type": "k" * 5000}}, "kkk"),
    ({"json_schema": {"not": {}, "properties": {f"p{i}": {"type": "null"} for i in range(99)}}}, '"not"'),
    ({"json_schema": {"type": "object", "x-guidance": {"lenient": True}}}, "x-guidance"),
]


@pytest.mark.parametrize(("asked", "reason"), UNSUPPORTED)
def test_an_unsupported_format_is_an_error_with_the_reason(asked: dict[str, Any], reason: str) -> None:
    name = next(iter(asked))
    with pytest.raises(ConfigurationError, match=rf"(?s)^{name} is not supported: .*{reason}") as raised:
        constraints(tokenizer_named("chatml")).make(OutputFormat(**asked))
    message = str(raised.value)
    assert f"give {name}=None and check the answer instead." in message
    assert len(message) < 600
    for grammar in ("start:", "%json", "no_forcing"):
        assert grammar not in message


def test_the_error_of_an_unsupported_tool_schema_names_the_tool() -> None:
    asked = OutputFormat(json_schema={"type": "array", "uniqueItems": True})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError) as raised:
        constraints(tokenizer_named("chatml")).make(asked, tool="search")
    message = str(raised.value)
    assert message.startswith("the schema of the tool 'search', which must be called, is not supported: ")
    assert '"uniqueItems"' in message
    assert "json_schema" not in message


@pytest.mark.parametrize("text", ["\x7f", "a\x7fb", "\x00", "\u2028", "😀"])
def test_a_choice_may_contain_any_character(text: str) -> None:
    tokenizer = tokenizer_named("chatml")
    constraint, tokens = constraints(tokenizer).make(OutputFormat(choices=["other", text])), list[int]()
    for token in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]:
        assert constraint.allowed(tokens, 1)[0, token]
        tokens.append(token)
    assert tokenizer.decode(tokens[:-1]) == text


def test_a_pydantic_model_with_sets_bytes_and_paths() -> None:
    class Loose(BaseModel):
        tags: set[bool]
        data: bytes
        path: Path
        found: list[FilePath]

    tokenizer = tokenizer_named("chatml")
    constraint, tokens = constraints(tokenizer).make(OutputFormat(json_schema=Loose)), list[int]()  # type: ignore[arg-type]
    answer = json.dumps({"tags": [True, True], "data": "a b", "path": "/x", "found": [__file__]})
    for token in [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]:
        assert constraint.allowed(tokens, 1)[0, token], tokenizer.decode(tokens)
        tokens.append(token)
    assert Loose.model_validate_json(answer).tags == {True}


def test_choices_without_tokens_in_the_vocabulary_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match="no text of this model's vocabulary matches"):
        constraints(tokenizer_named("word_level")).make(OutputFormat(choices=("yes", "no")))


def test_the_error_without_llguidance_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert not structured.can_constrain()
    with pytest.raises(ConfigurationError, match=r"rapid-integrations\[structured\]"):
        constraints(tokenizer_named("chatml")).make(OutputFormat(regex="a"))


def test_a_model_without_end_of_sequence_token_is_an_error() -> None:
    makes = OutputConstraints(tokenizer_named("chatml"), frozenset(), 500)
    with pytest.raises(UnsupportedModelError, match="no end-of-sequence token"):
        makes.make(OutputFormat(regex="a"))


def test_every_end_of_sequence_token_ends_an_answer() -> None:
    tokenizer = tokenizer_named("chatml")
    ends = frozenset(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    constraint = OutputConstraints(tokenizer, ends, len(tokenizer)).make(OutputFormat(regex=""))
    assert frozenset(constraint.allowed([], 1)[0].nonzero()[:, 0].tolist()) == ends


def test_json_may_be_compact_or_indented_but_its_whitespace_is_limited() -> None:
    tokenizer = tokenizer_named("chatml")
    makes = constraints(tokenizer)
    indented = json.dumps({"name": "Ada", "age": 3, "kind": "red", "flags": [True]}, indent=2)
    compact = json.dumps(json.loads(indented), separators=(",", ":"))
    for text, is_valid in (
        (indented, True), (compact, True), (json.dumps(json.loads(indented)), True),
        (compact.replace(":", ":   "), False), (indented.replace("\n", "\n\n"), False),
        (compact.replace('"age":3', '"age":-3'), False),
    ):  # fmt: skip
        constraint, tokens = makes.make(OutputFormat(json_schema=SCHEMA)), list[int]()
        allowed = True
        for token in tokenizer.encode(text, add_special_tokens=False):
            allowed = allowed and bool(constraint.allowed(tokens, 1)[0, token])
            tokens.append(token)
            if not allowed:
                break
        assert (allowed and bool(constraint.allowed(tokens, 1)[0, tokenizer.eos_token_id])) is is_valid, text
