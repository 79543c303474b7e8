"""Models of a given shape with random weights: what a machine makes of a model that has not been downloaded.

A pass takes as long with random weights as with trained ones; what depends on training is how many drafted
tokens stand. So these models answer by a script, and the drafter departs from it as often as it is told to:
acceptance is set, all else is measured.
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

# A chance beyond these is drawn all the same, but shows in no distribution.
_LEAST_SHOWN, _MOST_SHOWN = 0.05, 1 - 1e-6


def _llama_3(*, rope_factor: float, **sizes: Any) -> LlamaConfig:
    """What the models of the Llama 3 family have in common."""
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
"""Configurations by name: so that these shapes can be measured where no hub is reached."""


def load_shape(name: str) -> PreTrainedConfig:
    """A model's configuration: of :data:`SHAPES`, else from a folder or the hub.

    Raises:
        ConfigurationError: There is none.
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
    """A causal model of a shape, its random weights made where they are needed.

    Raises:
        ConfigurationError: It is no causal model.
    """
    try:
        with device:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]  # untyped in transformers
    except ValueError as error:
        raise ConfigurationError(
            f"'{config.model_type}' is no causal language model: give another shape."
        ) from error
    model.eval()  # type: ignore[no-untyped-call]  # as above
    return model


@dataclass(slots=True)
class Script:
    """What scripted models say, and how often.

    Attributes:
        tokens: The answer, which begins anew when it is over.
        prompt_tokens: The length of every prompt: the answer begins behind it.
        chance: That a token is the script's, in [0, 1]; each one is drawn on its own.
        generator: Draws them.
    """

    tokens: Sequence[int]
    prompt_tokens: int
    chance: float = 1.0
    generator: random.Random = field(default_factory=lambda: random.Random(0))

    def choice(self, position: int) -> int:
        """The token at a position of prompt and answer."""
        index = (position - self.prompt_tokens) % len(self.tokens)
        if self.chance < 1 and self.generator.random() >= self.chance:
            # The script's own tokens all differ, so that this one is wrong.
            index = (index + 1) % len(self.tokens)
        return self.tokens[index]


class ScriptedModel(CausalModel):
    """A model that does all of a pass's work, and then answers what its script says.

    Two of them may hold the same model, each with a script of its own.

    Args:
        model: A loaded model.
        name: How messages and stats call it.
        kv_dtype: As in :class:`CausalModel`.

    Attributes:
        script: What it says; ``None`` leaves the model's logits as they are.
    """

    def __init__(self, model: PreTrainedModel, *, name: str, kv_dtype: str | None = None) -> None:
        self.script: Script | None = None
        super().__init__(model, name=name, kv_dtype=kv_dtype)

    @torch.inference_mode()
    def forward(self, steps: Sequence[Step], replayed: ReplayedPasses | None = None) -> Tensor:
        """As :meth:`CausalModel.forward`; a token of the script is as likely as it is right."""
        logits = super().forward(steps, replayed)
        if self.script is None:
            return logits
        chosen = [
            self.script.choice(position)
            for step in steps
            # Behind the last token that was read stands the one at the position of the cache's length.
            for position in range(step.cache.length - step.num_logits + 1, step.cache.length + 1)
        ]
        shown = min(max(self.script.chance, _LEAST_SHOWN), _MOST_SHOWN)
        likeliest = math.log((logits.shape[-1] - 1) * shown / (1 - shown))
        places = torch.tensor(chosen, dtype=torch.long, device=logits.device)[:, None]
        return logits.zero_().scatter_(1, places, likeliest)


def random_script(vocab_size: int, num_tokens: int, seed: int) -> list[int]:
    """At most so many tokens, all different, none of which a prompt of :func:`random_prompt` contains."""
    tokens = range(vocab_size // 2, vocab_size)
    return random.Random(f"script/{seed}").sample(tokens, min(num_tokens, len(tokens)))


def random_prompt(vocab_size: int, num_tokens: int, seed: str) -> list[int]:
    """Tokens of the lower half of the vocabulary."""
    generator = random.Random(f"prompt/{seed}")
    return [generator.randrange(vocab_size // 2) for _ in range(num_tokens)]
