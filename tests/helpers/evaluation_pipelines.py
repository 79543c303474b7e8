"""Pipelines for tests of the evaluation: one that answers from a script, and one with small random models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from helpers.tiny_models import tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rapid_integrations.config import GenerationOptions
from rapid_integrations.demo.prompts import CHAT_TEMPLATE
from rapid_integrations.demo.tokenizer import build_tokenizer
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.events import Completion, PrefillProgress, TextDelta, TextEvent
from rapid_integrations.pipeline import RapidPipeline
from rapid_integrations.prompts import PromptParts, encode_prompt
from rapid_integrations.retrieval import Chunk, DrafterContext


def demo_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def random_pipeline(**options: Any) -> RapidPipeline:
    """A pipeline of two different random models with the demo's vocabulary."""
    tokenizer = demo_tokenizer()
    shape = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    return RapidPipeline.from_pretrained(
        tiny_model("llama", 0, **shape),
        tiny_model("llama", 1, **shape),
        tokenizer=tokenizer,
        options=GenerationOptions().override(
            retrieval_chunk_tokens=32, retrieval_min_tokens=96, max_new_tokens=12, **options
        ),
    )


@dataclass(frozen=True)
class Call:
    """A call of a scripted pipeline."""

    prompt: PromptParts
    options: GenerationOptions
    chunks: tuple[Chunk, ...]

    @property
    def plain(self) -> bool:
        return self.options.speculation.num_draft_tokens == 0


@cache
def _models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Models that are never run. Journals identify a scripted pipeline by them."""
    return tiny_model("llama", 0), tiny_model("llama", 1)


@dataclass
class ScriptedPipeline:
    """Answers with ``script(call)`` and reports ``stats(call)``. Its retrieval is real."""

    script: Callable[[Call], str]
    stats: Callable[[Call], RapidStats] = lambda call: RapidStats(
        completion_tokens=4, rounds=2, drafted_tokens=5, accepted_tokens=3, decode_s=0.5
    )
    name: str = "scripted"
    context_window: int = 40_960
    chat_template: bool = True
    calls: list[Call] = field(default_factory=list)
    options: GenerationOptions = field(
        default_factory=lambda: GenerationOptions().override(
            retrieval_chunk_tokens=32, retrieval_min_tokens=96
        )
    )

    def __post_init__(self) -> None:
        self.tokenizer = demo_tokenizer()
        self.drafter_context = DrafterContext(tokenizer=self.tokenizer)
        target, drafter = (
            SimpleNamespace(name=name, model=model, device=torch.device("cpu"), kv_dtype=None)
            for name, model in zip((self.name, "drafter"), _models(), strict=True)
        )
        self.engine = SimpleNamespace(target=target, drafter=drafter)

    @property
    def measured_calls(self) -> list[Call]:
        """The calls without those for warming up, whose answers have at most 8 tokens."""
        return [call for call in self.calls if call.options.sampling.max_new_tokens > 8]

    def encode(self, parts: PromptParts) -> list[int]:
        return encode_prompt(parts, self.tokenizer)

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def generate(
        self, prompts: Sequence[PromptParts], *, options: GenerationOptions | None = None
    ) -> list[Completion]:
        answers = (list(self.stream(prompt, options=options))[-1] for prompt in prompts)
        return [answer for answer in answers if isinstance(answer, Completion)]

    def stream(
        self, prompt: PromptParts, *, options: GenerationOptions | None = None, retriever: Any = None
    ) -> Iterator[TextEvent]:
        chunks = () if retriever is None else tuple(retriever.retrieve("", "", max_tokens=1))
        call = Call(prompt, options or self.options, chunks)
        self.calls.append(call)
        text = self.script(call)
        yield PrefillProgress(1, 2)
        yield PrefillProgress(2, 2)
        if text:
            yield TextDelta(text, 1)
        yield Completion(text, "stop", self.stats(call), (1,))
