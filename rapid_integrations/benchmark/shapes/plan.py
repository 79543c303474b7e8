"""The plan of ``rapid bench-shape``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rapid_integrations.errors import ConfigurationError

SELF = "self"
"""The drafter that uses the target's weights."""

DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes of the weights by name."""

QUESTION_TOKENS = 16
"""The number of tokens at the end of each prompt that differ between prompts; those before are shared."""


@dataclass(frozen=True, slots=True)
class ShapePlan:
    """The work that ``rapid bench-shape`` measures.

    Attributes:
        target: A shape's name, a folder or a hub id.
        drafter: The same, or ``"self"`` for the target's own weights with the drafter's shorter prompt.
        context: The length of the target's prompts in tokens.
        drafter_context: The length of the drafter's prompts in tokens.
        batches: Numbers of concurrent requests.
        acceptances: Probabilities that a drafted token is accepted if those before it were.
        num_new_tokens: The length of each answer in tokens.
        num_draft_tokens: The draft length gamma; ``None`` lets the engine choose it in each round.
        repeats: The number of repetitions of each measurement.
        dtype: The dtype of the weights; ``None`` selects bfloat16 on an accelerator and float32 on a CPU.
        kv_dtype: The dtype of the engine's keys and values; ``None`` selects the models' compute dtype.
        cuda_graph_tokens: As in :class:`~rapid_integrations.config.EngineLimits`.
        seed: The seed of weights, prompts and answers.

    Raises:
        ConfigurationError: A value is not allowed.
    """

    target: str
    drafter: str
    context: int
    drafter_context: int
    batches: tuple[int, ...]
    acceptances: tuple[float, ...]
    num_new_tokens: int = 128
    num_draft_tokens: int | None = None
    repeats: int = 3
    dtype: str | None = None
    kv_dtype: str | None = None
    cuda_graph_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if invalid := [acceptance for acceptance in self.acceptances if not 0 <= acceptance <= 1]:
            raise ConfigurationError(
                f"the acceptance {invalid[0]} is not allowed: it is a probability, from 0 to 1."
            )
        if self.num_draft_tokens == 0:
            raise ConfigurationError("num_draft_tokens=0 is plain decoding, which is measured anyway.")
        for name in ("context", "drafter_context"):
            if getattr(self, name) <= QUESTION_TOKENS:
                raise ConfigurationError(
                    f"{name}={getattr(self, name)} is too short: the question alone has {QUESTION_TOKENS} "
                    "tokens."
                )
        if self.num_new_tokens < 2 or self.repeats < 1 or min(self.batches, default=0) < 1:
            raise ConfigurationError(
                f"num_new_tokens={self.num_new_tokens} must be at least 2, repeats={self.repeats} and each "
                f"of batches={list(self.batches)} at least 1."
            )
        if self.dtype not in DTYPES:
            raise ConfigurationError(
                f"dtype={self.dtype!r} is not allowed: it must be one of "
                f"{', '.join(name for name in DTYPES if name)}, or None."
            )
