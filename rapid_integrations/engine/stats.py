"""What a request cost: counts and times as they were measured, rates derived from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class RetrievedChunk:
    """One chunk the drafter read.

    Attributes:
        text: The chunk's text.
        position: Its place among the document's chunks, or its character offset in the context where the
            retriever tells only the text; ``None`` when the context does not contain it.
        score: The retriever's score; ``None`` where it gave none.
    """

    text: str
    position: int | None = None
    score: float | None = None


@dataclass(slots=True)
class RapidStats:
    """Counts and times of one request. ``_s`` are seconds of wall time, ``_tokens`` are token counts.

    In a batch, the time of a shared forward pass is counted in full for each request that took part.

    Each round adds its accepted tokens, its forced ones and one of the target's own, but for a round whose
    draft ends the answer: ``completion_tokens = accepted_tokens + forced_tokens + rounds``, one less where an
    end-of-sequence token was drafted. A stop string takes what stands behind it out of ``completion_tokens``
    and ``token_sources``, but not out of the other counts.

    Attributes:
        prompt_tokens: The target's prompt, reused prefix included.
        drafter_prompt_tokens: The drafter's prompt; 0 without a drafter.
        reused_prefix_tokens: Target prompt tokens that were not read for this request: their KV came from an
            earlier one, from one that read them at the same time, or from ``prefix_cache_dir``.
        reused_drafter_prefix_tokens: The same for the drafter; one that is the target itself also starts from
            the target's prompt.
        completion_tokens: Tokens of the answer, its end-of-sequence token included.
        rounds: Target verification passes after the prefill.
        drafter_passes: Passes of the drafter after its prefill: fewer than ``drafted_tokens`` where its
            choices were guessed from what it reads.
        drafted_tokens: Tokens the drafter proposed, chosen among those that an output format allows.
        accepted_tokens: Proposed tokens that were accepted.
        forced_tokens: Draft tokens that stood because the output format allows no other: neither drafted nor
            accepted, since the drafter is not asked for them.
        token_sources: A letter for each of ``completion_tokens``, in order: ``d`` drafted and accepted, ``f``
            forced by the output format, ``t`` the target's own (a correction or bonus token, and every token
            of plain decoding).
        agreement: How far target and drafter agreed towards the answer's end, in [0, 1], as far as the
            drafter was asked, begun at ``question_agreement``: what the transfer strength was lowered by
            (:mod:`rapid_integrations.engine.decoding.transfer`); ``None`` where it was fixed.
        question_agreement: How far the drafter's context covers the question, in [0, 1]: where the running
            mean of the agreement begins (same place), and what an engine's experience with drafts is
            kept apart by; ``None`` where both the transfer strength and the draft length were fixed.
        queue_s: From submission to the first forward pass.
        retrieval_s: Finding the drafter's chunks, prompt building excluded.
        prefill_s: Both models reading their prompts.
        draft_s: Drafter passes after the prefill.
        verify_s: Target passes after the prefill.
        decode_s: Wall time from the end of the prefill to the last token.
        time_to_first_token_s: From submission to the engine to the first token.
        total_s: From submission to the engine to the last token.
        retriever: What found the chunks, e.g. ``"bm25"``; ``""`` when nothing was retrieved.
        retrieval_fallback: Why the drafter had to fall back to the context's start and end; ``None`` if not.
        retrieved_chunks: What the drafter read, in document order.
    """

    prompt_tokens: int = 0
    drafter_prompt_tokens: int = 0
    reused_prefix_tokens: int = 0
    reused_drafter_prefix_tokens: int = 0
    completion_tokens: int = 0
    rounds: int = 0
    drafter_passes: int = 0
    drafted_tokens: int = 0
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
    def pooled(cls, stats: Iterable[RapidStats]) -> RapidStats:
        """The counts and times of several requests, summed; what was retrieved is left out."""
        every = list(stats)
        numbers = [f.name for f in dataclasses.fields(cls) if isinstance(f.default, (int, float))]
        return cls(**{name: sum(getattr(each, name) for each in every) for name in numbers})

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens, forced ones left out of both; 0 when nothing was drafted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Answer tokens per target verification pass, forced ones included; plain decoding has 1."""
        return self.completion_tokens / self.rounds if self.rounds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Answer tokens per second of decoding, prefill excluded."""
        return self.completion_tokens / self.decode_s if self.decode_s else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Counts, times and rates as plain data that JSON can hold."""
        return {
            **dataclasses.asdict(self),
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_round": self.tokens_per_round,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }
