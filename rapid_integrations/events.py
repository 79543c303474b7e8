"""."""

from __future__ import annotations

from dataclasses import dataclass

from rapid_integrations.engine.requests import (
    FinishReason,
)
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.retrieval import RetrievedContext


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """The models have read ``done_tokens`` of ``total_tokens`` prompt tokens, target and drafter together."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of the answer, and how many tokens arrived with it."""

    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer; always the last event.

    Attributes:
        text: The answer; the deltas' texts joined.
        finish_reason: ``"stop"`` at an end-of-sequence token or a stop string, ``"length"`` at the limit.
        stats: What it cost.
        token_ids: The answer's tokens, without the end-of-sequence token.
    """

    text: str
    finish_reason: FinishReason
    stats: RapidStats
    token_ids: tuple[int, ...]


TextEvent = RetrievedContext | PrefillProgress | TextDelta | Completion
