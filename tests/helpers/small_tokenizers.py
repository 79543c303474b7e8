"""Small tokenizers with the control tokens and chat templates of well-known model families."""

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

# The chat templates of three families for conversations with tools, shortened.
HERMES_TOOLS = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}Be helpful.{% endif %}"
    "\n\n# Tools\n\nYou may call one or more functions.\n\n<tools>"
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>\n\n"
    "For each call, return a json object within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    "{% elif messages[0]['role'] == 'system' %}"
    "<|im_start|>system\n{{ messages[0]['content'] }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' or (message.role == 'system' and not loop.first) "
    "or (message.role == 'assistant' and not message.tool_calls) %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% elif message.role == 'assistant' %}<|im_start|>assistant"
    "{% if message.content %}\n{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls %}"
    "{% if call.function is defined %}{% set call = call.function %}{% endif %}"
    '\n<tool_call>\n{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n"
    "{% elif message.role == 'tool' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ message.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_TOOLS = (
    "{{ bos_token }}{% set offset = 1 if messages[0]['role'] == 'system' else 0 %}"
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "{% if tools is not none %}Environment: ipython\n{% endif %}"
    "{% if offset %}{{ messages[0]['content'] | trim }}{% endif %}<|eot_id|>"
    "{% for message in messages[offset:] %}"
    "{% if loop.first and tools is not none %}<|start_header_id|>user<|end_header_id|>\n\n"
    "Given the following functions, please respond with a JSON for a function call.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of arguments and values}.'
    "\n\n{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}"
    "{{ message['content'] | trim }}<|eot_id|>"
    "{% elif not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% elif 'tool_calls' in message %}"
    "{% if message.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>'
    "{% else %}<|start_header_id|>ipython<|end_header_id|>\n\n"
    "{% if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}"
    "{% else %}{{ message.content }}{% endif %}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL_TOOLS = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% set users = rest | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}"
    "{% for message in rest %}{% if message.role == 'user' %}"
    "{% if tools is not none and message == users[-1] %}"
    "[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}[INST] {% if loop.last and system is defined %}{{ system }}\n\n{% endif %}"
    "{{ message.content }}[/INST]"
    "{% elif message.tool_calls is defined and message.tool_calls is not none %}[TOOL_CALLS] ["
    "{% for call in message.tool_calls %}{% set out = call.function | tojson %}{{ out[:-1] }}"
    "{% if call.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    ', "id": "{{ call.id }}"}{% if not loop.last %}, {% else %}]{{ eos_token }}{% endif %}{% endfor %}'
    "{% elif message.role == 'assistant' %} {{ message.content | trim }}{{ eos_token }}"
    "{% elif message.role == 'tool' %}[TOOL_RESULTS] {\"content\": {{ message.content | tojson }}, "
    '"call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]{% endif %}{% endfor %}'
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
    """Make a tokenizer like Qwen's: byte-level BPE, no begin-of-sequence token, tool markup not special."""
    tokenizer = _wrap(
        _byte_level_backend(), CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    added = ("<tool_call>", "</tool_call>", "<h1>", "<|fim_prefix|>")
    tokenizer.add_tokens([AddedToken(text, special=False) for text in added])
    return tokenizer


def llama3() -> PreTrainedTokenizerFast:
    """Make a tokenizer like Llama 3's: byte-level BPE, a begin-of-text token, a template that trims texts."""
    tokenizer = _wrap(
        _byte_level_backend(), LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
        additional_special_tokens=["<|start_header_id|>", "<|end_header_id|>"],
    )  # fmt: skip
    bos = ("<|begin_of_text|>", tokenizer.convert_tokens_to_ids("<|begin_of_text|>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[bos]
    )
    return tokenizer


def hermes_tools() -> PreTrainedTokenizerFast:
    """Make a tokenizer like Qwen's with tools: the tags of a call are not special, so decoding keeps them."""
    tokenizer = chatml()
    tokenizer.chat_template = HERMES_TOOLS
    return tokenizer


def llama3_tools() -> PreTrainedTokenizerFast:
    """Make a tokenizer like Llama 3.1's with tools: the tag of a call is a special token."""
    tokenizer = llama3()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|python_tag|>", "<|eom_id|>"]})
    tokenizer.chat_template = LLAMA3_TOOLS
    return tokenizer


def mistral_tools() -> PreTrainedTokenizerFast:
    """Make a tokenizer like Mistral's v3 with tools: all markup is special, tool results are JSON strings."""
    markup = (
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
    )
    return _wrap(
        _byte_level_backend(), MISTRAL_TOOLS, bos_token="<s>", eos_token="</s>",
        additional_special_tokens=[*markup, "[/TOOL_RESULTS]"],
    )  # fmt: skip


def gemma() -> PreTrainedTokenizerFast:
    """Make a tokenizer like Gemma's: BPE with byte fallback, a template that refuses system messages."""
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
    """Make a tokenizer like Llama 2's: a space before every text, no template."""
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
    """Make a word-level tokenizer, in which control strings are ordinary words."""
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
TOOL_FAMILIES = {"hermes": hermes_tools, "llama3": llama3_tools, "mistral": mistral_tools}


@functools.cache
def tokenizer_named(family: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family, made once. Tests that change it must copy it."""
    return _MAKERS[family]()


@functools.cache
def tool_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family whose chat template supports tools. Changes need a copy."""
    return TOOL_FAMILIES[family]()
