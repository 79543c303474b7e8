"""The baselines: the generation methods that a benchmark compares.

Some are transformers' own methods, some are classes of LangChain and LlamaIndex, and some are this package's
engine with different options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rapid_integrations.errors import ConfigurationError

Runtime = Literal["rapid", "self", "transformers"]
"""What a baseline needs loaded: the engine with the drafter, the engine with the target as its own drafter,
or the bare transformers models."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """One way to generate an answer.

    Attributes:
        name: Its name on the command line and in result files.
        label: Its name in tables and plots.
        runtime: What has to be loaded for it.
        lossless: Whether its answers must equal those of ``generate()``.
        options: Flat options of the engine; empty for the other baselines.
    """

    name: str
    label: str
    runtime: Runtime
    lossless: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def uses_engine(self) -> bool:
        """Whether the engine answers. Only the engine reports the times of drafting and verification."""
        return self.runtime != "transformers"


_LOSSLESS = {"acceptance": "lossless"}

GENERATE = Baseline("generate", "generate()", "transformers", True)
ASSISTED = Baseline("assisted", "assisted generation", "transformers", True)
LOOKUP = Baseline("lookup", "prompt lookup", "transformers", True)
PLAIN = Baseline("plain", "ours, plain", "rapid", True, {"num_draft_tokens": 0})
LOSSLESS = Baseline("lossless", "ours, η = 0", "rapid", True, _LOSSLESS)
RAPID = Baseline("rapid", "RAPID", "rapid", False)
SELF = Baseline("self", "RAPID, self", "self", False)
HF_PIPELINE = Baseline("hf-pipeline", "HuggingFacePipeline (LangChain)", "transformers", True)
HF_LLM = Baseline("hf-llm", "HuggingFaceLLM (LlamaIndex)", "transformers", True)
RAPID_LANGCHAIN = Baseline("rapid-langchain", "RapidLLM, η = 0 (LangChain)", "rapid", True, _LOSSLESS)
RAPID_LLAMAINDEX = Baseline("rapid-llamaindex", "RapidLLM, η = 0 (LlamaIndex)", "rapid", True, _LOSSLESS)

BASELINES: Mapping[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        GENERATE, ASSISTED, LOOKUP, PLAIN, LOSSLESS, RAPID, SELF,
        HF_PIPELINE, HF_LLM, RAPID_LANGCHAIN, RAPID_LLAMAINDEX,
    )
}  # fmt: skip
"""All baselines by name, in the order of the tables."""

NEED_DRAFTER = frozenset({ASSISTED.name, RAPID.name})
"""Baselines that need a drafter with its own weights; ``self`` and ``lossless`` also run without one."""


def choose_baselines(names: Sequence[str], *, has_drafter: bool) -> tuple[Baseline, ...]:
    """The baselines of these names, in the order of the tables.

    Args:
        names: Keys of :data:`BASELINES`. An empty sequence selects every baseline that the models support.
        has_drafter: Whether there is a drafter with its own weights.

    Raises:
        ConfigurationError: A name is unknown, or its baseline needs a drafter and there is none.
    """
    if unknown := [name for name in names if name not in BASELINES]:
        raise ConfigurationError(
            f"there is no baseline {unknown[0]!r}: allowed are {', '.join(BASELINES)}, separated by commas."
        )
    if not has_drafter and (impossible := sorted(NEED_DRAFTER & set(names))):
        raise ConfigurationError(
            f"{', '.join(impossible)} need a drafter, but the target drafts for itself: name a drafter with "
            "--drafter, or leave them out of --baselines."
        )
    chosen = set(names) or set(BASELINES) - (set() if has_drafter else NEED_DRAFTER)
    return tuple(baseline for name, baseline in BASELINES.items() if name in chosen)
