"""Who is measured: transformers' own ways to generate, host frameworks around them, and ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rapid_integrations.errors import ConfigurationError

Runtime = Literal["rapid", "self", "transformers"]
"""What a contestant needs loaded: the engine with the drafter, the engine that drafts for itself, or the bare
models."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to answer.

    Attributes:
        name: How the command line and reports name it.
        label: How tables show it.
        runtime: What it needs loaded.
        lossless: Whether its answers must be those of ``generate()``.
        options: Flat options that make it what it is; empty outside the engine.
    """

    name: str
    label: str
    runtime: Runtime
    lossless: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether the engine answers, and so can tell what its rounds are spent on."""
        return self.runtime != "transformers"


_LOSSLESS = {"acceptance": "lossless"}

GENERATE = Contestant("generate", "generate()", "transformers", True)
ASSISTED = Contestant("assisted", "assisted generation", "transformers", True)
LOOKUP = Contestant("lookup", "prompt lookup", "transformers", True)
PLAIN = Contestant("plain", "ours, plain", "rapid", True, {"num_draft_tokens": 0})
LOSSLESS = Contestant("lossless", "ours, η = 0", "rapid", True, _LOSSLESS)
RAPID = Contestant("rapid", "RAPID", "rapid", False)
SELF = Contestant("self", "RAPID, self", "self", False)
HF_PIPELINE = Contestant("hf-pipeline", "HuggingFacePipeline (LangChain)", "transformers", True)
HF_LLM = Contestant("hf-llm", "HuggingFaceLLM (LlamaIndex)", "transformers", True)
RAPID_LANGCHAIN = Contestant("rapid-langchain", "RapidLLM, η = 0 (LangChain)", "rapid", True, _LOSSLESS)
RAPID_LLAMAINDEX = Contestant("rapid-llamaindex", "RapidLLM, η = 0 (LlamaIndex)", "rapid", True, _LOSSLESS)

CONTESTANTS: Mapping[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        GENERATE, ASSISTED, LOOKUP, PLAIN, LOSSLESS, RAPID, SELF,
        HF_PIPELINE, HF_LLM, RAPID_LANGCHAIN, RAPID_LLAMAINDEX,
    )
}  # fmt: skip

NEED_DRAFTER = frozenset({ASSISTED.name, RAPID.name})
"""Contestants that are nothing without a drafter of its own weights; ``self`` and ``lossless`` do without."""


def choose_contestants(names: Sequence[str], *, has_drafter: bool) -> tuple[Contestant, ...]:
    """The contestants of these names, in the order of the tables.

    Args:
        names: Of :data:`CONTESTANTS`; empty takes all that the models allow.
        has_drafter: Whether a drafter of its own weights was given.

    Raises:
        ConfigurationError: A name is unknown, or needs a drafter that is not there.
    """
    if unknown := [name for name in names if name not in CONTESTANTS]:
        raise ConfigurationError(
            f"there is no peer {unknown[0]!r}: allowed are {', '.join(CONTESTANTS)}, with commas between."
        )
    if not has_drafter and (impossible := sorted(NEED_DRAFTER & set(names))):
        raise ConfigurationError(
            f"{', '.join(impossible)} need a drafter, but the target drafts for itself: name one with "
            "--drafter, or leave them out of --peers."
        )
    chosen = set(names) or set(CONTESTANTS) - (set() if has_drafter else NEED_DRAFTER)
    return tuple(contestant for name, contestant in CONTESTANTS.items() if name in chosen)
