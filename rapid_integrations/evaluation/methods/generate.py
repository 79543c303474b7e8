"""A method outside the engine: transformers' ``generate()`` on the same target."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import DynamicCache

from rapid_integrations.config import GenerationOptions
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError, ContextLengthError
from rapid_integrations.evaluation.methods.method import Case
from rapid_integrations.events import Completion, PrefillProgress, TextDelta, TextEvent
from rapid_integrations.pipeline import RapidPipeline
from rapid_integrations.tokenization.streaming import TextAssembler


class TransformersGenerate:
    """Greedy decoding of the target with transformers' own ``generate()`` and a ``DynamicCache``.

    The cache is kept between questions and cropped to the prefix that they share, so a document is prefilled
    once, as in the engine. As there, prefill covers the prompt without its last token, and the decoding time
    is that of the ``generate()`` call after it. An object holds the cache of the last document and belongs to
    one pipeline.
    """

    name = "generate"
    label = "generate()"
    speculates = False
    uses_retrieval = False
    _PREFILL_TOKENS = 2048

    def __init__(self) -> None:
        self._cache: DynamicCache | None = None
        self._tokens: list[int] = []

    def in_force(self, options: GenerationOptions) -> GenerationOptions:
        """The sampling options alone: the method neither drafts nor retrieves."""
        return GenerationOptions(sampling=options.sampling)

    def stream(self, pipeline: RapidPipeline, case: Case, options: GenerationOptions) -> Iterator[TextEvent]:
        """Answer with ``generate()``. The whole text is one event.

        Raises:
            ConfigurationError: The options require more than greedy decoding.
            ContextLengthError: The prompt does not fit.
        """
        sampling = options.sampling
        if not sampling.greedy or sampling.repetition_penalty != 1 or sampling.stop or sampling.ignore_eos:
            raise ConfigurationError(
                "the method 'generate' only decodes greedily: leave temperature, repetition_penalty, stop "
                "and ignore_eos at their defaults, or leave the method out."
            )
        target = pipeline.engine.target
        prompt = pipeline.encode(case.prompt)
        if len(prompt) + sampling.max_new_tokens > target.context_window:
            raise ContextLengthError(
                f"the prompt has {len(prompt):,} tokens; '{pipeline.name}' takes "
                f"{target.context_window - sampling.max_new_tokens:,}. Shorten the context."
            )
        # In a thread that ends with the answer: OpenMP keeps a pool for every thread that computes, and a
        # second pool beside the engine's would slow down the other methods.
        with ThreadPoolExecutor(1, thread_name_prefix="generate") as thread:

            def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                return thread.submit(torch.inference_mode()(function), *args, **kwargs).result()

            started = time.perf_counter()
            stats = RapidStats(prompt_tokens=len(prompt))
            cache = run(self._reuse, target.model, prompt)
            stats.reused_prefix_tokens = cache.get_seq_length()
            total = len(prompt) - 1 - stats.reused_prefix_tokens
            for start in range(stats.reused_prefix_tokens, len(prompt) - 1, self._PREFILL_TOKENS):
                end = min(start + self._PREFILL_TOKENS, len(prompt) - 1)
                part = torch.tensor([prompt[start:end]], device=target.device)
                run(target.model, input_ids=part, cache=cache, use_cache=True, logits_to_keep=1)
                yield PrefillProgress(end - stats.reused_prefix_tokens, total)
            if target.device.type == "cuda":
                torch.cuda.synchronize(target.device)
            prefilled = time.perf_counter()
            ids = torch.tensor([prompt], device=target.device)
            output: torch.Tensor = run(
                target.model.generate,
                ids,
                attention_mask=torch.ones_like(ids),
                cache=cache,
                do_sample=False,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=sorted(target.eos_token_ids) or None,
                pad_token_id=min(target.eos_token_ids, default=0),
            )
            tokens: list[int] = output[0, len(prompt) :].tolist()
            ended = time.perf_counter()
        self._tokens = prompt + tokens[:-1]
        stats.completion_tokens = stats.rounds = len(tokens)
        stats.token_sources = "t" * len(tokens)
        stats.prefill_s = prefilled - started
        stats.decode_s = stats.verify_s = ended - prefilled
        stats.time_to_first_token_s = stats.total_s = ended - started
        stopped = tokens[-1] in target.eos_token_ids
        answer = tuple(tokens[:-1] if stopped else tokens)
        assembler = TextAssembler(pipeline.tokenizer)
        text = assembler.feed(answer) + assembler.flush()
        if text:
            yield TextDelta(text, len(answer))
        yield Completion(text, "stop" if stopped else "length", stats, answer)

    def _reuse(self, model: Any, prompt: Sequence[int]) -> DynamicCache:
        """The kept cache, rolled back to the prefix it shares with ``prompt``, or a new cache."""
        shared = 0
        for kept, wanted in zip(self._tokens, prompt[:-1], strict=False):
            if kept != wanted:
                break
            shared += 1
        cache, self._cache, kept_tokens, self._tokens = self._cache, None, len(self._tokens), []
        if cache is not None and shared:
            try:
                cache.crop(shared - kept_tokens)
            except RuntimeError:  # a sliding window no longer holds the prefix
                cache = None
        self._cache = cache if cache is not None and shared else DynamicCache(config=model.config)
        return self._cache
