import itertools
import random
import string
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rapid_integrations.demo import language
from rapid_integrations.demo.documents import generate_documents, sample_documents
from rapid_integrations.demo.domains import DOMAINS
from rapid_integrations.demo.tokenizer import (
    SPECIAL_TOKENS,
    UNK,
    build_tokenizer,
    save_tokenizer,
    sentence_encoder,
)

UNK_ID = SPECIAL_TOKENS.index(UNK)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    built = build_tokenizer()
    built.encode_special_tokens = True
    return built


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def random_text(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return "".join(rng.choices(string.printable, k=rng.randint(0, 40)))
    words = [
        "##",
        "<eos>",
        "The",
        "Trottivik",
        "Trottivikan",
        "12345",
        "a.b",
        "(x)",
        "#",
        "z" * 150,
        "9" * 90,
        "\n\n",
    ]
    return rng.choice(("", " ")).join(rng.choices(words, k=rng.randint(1, 7)))


def test_ascii_text_comes_back_without_unknown_tokens(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(5000):
        text = random_text(rng)
        ids = tokenizer.encode(text).ids
        assert UNK_ID not in ids
        assert tokenizer.decode(ids) == " ".join(text.split())


def test_decoding_never_revises_a_prefix(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(2000):
        # Any sequence of tokens, as a model may sample it, besides sequences a text encodes to.
        ids = tokenizer.encode(random_text(rng)).ids[:40]
        if rng.random() < 0.5:
            ids = [rng.randrange(len(SPECIAL_TOKENS), tokenizer.get_vocab_size()) for _ in range(20)]
        decoded = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
        assert all(after.startswith(before) for before, after in itertools.pairwise(decoded))


def test_every_name_is_two_pieces_and_its_adjective_three(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    given = tuple(language.FIRST_NAMES)
    for _ in range(5000):
        first, second = rng.choice(language.FIRST_SYLLABLES), rng.choice(language.SECOND_SYLLABLES)
        name = first + second
        if name.startswith(given):
            continue
        assert tokenizer.encode(name).tokens == ["▁" + first, "##" + second]
        adjective = language.adjective(name)
        if adjective:
            assert tokenizer.encode(adjective).tokens == ["▁" + first, "##" + second, "##an"]


def test_the_fast_encoder_agrees_with_the_tokenizer() -> None:
    encode, tokenizer = sentence_encoder(), build_tokenizer()
    for document in generate_documents(num_tokens=2000, num_documents=3, questions_per_document=5, seed=0):
        for text in (document.text, *(q.question for q in document.questions)):
            assert encode(text) == tokenizer.encode(text).ids


def test_the_language_needs_no_letters(tokenizer: Tokenizer) -> None:
    """Every word of documents and their questions is a piece of its own or made of syllables or digits."""
    letters = {prefix + c for c in string.ascii_letters for prefix in ("", "##", "▁")} - {"▁a", "▁A"}
    generated = [
        document
        for domain in DOMAINS
        for document in generate_documents(
            num_tokens=4096, num_documents=2, questions_per_document=20, seed=1, domain=domain
        )
    ]
    for document in (*sample_documents(), *generated):
        for text in (document.text, *(q.question + " " + q.answer for q in document.questions)):
            assert not letters & set(tokenizer.encode(text).tokens)


def test_chat_template(loaded: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "You answer questions about the document."},
        {"role": "user", "content": "Where is it?"},
    ]
    text = loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<bos><|system|>You answer questions about the document.<eos><|user|>Where is it?<eos><|assistant|>"
    )
    done = loaded.apply_chat_template([*messages, {"role": "assistant", "content": "There."}], tokenize=False)
    assert done == text + "There.<eos>"
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert [ids[0], ids[1], ids[-1]] == [
        loaded.bos_token_id,
        *loaded.convert_tokens_to_ids(["<|system|>", "<|assistant|>"]),
    ]
    assert ids.count(loaded.eos_token_id) == 2


def test_special_tokens_in_a_text_can_be_spelled(loaded: PreTrainedTokenizerBase) -> None:
    text = "Say <eos> and <|user|> twice."
    assert loaded.eos_token_id in loaded(text)["input_ids"]
    spelled = loaded(text, split_special_tokens=True)["input_ids"]
    assert min(spelled) >= len(SPECIAL_TOKENS)
    assert loaded.decode(spelled, skip_special_tokens=True) == text


def test_offsets_point_into_the_text(loaded: PreTrainedTokenizerBase) -> None:
    text = "# The old mill\n\nThe Trottivik depot  passcode is 123456."
    encoded = loaded(text, return_offsets_mapping=True, add_special_tokens=False)
    pieces = [text[a:b].strip() for a, b in encoded["offset_mapping"]]
    expected = [
        t.removeprefix("▁").removeprefix("##") for t in loaded.convert_ids_to_tokens(encoded["input_ids"])
    ]
    assert pieces == expected
