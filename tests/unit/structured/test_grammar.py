"""Constraints over real tokenizers allow only valid answers, and unsupported formats raise."""

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
# These vocabularies lack characters of the other formats.
SUPPORTED_FORMATS = {"word_level": (0, 5, 6, 7, 8), "demo": (0, 1, 2, 3, 5, 6, 7, 8, 10)}


def load_tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(str(TARGET_PATH)) if name == "demo" else tokenizer_named(name)


def constraints_for(tokenizer: Any) -> OutputConstraints:
    return OutputConstraints(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer) + PADDING)


def is_valid(text: str, options: dict[str, Any]) -> bool:
    if "regex" in options:
        return re.fullmatch(options["regex"], text) is not None
    if "choices" in options:
        return text in options["choices"]
    Answer.model_validate(json.loads(text))
    return True


@pytest.mark.parametrize("name", TOKENIZERS)
def test_random_answers_are_valid_and_drafts_do_not_change_the_mask(name: str) -> None:
    tokenizer = load_tokenizer(name)
    constraints = constraints_for(tokenizer)
    eos = tokenizer.eos_token_id
    for index in SUPPORTED_FORMATS.get(name, range(len(FORMATS))):
        options = FORMATS[index]
        complete = set()
        for seed in range(6):
            rng = random.Random(seed)
            constraint, tokens = constraints.make(OutputFormat(**options)), [0] * 0
            while len(tokens) < 100 and eos not in tokens:
                draft = list(tokens)
                for _ in range(rng.choice([0, 0, 1, 4])):
                    if eos not in draft:
                        draft.append(pick(constraint.allowed(draft, 1)[0], rng))
                rows = constraint.allowed(draft, len(draft) - len(tokens) + 1)
                assert rows.shape == (len(draft) - len(tokens) + 1, len(tokenizer) + PADDING)
                assert not rows[0, len(tokenizer) :].any()
                fresh = constraints.make(OutputFormat(**options)).allowed(tokens, 1)
                assert torch.equal(rows[:1], fresh)
                tokens.append(pick(rows[0], rng))
            if tokens[-1] == eos:
                assert constraint.allowed(tokens, 2)[1].all()
                assembler = TextAssembler(tokenizer)
                text = assembler.feed(tokens) + assembler.flush()
                assert is_valid(text, options), (options, text)
                complete.add(text)
        assert complete


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
    sizes = [row.nbytes for row in constraint._rows.values()]
    assert len(sizes) == len(tokens)
    assert max(sizes) <= vocab / 8 + 1


def test_forced_literals_have_the_tokens_of_the_tokenizer() -> None:
    tokenizer = tokenizer_named("chatml")
    constraint = constraints_for(tokenizer).make(OutputFormat(regex="the keeper counted (ships|captains)"))
    tokens: list[int] = []
    while (row := constraint.allowed(tokens, 1)[0]).sum() == 1:
        tokens.append(int(row.nonzero()))
    forced = tokenizer.decode(tokens)
    assert len(forced) > 10
    assert tokens == tokenizer.encode("the keeper counted ships", add_special_tokens=False)[: len(tokens)]


def test_a_dead_end_allows_no_token_and_does_not_affect_earlier_positions() -> None:
    tokenizer = load_tokenizer("demo")
    constraint = constraints_for(tokenizer).make(OutputFormat(regex="ab(é|c)?é"))
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
    ({"regex": r"[^\s\S]"}, "no text of this model's vocabulary fits"),
    ({"regex": r"a[^\s\S]"}, "no text of this model's vocabulary fits"),
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


@pytest.mark.parametrize(("options", "reason"), UNSUPPORTED)
def test_an_unsupported_format_raises_with_the_reason(options: dict[str, Any], reason: str) -> None:
    name = next(iter(options))
    with pytest.raises(ConfigurationError, match=rf"(?s)^{name} cannot be honoured: .*{reason}") as raised:
        constraints_for(tokenizer_named("chatml")).make(OutputFormat(**options))
    message = str(raised.value)
    assert f"give {name}=None and check the answer instead." in message
    assert len(message) < 600
    for grammar in ("start:", "%json", "no_forcing"):
        assert grammar not in message


def test_the_error_for_a_tool_schema_names_the_tool() -> None:
    options = OutputFormat(json_schema={"type": "array", "uniqueItems": True})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError) as raised:
        constraints_for(tokenizer_named("chatml")).make(options, tool="search")
    message = str(raised.value)
    assert message.startswith("the schema of the tool 'search', which must be called, cannot be honoured: ")
    assert '"uniqueItems"' in message
    assert "json_schema" not in message


@pytest.mark.parametrize("text", ["\x7f", "a\x7fb", "\x00", "\u2028", "😀"])
def test_a_choice_may_contain_any_character(text: str) -> None:
    tokenizer = tokenizer_named("chatml")
    constraint, tokens = constraints_for(tokenizer).make(OutputFormat(choices=["other", text])), list[int]()
    for token in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]:
        assert constraint.allowed(tokens, 1)[0, token]
        tokens.append(token)
    assert tokenizer.decode(tokens[:-1]) == text


def test_constraints_that_only_pydantic_checks_are_ignored() -> None:
    class Loose(BaseModel):
        tags: set[bool]
        data: bytes
        path: Path
        found: list[FilePath]

    tokenizer = tokenizer_named("chatml")
    constraint, tokens = constraints_for(tokenizer).make(OutputFormat(json_schema=Loose)), list[int]()  # type: ignore[arg-type]
    answer = json.dumps({"tags": [True, True], "data": "a b", "path": "/x", "found": [__file__]})
    for token in [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]:
        assert constraint.allowed(tokens, 1)[0, token], tokenizer.decode(tokens)
        tokens.append(token)
    assert Loose.model_validate_json(answer).tags == {True}


def test_choices_outside_the_vocabulary_raise() -> None:
    with pytest.raises(ConfigurationError, match="no text of this model's vocabulary fits"):
        constraints_for(tokenizer_named("word_level")).make(OutputFormat(choices=("yes", "no")))


def test_the_error_without_llguidance_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert not structured.can_constrain()
    with pytest.raises(ConfigurationError, match=r"rapid-integrations\[structured\]"):
        constraints_for(tokenizer_named("chatml")).make(OutputFormat(regex="a"))


def test_a_model_without_end_of_sequence_token_raises() -> None:
    constraints = OutputConstraints(tokenizer_named("chatml"), frozenset(), 500)
    with pytest.raises(UnsupportedModelError, match="no end-of-sequence token"):
        constraints.make(OutputFormat(regex="a"))


def test_every_end_of_sequence_token_is_allowed_at_the_end() -> None:
    tokenizer = tokenizer_named("chatml")
    ends = frozenset(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    constraint = OutputConstraints(tokenizer, ends, len(tokenizer)).make(OutputFormat(regex=""))
    assert frozenset(constraint.allowed([], 1)[0].nonzero()[:, 0].tolist()) == ends


def test_json_may_be_compact_or_indented_but_not_padded() -> None:
    tokenizer = tokenizer_named("chatml")
    constraints = constraints_for(tokenizer)
    indented = json.dumps({"name": "Ada", "age": 3, "kind": "red", "flags": [True]}, indent=2)
    compact = json.dumps(json.loads(indented), separators=(",", ":"))
    for text, fits in (
        (indented, True), (compact, True), (json.dumps(json.loads(indented)), True),
        (compact.replace(":", ":   "), False), (indented.replace("\n", "\n\n"), False),
        (compact.replace('"age":3', '"age":-3'), False),
    ):  # fmt: skip
        constraint, tokens = constraints.make(OutputFormat(json_schema=SCHEMA)), list[int]()
        allowed = True
        for token in tokenizer.encode(text, add_special_tokens=False):
            allowed = allowed and bool(constraint.allowed(tokens, 1)[0, token])
            tokens.append(token)
            if not allowed:
                break
        assert (allowed and bool(constraint.allowed(tokens, 1)[0, tokenizer.eos_token_id])) is fits, text
