"""The demo pair's tokenizer: a closed vocabulary of whole words, name syllables and two-digit pieces.

``▁`` marks a piece after a space and ``##`` a piece that continues a word. Other pieces, such as punctuation,
follow the previous piece without a space. Decoding concatenates the pieces, replaces ``▁`` by a space, and
removes ``##`` and the first space. The text of ``tokens[:n]`` is therefore always a prefix of the text of
``tokens[:n + 1]``, and streamed text is never revised. Letters, digits and punctuation are pieces, so
printable ASCII text never becomes ``<unk>``. It is restored exactly, except that each run of whitespace
becomes one space.

* A literal ``##`` in a text becomes two ``#`` pieces, never a continuation piece.
* ``<eos>`` and the other special tokens in a text are encoded as such unless ``split_special_tokens=True``.
  Use that option for all text from users.

The tokenizer adds no ``<bos>``; the chat template writes it.
"""

from __future__ import annotations

import json
import re
import string
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from rapid_integrations.demo import domains, language, prompts

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<bos>", "<eos>"
SYSTEM, USER, ASSISTANT, TOOL = "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"
SPECIAL_TOKENS = (
    PAD, UNK, BOS, EOS, SYSTEM, USER, ASSISTANT, TOOL,
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    *(f"<|reserved_{i}|>" for i in range(8)),
)  # fmt: skip
"""The special tokens in the order of their ids. The reserved ones do not occur in training."""
SPACE = "▁"
MAX_LENGTH = 40960
_RULE = "-" * 21  # the separator in LlamaIndex's default prompt
# Longer words are split, because WordPiece would turn them into <unk>.
_MAX_WORD_CHARS = 64


def build_vocabulary() -> dict[str, int]:
    """The pieces and their ids: special tokens, words, syllables, digits, letters and punctuation."""
    letters = string.ascii_uppercase + string.ascii_lowercase
    pairs = [f"{i:02d}" for i in range(100)]
    words = language.vocabulary() | domains.HANDBOOK.words()
    for template in prompts.all_templates():
        words |= set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", template)))
    pieces = [*SPECIAL_TOKENS]
    pieces += [SPACE + word for word in sorted(words)]
    pieces += [SPACE + s for s in language.FIRST_SYLLABLES] + ["##" + s for s in language.SECOND_SYLLABLES]
    pieces += ["##" + language.ADJECTIVE_ENDING, *(SPACE + p for p in pairs), *("##" + p for p in pairs)]
    for character in letters + string.digits:
        pieces += [SPACE + character, character, "##" + character]
    for character in string.punctuation:
        pieces += [SPACE + character, character]
    pieces += [SPACE + _RULE, *language.UNSPACED_WORDS]
    # The words of later domains come last, so that the ids of earlier weights stay valid.
    pieces += [SPACE + word for domain in domains.DOMAINS.values() for word in sorted(domain.words())]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer from the language's word lists."""
    tokenizer = Tokenizer(
        models.WordPiece(build_vocabulary(), unk_token=UNK, max_input_chars_per_word=2 * _MAX_WORD_CHARS)
    )
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFKD(),
        normalizers.StripAccents(),
        normalizers.Replace(Regex(r"[\s\x00-\x1f\x7f▁]+"), " "),
        normalizers.Strip(),
        normalizers.Prepend(SPACE),
        normalizers.Replace(" ", SPACE),
    ])  # fmt: skip
    word = rf"▁{_RULE}|▁?[A-Za-z]{{1,{_MAX_WORD_CHARS}}}|▁?[0-9]{{1,{_MAX_WORD_CHARS}}}|▁?[^A-Za-z0-9▁]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(word), "isolated")
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace(Regex("^##"), ""),
        decoders.Replace(SPACE, " "),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


class SentenceEncoder:
    """Encodes sentences of the language word by word, with the tokenizer's result and many times faster."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""
        ids: list[int] = []
        for word in text.split():
            word_ids = self._ids.get(word)
            if word_ids is None:
                word_ids = self._tokenizer.encode(word, add_special_tokens=False).ids
                if len(self._ids) < 400_000:
                    self._ids[word] = word_ids
            ids += word_ids
        return ids

    def count(self, text: str) -> int:
        """The length of a text in tokens."""
        return len(self(text))


@cache
def sentence_encoder() -> SentenceEncoder:
    """The encoder that this process shares."""
    return SentenceEncoder(build_tokenizer())


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files into ``folder``, for ``AutoTokenizer``."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(prompts.CHAT_TEMPLATE, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
