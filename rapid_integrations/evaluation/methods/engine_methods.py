"""Methods that run on the engine. They differ in their options and in the text that the models read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from rapid_integrations.config import GenerationOptions, RetrievalParams
from rapid_integrations.evaluation.methods.method import Case
from rapid_integrations.evaluation.methods.retrieval import GivenChunks
from rapid_integrations.events import TextEvent
from rapid_integrations.pipeline import RapidPipeline

SINK_TOKENS = 4
"""Number of first tokens that a streaming drafter keeps: attention sinks (arXiv:2309.17453, section 3.1)."""


@dataclass(frozen=True, slots=True)
class EngineMethod:
    """A method that runs the engine with fixed options.

    Attributes:
        name: The name in reports and on the command line.
        label: The name in tables.
        reads: Whether the target reads the whole document or only the retrieved passages.
        speculates: Whether the method drafts tokens.
        options: Flat generation options that the method fixes.
        drafter_reads: ``"retrieved"`` for the retrieved passages, or ``"window"`` for the first and last
            tokens of the prompt, as many as the retrieval budget allows: :func:`sinks_and_window`.
        dial: The flat option that sets how far the drafter is trusted; ``None`` if the method has none.
    """

    name: str
    label: str
    reads: Literal["document", "retrieved"]
    speculates: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    drafter_reads: Literal["retrieved", "window"] = "retrieved"
    dial: Literal["transfer_strength", "mixture_weight"] | None = None

    @property
    def uses_retrieval(self) -> bool:
        """Whether the target or the drafter reads the retrieved passages."""
        return self.reads == "retrieved" or (self.speculates and self.drafter_reads == "retrieved")

    def in_force(self, options: GenerationOptions) -> GenerationOptions:
        """The options of a run, with those that do not affect this method at their defaults."""
        fixed = options.override(**self.options)
        # A drafter with a window does not retrieve, but the retrieval budget sets the window's length.
        needs_budget = self.uses_retrieval or self.speculates
        return replace(
            fixed,
            speculation=fixed.speculation.in_force,
            retrieval=fixed.retrieval if needs_budget else RetrievalParams(),
        )

    def stream(self, pipeline: RapidPipeline, case: Case, options: GenerationOptions) -> Iterator[TextEvent]:
        """Answer with the pipeline."""
        prompt = case.prompt
        if self.drafter_reads == "window":
            window = options.retrieval.budget(pipeline.count_tokens(prompt.context))
            return pipeline.stream(
                prompt,
                options=options.override(**self.options),
                drafter_prompt=partial(sinks_and_window, window=window),
            )
        if self.reads == "retrieved":
            prompt = prompt.with_context(case.found.retrieved.text)
        return pipeline.stream(
            prompt,
            options=options.override(retrieval_max_tokens=case.found.max_tokens, **self.options),
            retriever=GivenChunks.of(case.found.retrieved),
        )


LONG_CONTEXT = EngineMethod("lc", "long context", "document", False, {"num_draft_tokens": 0})
RETRIEVED_ONLY = EngineMethod("rag", "retrieved only", "retrieved", False, {"num_draft_tokens": 0})
PLAIN_SPECULATION = EngineMethod("sd", "plain speculation", "document", True, {"acceptance": "lossless"})
STREAMING = EngineMethod(
    "streaming",
    "streaming drafter",
    "document",
    True,
    {"acceptance": "lossless"},
    drafter_reads="window",
)
RAPID = EngineMethod("rapid", "RAPID", "document", True, dial="transfer_strength")
RAPID_FIXED = EngineMethod(
    "rapid-fixed",
    "RAPID, fixed η",
    "document",
    True,
    {"acceptance": "augmented", "adaptive_transfer": False},
    dial="transfer_strength",
)
RAPID_PAPER = EngineMethod(
    "rapid-paper",
    "RAPID, published",
    "document",
    True,
    {"acceptance": "paper"},
    dial="transfer_strength",
)
MIXTURE = EngineMethod(
    "mixture", "static mixture", "document", True, {"acceptance": "mixture"}, dial="mixture_weight"
)
ENGINE_METHODS = (
    LONG_CONTEXT,
    RETRIEVED_ONLY,
    PLAIN_SPECULATION,
    STREAMING,
    RAPID,
    RAPID_FIXED,
    RAPID_PAPER,
    MIXTURE,
)


def sinks_and_window(tokens: Sequence[int], *, window: int) -> list[int]:
    """Select the tokens that a streaming drafter reads: the attention sinks and the last tokens.

    MagicDec drafts in this way (arXiv:2408.11049, section 4.2, with StreamingLLM's cache, arXiv:2309.17453).
    There is one difference: the selected tokens are prefilled without the rest of the prompt, so their keys
    and values do not depend on the tokens left out. Positions are consecutive, as in StreamingLLM. The
    window does not move: tokens of the answer are added to it.

    Args:
        tokens: A prompt.
        window: Number of last tokens to keep, in addition to the first :data:`SINK_TOKENS`; at least 1.
    """
    return [*tokens[: min(SINK_TOKENS, max(0, len(tokens) - window))], *tokens[-window:]]
