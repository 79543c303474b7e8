"""The stages in which the demo models are trained.

The drafter learns repetition of random segments, then questions about short documents, then a mix of lengths
with a decaying learning rate, and finally tool dialogues and documents of all domains. The target starts from
the widened drafter and learns to read longer documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rapid_integrations.demo.domains import DOMAINS, HANDBOOK
from rapid_integrations.demo.tokenizer import MAX_LENGTH

_ALL_DOMAINS = {name: 0.34 if name == HANDBOOK.name else 0.22 for name in DOMAINS}


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: Its name in the log and of its result file.
        lengths: Choices of example length in tokens, questions per example, and weight. Each step draws one.
        minutes: The time limit of the stage.
        lr: The learning rate of the matrices; that of the embeddings is proportional to it.
        max_steps: The maximum number of steps.
        stop_accuracy: The accuracy over 20 steps (of answers, or of tokens in repetition) at which the stage
            ends.
        max_position: The maximum position that skipped positions may reach.
        near_duplicates: The share of documents with similar names.
        repetition: Whether all examples are repetition.
        decay: Whether the learning rate decays to zero.
        tokens_per_step: The number of tokens per step; a longer example is a step of its own.
        tools: The share of tool dialogues among the examples of 1024 and 2048 tokens.
        domains: The weights of the documents' domains.
    """

    name: str
    lengths: tuple[tuple[int, int, float], ...]
    minutes: float
    lr: float
    max_steps: int = 100_000
    stop_accuracy: float = 2.0
    max_position: int = MAX_LENGTH
    near_duplicates: float = 0.7
    repetition: bool = False
    decay: bool = False
    tokens_per_step: int = 8192
    tools: float = 0.0
    domains: Mapping[str, float] = field(default_factory=lambda: {HANDBOOK.name: 1.0})


@dataclass(frozen=True)
class Plan:
    """The training of one model.

    Attributes:
        stages: The stages in order.
        embedding_lr: The learning rate of the embeddings, relative to that of the matrices.
        start: The stage of the drafter's training whose result is widened to initialise the model; ``None``
            uses the structured initialisation.
    """

    stages: tuple[Stage, ...]
    embedding_lr: float = 0.8
    start: str | None = None


PLANS = {
    "drafter": Plan(
        stages=(
            Stage(
                "repeat", ((128, 0, 1.0),), 3.6, 0.01, stop_accuracy=0.985, max_position=0, repetition=True
            ),
            Stage("short", ((256, 4, 1.0),), 12.8, 0.01, stop_accuracy=0.94, near_duplicates=0.4),
            Stage("medium", ((512, 7, 1.0),), 17.6, 0.01, stop_accuracy=0.96),
            Stage(
                "long",
                ((256, 4, 0.2), (512, 7, 0.35), (1024, 14, 0.3), (1536, 20, 0.15)),
                46,
                0.008,
                decay=True,
            ),
            Stage(
                "polish",
                ((512, 7, 0.3), (1024, 14, 0.45), (1536, 20, 0.25)),
                25,
                0.006,
                decay=True,
                tokens_per_step=4096,
            ),
            Stage(
                "refine",
                ((256, 4, 0.1), (512, 7, 0.3), (1024, 14, 0.35), (1536, 20, 0.15), (2048, 26, 0.1)),
                45,
                0.005,
                decay=True,
                tokens_per_step=4096,
            ),
            Stage(
                "tools",
                ((256, 4, 0.05), (512, 7, 0.25), (1024, 14, 0.55), (2048, 26, 0.15)),
                60,
                0.004,
                decay=True,
                tokens_per_step=4096,
                tools=0.5,
            ),
            Stage(
                "specialise",
                ((256, 4, 0.1), (512, 7, 0.3), (1024, 14, 0.4), (2048, 26, 0.2)),
                50,
                0.004,
                decay=True,
                tokens_per_step=4096,
                tools=0.3,
                domains=_ALL_DOMAINS,
            ),
        ),
    ),
    "target": Plan(
        stages=(
            Stage(
                "grow",
                ((512, 7, 0.12), (1024, 14, 0.3), (2048, 26, 0.28), (4096, 48, 0.18), (8192, 90, 0.12)),
                80,
                0.002,
                decay=True,
                tokens_per_step=4096,
                tools=0.5,
                domains=_ALL_DOMAINS,
            ),
        ),
        start="specialise",
    ),
}
