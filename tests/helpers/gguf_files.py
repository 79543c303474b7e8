"""GGUF files of tiny random Llama models with a byte-level tokenizer, in llama.cpp's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.constants import MODEL_ARCH
from gguf.quants import quantize
from helpers.small_tokenizers import tokenizer_named
from helpers.tiny_models import tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def gguf_model(seed: int = 0) -> PreTrainedModel:
    """The tiny Llama whose weights the files hold."""
    return tiny_model("llama", seed, vocab_size=len(tokenizer_named("chatml")), tie_word_embeddings=True)


def write_gguf(
    path: Path,
    model: PreTrainedModel | None = None,
    *,
    architecture: str = "llama",
    tokenizer: bool = True,
    quantization: GGMLQuantizationType = GGMLQuantizationType.F32,
    without: str = "",
    extra: Callable[[GGUFWriter], None] | None = None,
) -> Path:
    """Write a model of :func:`gguf_model` and the tokenizer ``chatml``.

    Args:
        path: The file.
        model: The model; ``None`` is the one with seed 0.
        architecture: The architecture that the file claims.
        tokenizer: Whether the tokenizer is in the file.
        quantization: The format of the matrices.
        without: The name of a tensor to leave out.
        extra: Adds more to the file.
    """
    model = model or gguf_model()
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        _add_tokenizer(writer, tokenizer_named("chatml"))
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for parameter, weight in model.named_parameters():
        name = f"{names.get_name(parameter.removesuffix('.weight'))}.weight"
        values = weight.detach().numpy()
        for projection, count in heads.items():
            if projection in parameter:
                # llama.cpp rotates neighbouring dimensions, transformers the two halves of a head.
                halves = values.reshape(count, 2, -1, values.shape[-1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        if name != without:
            kind = quantization if values.ndim == 2 else GGMLQuantizationType.F32
            writer.add_tensor(name, quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"]: token["special"] for token in backend["added_tokens"]}
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    kinds = {True: TokenType.CONTROL, False: TokenType.USER_DEFINED, None: TokenType.NORMAL}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[added.get(token)] for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
