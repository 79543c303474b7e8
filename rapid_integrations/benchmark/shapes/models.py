"""Models of a given shape with random weights that answer from a script.

A forward pass takes as long with random weights as with trained ones; only the acceptance of drafted tokens
depends on training. Both models therefore answer with scripted tokens, and the drafter departs from the
script with a given
probability: the acceptance is set, and everything that takes time is measured.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from rapid_integrations.engine.model.batch_entry import ReplayedPasses, Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.model_choice import loading_errors

# The range of a scripted token's probability in the logits. Drawing uses the exact probability.
_MIN_PROB, _MAX_PROB = 0.05, 1 - 1e-6


def _llama_3(*, rope_factor: float, **sizes: Any) -> LlamaConfig:
    """A configuration of the Llama 3 family."""
    return LlamaConfig(
        vocab_size=128_256,
        max_position_embeddings=131_072,
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500_000.0, "factor": rope_factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
        bos_token_id=128_000,
        eos_token_id=128_001,
        **sizes,
    )  # fmt: skip


SHAPES: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "llama-3.1-8b": lambda: _llama_3(
        rope_factor=8.0, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, head_dim=128
    ),
    "llama-3.2-1b": lambda: _llama_3(
        rope_factor=32.0,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        head_dim=64,
        tie_word_embeddings=True,
    ),
}
"""Configurations that can be used by name, without access to the hub."""


def load_shape(name: str) -> PreTrainedConfig:
    """A model's configuration.

    Args:
        name: A key of :data:`SHAPES`, a folder or a hub id.

    Raises:
        ConfigurationError: There is no configuration of this name.
    """
    if name in SHAPES:
        return SHAPES[name]()
    try:
        with loading_errors(name, None):
            config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{error} A shape is one of {', '.join(SHAPES)}, or a folder or hub id with a config.json."
        ) from error
    return config


def dummy_model(config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A causal language model of a shape, with random weights created on ``device``.

    Raises:
        ConfigurationError: The configuration is not that of a causal language model.
    """
    try:
        with device:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]  # untyped in transformers
    except ValueError as error:
        raise ConfigurationError(
            f"'{config.model_type}' is not a causal language model: choose another shape."
        ) from error
    model.eval()  # type: ignore[no-untyped-call]  # as above
    return model


@dataclass(slots=True)
class Script:
    """The scripted answer of a model.

    Attributes:
        tokens: The tokens of the answer, all different. They repeat from the start after the last one.
        prompt_tokens: The length of all prompts; the answer starts at this position.
        probability: The probability, in [0, 1], that a token follows the script. Each token is drawn
            independently.
        generator: The source of randomness.
    """

    tokens: Sequence[int]
    prompt_tokens: int
    probability: float = 1.0
    generator: random.Random = field(default_factory=lambda: random.Random(0))

    def choice(self, position: int) -> int:
        """Draw the token at a position, counted from the start of the prompt."""
        index = (position - self.prompt_tokens) % len(self.tokens)
        if self.probability < 1 and self.generator.random() >= self.probability:
            # All tokens of the script differ, so the next one is wrong here.
            index = (index + 1) % len(self.tokens)
        return self.tokens[index]


class ScriptedModel(CausalModel):
    """A model that computes complete forward passes, and then replaces their logits by those of its script.

    Two scripted models may share the same weights.

    Args:
        model: A loaded model.
        name: Its name in messages and stats.
        kv_dtype: As in :class:`CausalModel`.

    Attributes:
        script: The scripted answer; ``None`` keeps the model's own logits.
    """

    def __init__(self, model: PreTrainedModel, *, name: str, kv_dtype: str | None = None) -> None:
        self.script: Script | None = None
        super().__init__(model, name=name, kv_dtype=kv_dtype)

    @torch.inference_mode()
    def forward(self, steps: Sequence[Step], replayed: ReplayedPasses | None = None) -> Tensor:
        """As :meth:`CausalModel.forward`, with logits that give the scripted token its probability."""
        logits = super().forward(steps, replayed)
        if self.script is None:
            return logits
        tokens = [
            self.script.choice(position)
            for step in steps
            # Logits at position i predict the token at i + 1, and the cache ends after the last position
            # read.
            for position in range(step.cache.length - step.num_logits + 1, step.cache.length + 1)
        ]
        probability = min(max(self.script.probability, _MIN_PROB), _MAX_PROB)
        # All other logits are 0, so the softmax gives the scripted token this probability.
        logit = math.log((logits.shape[-1] - 1) * probability / (1 - probability))
        columns = torch.tensor(tokens, dtype=torch.long, device=logits.device)[:, None]
        return logits.zero_().scatter_(1, columns, logit)


def random_script(vocab_size: int, num_tokens: int, seed: int) -> list[int]:
    """Up to ``num_tokens`` different tokens of the upper half of the vocabulary, which prompts lack."""
    tokens = range(vocab_size // 2, vocab_size)
    return random.Random(f"script/{seed}").sample(tokens, min(num_tokens, len(tokens)))


def random_prompt(vocab_size: int, num_tokens: int, seed: str) -> list[int]:
    """Random tokens from the lower half of the vocabulary."""
    generator = random.Random(f"prompt/{seed}")
    return [generator.randrange(vocab_size // 2) for _ in range(num_tokens)]
