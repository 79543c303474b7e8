"""The events that the pipeline yields while it answers; both frameworks' streams are made of them.

They come in this order: one ``RetrievedContext`` (if there is a drafter's context), several
:class:`PrefillProgress`, several :class:`TextDelta`, one :class:`Completion`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rapid_integrations.engine.requests import FinishReason
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.retrieval import RetrievedContext


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """``done_tokens`` of ``total_tokens`` prompt tokens are processed, target and drafter together."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of the answer, and the number of tokens that it arrived with."""

    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer; always the last event.

    Attributes:
        text: The answer; equal to the joined texts of all :class:`TextDelta` events.
        finish_reason: ``"stop"`` at an end-of-sequence token or a stop string, ``"length"`` at the limit.
        stats: Token counts, times and retrieved chunks of this answer.
        token_ids: The answer's tokens, without the end-of-sequence token.
    """

    text: str
    finish_reason: FinishReason
    stats: RapidStats
    token_ids: tuple[int, ...]


TextEvent = RetrievedContext | PrefillProgress | TextDelta | Completion
