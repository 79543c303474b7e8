"""Small real tokenizers with the control tokens and chat templates of well-known model families."""

from __future__ import annotations

import functools

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if tools %}<tool_call></tool_call>{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

_CORPUS = [
    "The archive of the harbour town was written by the keeper, who counted the ships and their captains.",
    "Question: what is the answer? Context: the document says so. You are a helpful assistant.",
    "user\nassistant\nsystem\n  spaces   and\ttabs, numbers 0 1 2 3 4 5 6 7 8 9, brackets <|[]|>, 你好 naïve",
] * 4


def _wrap(backend: Tokenizer, template: str | None, **special: object) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


def _byte_level_backend() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    return backend


def chatml() -> PreTrainedTokenizerFast:
    """Byte-level BPE as Qwen's: no begin-of-sequence token, tool markup that is added but not special."""
    tokenizer = _wrap(
        _byte_level_backend(), CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    added = ("<tool_call>", "</tool_call>", "<h1>", "<|fim_prefix|>")
    tokenizer.add_tokens([AddedToken(text, special=False) for text in added])
    return tokenizer


def llama3() -> PreTrainedTokenizerFast:
    """Byte-level BPE as Llama 3's: a begin-of-text token of its own, a trimming template."""
    tokenizer = _wrap(
        _byte_level_backend(), LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
        additional_special_tokens=["<|start_header_id|>", "<|end_header_id|>"],
    )  # fmt: skip
    bos = ("<|begin_of_text|>", tokenizer.convert_tokens_to_ids("<|begin_of_text|>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[bos]
    )
    return tokenizer


def gemma() -> PreTrainedTokenizerFast:
    """SentencePiece-like with byte fallback as Gemma's: a template that refuses system messages."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    pieces += sorted({c for text in _CORPUS for c in text if c.isascii()} - set(" \n\t"))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("a", "n"), ("▁", "an"), ("▁an", "d"), ("i", "s")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _wrap(
        backend, GEMMA, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )  # fmt: skip


def llama2() -> PreTrainedTokenizerFast:
    """SentencePiece-like as Llama 2's: a space before every text; no template."""
    tokenizer = gemma()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = None
    return tokenizer


def word_level() -> PreTrainedTokenizerFast:
    """Words split at spaces, control strings are words of the vocabulary."""
    words = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "the", "answer", "is", "what", "document"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}<|user|> {{ m['content'] }} </s>{% endfor %}<|assistant|>"
    return _wrap(
        backend, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )  # fmt: skip


_MAKERS = {"chatml": chatml, "llama3": llama3, "gemma": gemma, "llama2": llama2, "word_level": word_level}
FAMILIES = tuple(_MAKERS)


@functools.cache
def tokenizer_named(family: str) -> PreTrainedTokenizerFast:
    """Make a family's tokenizer, once a process. Tests that change it work on a copy."""
    return _MAKERS[family]()
