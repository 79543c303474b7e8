"""Small randomly initialised models of real architectures, and a driver for the engine."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.requests import Failed, Finished, NewTokens, Request
from rapid_integrations.engine.stats import RapidStats

VOCAB = 256
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Wide weights make the distributions peaked and the answers not repetitive.
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 24}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"head_dim": 16, "sliding_window": 24, "num_hidden_layers": 6},
    ),
}


def tiny_model(architecture: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model with random weights."""
    model_class, config_class, extra = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    return model_class(config_class(**{**_SHAPE, **extra, **overrides})).eval()


def reference_generate(model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """The answer of transformers' greedy ``generate()``, without its end-of-sequence token."""
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return output[: output.index(2)] if 2 in output else output


def run_all(engine: Engine, requests: Sequence[Request]) -> list[tuple[list[int], Finished]]:
    """Submit requests together and collect every answer."""
    queues: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in requests]
    for request, events in zip(requests, queues, strict=True):
        engine.submit(request, events.put)
    return [collect(events) for events in queues]


def collect(events: queue.SimpleQueue[Any], timeout_s: float = 120) -> tuple[list[int], Finished]:
    """Read one request's events to the end; raises its error if it failed."""
    tokens: list[int] = []
    while True:
        match events.get(timeout=timeout_s):
            case NewTokens(token_ids):
                tokens.extend(token_ids)
            case Finished() as finished:
                return tokens, finished
            case Failed(error):
                raise error


def run(engine: Engine, request: Request) -> tuple[list[int], RapidStats]:
    """Submit one request and wait for it."""
    ((tokens, finished),) = run_all(engine, [request])
    return tokens, finished.stats
