"""Statistics of a request: measured counts and times, and rates derived from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_FORMER_NAMES = {"grounding": "question_agreement"}


@dataclass(frozen=True, slots=True)
class RetrievedChunk:
    """A retrieved chunk that the drafter read.

    Attributes:
        text: The chunk's text.
        position: Its index among the document's chunks, or its character offset in the context where the
            retriever returns only the text; ``None`` if the context does not contain it.
        score: The retriever's score; ``None`` if it gave none.
    """

    text: str
    position: int | None = None
    score: float | None = None


@dataclass(slots=True)
class RapidStats:
    """Counts and times of one request. ``_s`` are seconds of wall time, ``_tokens`` are token counts.

    In a batch, the time of a shared forward pass is counted in full for each request that took part.

    Each round adds its accepted tokens, its forced tokens and one token of the target's own, except a round
    whose draft ends the answer: ``completion_tokens = accepted_tokens + forced_tokens + rounds``, less one if
    an end-of-sequence token was drafted. Tokens after a stop string are removed from ``completion_tokens``
    and ``token_sources``, but not from the other counts.

    Attributes:
        prompt_tokens: The target's prompt, reused prefix included.
        drafter_prompt_tokens: The drafter's prompt; 0 without a drafter.
        reused_prefix_tokens: Target prompt tokens that were not read for this request: their KV came from an
            earlier request, from another running one, or from ``prefix_cache_dir``.
        reused_drafter_prefix_tokens: The same for the drafter. A self-drafter also starts from the target's
            prompt.
        completion_tokens: Tokens of the answer, its end-of-sequence token included.
        rounds: Target verification passes after the prefill.
        drafter_passes: Drafter passes after its prefill. There are fewer than ``drafted_tokens`` where n-gram
            guesses were correct.
        drafted_tokens: Tokens that were proposed, among those that an output format allows.
        looked_up_tokens: Those of them that were found in the prompt, without the drafter.
        accepted_tokens: Proposed tokens that were accepted.
        forced_tokens: Draft tokens at positions where the output format allows a single token. The drafter is
            not asked there, so they count neither as drafted nor as accepted.
        token_sources: One letter for each of ``completion_tokens``, in order: ``d`` drafted and accepted,
            ``f`` forced by the output format, ``t`` the target's own (a correction or bonus token, and every
            token of plain decoding).
        agreement: Running mean of the overlap of target and drafter at the end of the answer, in [0, 1]. It
            starts from ``question_agreement`` and lowers the transfer strength
            (:mod:`rapid_integrations.engine.decoding.transfer`). ``None`` where the strength is fixed.
        question_agreement: How far the drafter's context covers the question, in [0, 1]. ``None`` where both
            the transfer strength and the draft length are fixed.
        queue_s: From submission to the first forward pass.
        retrieval_s: Finding the drafter's chunks, without building prompts.
        prefill_s: Both models reading their prompts.
        draft_s: Drafter passes after the prefill.
        verify_s: Target passes after the prefill.
        decode_s: Wall time from the end of the prefill to the last token.
        time_to_first_token_s: From submission to the engine to the first token.
        total_s: From submission to the engine to the last token.
        retriever: The retriever that found the chunks, e.g. ``"bm25"``; ``""`` if nothing was retrieved.
        retrieval_fallback: The reason why the drafter reads the context's start and end instead of retrieved
            chunks; ``None`` if it does not.
        retrieved_chunks: The chunks that the drafter read, in document order.
    """

    prompt_tokens: int = 0
    drafter_prompt_tokens: int = 0
    reused_prefix_tokens: int = 0
    reused_drafter_prefix_tokens: int = 0
    completion_tokens: int = 0
    rounds: int = 0
    drafter_passes: int = 0
    drafted_tokens: int = 0
    looked_up_tokens: int = 0
    accepted_tokens: int = 0
    forced_tokens: int = 0
    token_sources: str = ""
    agreement: float | None = None
    question_agreement: float | None = None
    queue_s: float = 0.0
    retrieval_s: float = 0.0
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    decode_s: float = 0.0
    time_to_first_token_s: float = 0.0
    total_s: float = 0.0
    retriever: str = ""
    retrieval_fallback: str | None = None
    retrieved_chunks: tuple[RetrievedChunk, ...] = field(default=())

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> RapidStats:
        """Statistics from their fields, also in files of version 0.1.0, which had another name for one field.

        Raises:
            TypeError: A field is unknown.
        """
        return cls(**{_FORMER_NAMES.get(name, name): value for name, value in stored.items()})

    @classmethod
    def pooled(cls, stats: Iterable[RapidStats]) -> RapidStats:
        """The summed counts and times of several requests, without the retrieved chunks."""
        requests = list(stats)
        numbers = [f.name for f in dataclasses.fields(cls) if isinstance(f.default, (int, float))]
        return cls(**{name: sum(getattr(each, name) for each in requests) for name in numbers})

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens, both without forced ones; 0 if nothing was drafted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Answer tokens per target verification pass, forced ones included; 1 for plain decoding."""
        return self.completion_tokens / self.rounds if self.rounds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Answer tokens per second of decoding, without the prefill."""
        return self.completion_tokens / self.decode_s if self.decode_s else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Counts, times and rates as JSON data."""
        return {
            **dataclasses.asdict(self),
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_round": self.tokens_per_round,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }
