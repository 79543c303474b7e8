"""A pipeline without models: it answers with a description of the prompt, and records its requests."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rapid_integrations.config import GenerationOptions
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ContextLengthError
from rapid_integrations.events import Completion, PrefillProgress, TextDelta
from rapid_integrations.pipeline import RapidPipeline
from rapid_integrations.prompts import PromptParts
from rapid_integrations.retrieval import DrafterContext, as_retriever

DOCUMENT = "The harbour master is Ada. The lighthouse keeper is Grace. " * 20
QUESTION = "Who is the harbour master?"
PROMPT = f"Read this.\n<context>\n{DOCUMENT}\n</context>\n{QUESTION}"

PEOPLE = ("Ada is the harbour master.", "Grace keeps the lighthouse.", "Alan counts the barrels.")
PEOPLE_TEXT = " ".join(PEOPLE)
PEOPLE_QUESTION = "Who keeps the lighthouse?"


@dataclass(frozen=True)
class Request:
    entry: str
    parts: PromptParts
    options: GenerationOptions
    retriever: Any


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


@dataclass
class FakePipeline:
    name: str = "fake"
    context_window: int = 4096
    max_prompt_chars: int = 100_000
    chat_template: bool = True
    hold: bool = False  # whether async answers pause before their end until they are cancelled
    tokenizer: Any = field(default_factory=word_tokenizer)
    requests: list[Request] = field(default_factory=list)
    finished: int = 0
    cancelled: int = 0

    def __post_init__(self) -> None:
        self.drafter_context = DrafterContext(tokenizer=self.tokenizer)

    def answer(self, parts: PromptParts, options: GenerationOptions) -> str:
        return (
            f"{parts.query.strip()} read {len(parts.context)} characters "
            f"at temperature {options.sampling.temperature} "
            f"and strength {options.speculation.transfer_strength}"
        )

    def _events(self, entry, parts, options, retriever):
        assert isinstance(parts, PromptParts)
        assert isinstance(options, GenerationOptions)
        self.requests.append(Request(entry, parts, options, retriever))
        if len(parts.text) > self.max_prompt_chars:
            raise ContextLengthError("the prompt is too long for the fake")
        done = False
        try:
            call_retriever = None if retriever is None else as_retriever(retriever)
            found = self.drafter_context.find(
                parts.query, parts.context, options.retrieval, retriever=call_retriever
            )
            yield found
            yield PrefillProgress(1, 2)
            yield PrefillProgress(2, 2)
            words = self.answer(parts, options).split(" ")
            reason = "stop" if len(words) <= options.sampling.max_new_tokens else "length"
            text = " ".join(words[: options.sampling.max_new_tokens])
            for stop in options.sampling.stop:
                if stop in text:
                    text, reason = text.split(stop)[0], "stop"
            for index, word in enumerate(text.split(" ")):
                yield TextDelta(word if index == 0 else f" {word}", 1)
            stats = RapidStats(
                prompt_tokens=len(parts.text.split()),
                completion_tokens=len(text.split()),
                retriever=found.retriever,
                retrieval_fallback=found.fallback,
                retrieved_chunks=found.chunks,
            )
            done = True
            self.finished += 1
            yield Completion(text, reason, stats, ())
        finally:
            self.cancelled += not done

    def stream(self, prompt, *, options=None, retriever=None):
        yield from self._events("stream", prompt, options, retriever)

    async def astream(self, prompt, *, options=None, retriever=None):
        events = self._events("astream", prompt, options, retriever)
        try:
            for event in events:
                await asyncio.sleep(0)
                if self.hold and isinstance(event, TextDelta):
                    await asyncio.Event().wait()
                yield event
        finally:
            events.close()

    def generate(self, prompts, *, options=None, retriever=None, on_event=None):
        streams = [self._events("generate", prompt, options, retriever) for prompt in prompts]
        completions = []
        for index, stream in enumerate(streams):
            for event in stream:
                if on_event is not None:
                    on_event(index, event)
            completions.append(event)
        return completions

    agenerate = RapidPipeline.agenerate  # it calls astream only
