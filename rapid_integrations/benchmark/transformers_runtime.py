"""Runs the transformers baselines: ``generate()``, assisted generation, prompt lookup and the host classes.

The models are those of transformers, without the engine. The cache of a prompt is kept between calls, as the
engine keeps it, so that decoding can be timed without reading a long document each time. The classes of the
host frameworks do not accept a cache and read each prompt again.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from rapid_integrations.benchmark.baselines import ASSISTED, HF_LLM, HF_PIPELINE, LOOKUP
from rapid_integrations.benchmark.hosts import huggingface_llm, huggingface_pipeline, prompt_text
from rapid_integrations.benchmark.memory import PeakMemory, synchronize
from rapid_integrations.benchmark.work import Answer, Outcome, Run
from rapid_integrations.demo import PROMPT_TEMPLATE
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError, ContextLengthError
from rapid_integrations.evaluation.tasks.prompts import question_prompt
from rapid_integrations.prompts import PromptParts, encode_prompt
from rapid_integrations.tokenization.streaming import TextAssembler

_PREFILL_CHUNK_TOKENS = 2048
_LOOKUP_TOKENS = 10  # as in transformers' documentation of prompt lookup


class CachedModel:
    """A model with the cache of its latest prompts.

    Args:
        model: A causal language model of transformers.

    Attributes:
        cache: Keys and values of the latest prompts, each without its last token.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache: DynamicCache | None = None
        self._rows: list[list[int]] = []

    def clear(self) -> None:
        """Drop the cache."""
        self.cache, self._rows = None, []

    def prefill(self, rows: Sequence[list[int]], mask: Tensor) -> int:
        """Read all tokens of each row except the last, and except those that the cache already holds.

        Args:
            rows: Token ids, of equal length, padded on the left.
            mask: ``[rows, tokens]``, 0 where a row is padded.

        Returns:
            The number of tokens of each row that were in the cache.
        """
        end = len(rows[0]) - 1
        shared = self._roll_back(rows, end)
        if self.cache is None:
            self.cache = DynamicCache(config=self.model.config)
        ids = torch.tensor(rows, device=self.model.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for start in range(shared, end, _PREFILL_CHUNK_TOKENS):
            stop = min(start + _PREFILL_CHUNK_TOKENS, end)
            self.model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                cache=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._rows = [row[:end] for row in rows]
        synchronize(self.model.device)
        return shared

    def discard_answer(self) -> None:
        """Shorten the cache to the prompts, after ``generate()`` has appended the answer."""
        self._crop(len(self._rows[0]))

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        if self.cache is None:
            return 0
        layers: Sequence[Any] = self.cache.layers  # each of them has keys and values
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in layers)

    def _roll_back(self, rows: Sequence[list[int]], end: int) -> int:
        """Crop the cache to the prefix that it shares with ``rows``, and return the length of the prefix."""
        if self.cache is None or len(rows) != len(self._rows):
            self.clear()
            return 0
        pairs = [zip(old, new[:end], strict=False) for old, new in zip(self._rows, rows, strict=True)]
        shared = min(
            next((i for i, (old, new) in enumerate(pair) if old != new), min(len(self._rows[0]), end))
            for pair in pairs
        )
        if not shared or not self._crop(shared):
            self.clear()
            return 0
        return shared

    def _crop(self, length: int) -> bool:
        """Shorten the cache to ``length`` tokens. If that is impossible, drop it and return false."""
        assert self.cache is not None
        try:
            self.cache.crop(length - self.cache.get_seq_length())
        except RuntimeError:  # a sliding window no longer has the earlier tokens
            self.clear()
            return False
        return True


class _TokenClock(BaseStreamer):
    """Records when ``generate()`` emits the prompt, and then when it emits tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Record the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Required by the base class."""


class TransformersRuntime:
    """Runs baselines on transformers models.

    Args:
        target: The target.
        drafter: The drafter for assisted generation; ``None`` if there is none.
        tokenizer: The target's tokenizer.
        max_new_tokens: The maximum length of an answer.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
    ) -> None:
        self._target = CachedModel(target)
        self._drafter = None if drafter is None else CachedModel(drafter)
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._eos = _eos_token_ids(target)
        pad = tokenizer.pad_token_id
        self._pad = min(self._eos, default=0) if pad is None else pad
        self._hosts: dict[str, Callable[[str], str]] = {}

    @torch.inference_mode()
    def run(self, run: Run) -> Outcome:
        """Ask all questions of a run.

        Raises:
            ConfigurationError: A package is missing, or assisted generation has no drafter.
            ContextLengthError: A prompt is longer than the target's context window allows.
        """
        if run.cold:
            self._target.clear()
            if self._drafter is not None:
                self._drafter.clear()
        prompts = [
            question_prompt(PROMPT_TEMPLATE, context=run.task.document, question=question.question)
            for question in run.task.questions
        ]
        device = self._target.model.device
        if run.baseline in (HF_PIPELINE.name, HF_LLM.name):
            return self._ask_host(run.baseline, prompts)
        memory = PeakMemory(device)
        started = time.perf_counter()
        groups = [prompts] if run.together else [[prompt] for prompt in prompts]
        parts = [self._answer(run.baseline, group) for group in groups]
        return Outcome(
            answers=tuple(answer for answers, *_ in parts for answer in answers),
            stats=RapidStats.pooled(stats for _, stats, _ in parts),
            wall_s=time.perf_counter() - started,
            first_token_s=tuple(first_token_s for answers, _, first_token_s in parts for _ in answers),
            kv_bytes=self._kv_bytes() if run.cold else None,
            rest_bytes=memory.rest_bytes,
            peak_bytes=memory.peak_bytes(),
        )

    def _kv_bytes(self) -> int:
        return self._target.num_bytes + (0 if self._drafter is None else self._drafter.num_bytes)

    def _answer(
        self, baseline: str, prompts: Sequence[PromptParts]
    ) -> tuple[list[Answer], RapidStats, float]:
        """Answer prompts in one batch; also returns the seconds to the first token."""
        started = time.perf_counter()
        encoded = [encode_prompt(prompt, self._tokenizer) for prompt in prompts]
        longest = max(map(len, encoded))
        self._check_fits(longest)
        rows = [[self._pad] * (longest - len(tokens)) + tokens for tokens in encoded]
        device = self._target.model.device
        mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in encoded], device=device)
        assisted = baseline == ASSISTED.name
        if assisted and self._drafter is None:
            raise ConfigurationError("assisted generation needs a drafter: name one with --drafter.")
        reused = self._target.prefill(rows, mask)
        extra: dict[str, Any] = {}
        if assisted and self._drafter is not None:
            self._drafter.prefill(rows, mask)
            extra["assistant_model"] = self._drafter.model
        elif baseline == LOOKUP.name:
            extra["prompt_lookup_num_tokens"] = _LOOKUP_TOKENS
        ids = torch.tensor(rows, device=device)
        clock = _TokenClock()
        prefilled = time.perf_counter()
        with _prompt_cached(self._target) if extra else nullcontext():
            with _assistant_cached(self._drafter) if assisted and self._drafter else nullcontext():
                output: Tensor = self._target.model.generate(  # type: ignore[operator]  # untyped in transformers
                    ids,
                    attention_mask=mask,
                    cache=self._target.cache,
                    do_sample=False,
                    max_new_tokens=self._max_new_tokens,
                    pad_token_id=self._pad,
                    streamer=clock,
                    **extra,
                )
            new = output[:, longest:].tolist()
        ended = time.perf_counter()
        self._target.discard_answer()
        if assisted and self._drafter is not None:
            self._drafter.discard_answer()
        answers = [self._parse_answer(tokens) for tokens in new]
        stats = RapidStats(
            prompt_tokens=sum(map(len, encoded)),
            reused_prefix_tokens=reused * len(rows),
            completion_tokens=sum(count for _, count in answers),
            rounds=len(clock.times) - 1,
            prefill_s=prefilled - started,
            decode_s=ended - prefilled,
            total_s=ended - started,
        )
        return [answer for answer, _ in answers], stats, clock.times[1] - started

    def _parse_answer(self, tokens: list[int]) -> tuple[Answer, int]:
        """The answer without tokens after its end, and its length including an end-of-sequence token."""
        end = next((i for i, token in enumerate(tokens) if token in self._eos), None)
        shown = tuple(tokens if end is None else tokens[:end])
        assembler = TextAssembler(self._tokenizer)
        return Answer(assembler.feed(shown) + assembler.flush(), shown), len(shown) + (end is not None)

    def _check_fits(self, prompt_tokens: int) -> None:
        window = getattr(self._target.model.config.get_text_config(), "max_position_embeddings", None)
        if window is not None and prompt_tokens + self._max_new_tokens > window:
            raise ContextLengthError(
                f"a prompt has {prompt_tokens:,} tokens; the target accepts "
                f"{window - self._max_new_tokens:,} ({window:,} less "
                f"max_new_tokens={self._max_new_tokens:,}). Choose shorter --contexts."
            )

    def _ask_host(self, baseline: str, prompts: Sequence[PromptParts]) -> Outcome:
        """Answer with a host framework's class around the same model, one prompt after the other."""
        if baseline not in self._hosts:
            make = huggingface_pipeline if baseline == HF_PIPELINE.name else huggingface_llm
            self._hosts[baseline] = make(self._target.model, self._tokenizer, self._max_new_tokens)
        ask = self._hosts[baseline]
        texts = [prompt_text(prompt, self._tokenizer) for prompt in prompts]
        encoded = [encode_prompt(prompt, self._tokenizer) for prompt in prompts]
        self._check_fits(max(map(len, encoded)))
        same_prompt = all(
            self._tokenizer(text)["input_ids"] == ids for text, ids in zip(texts, encoded, strict=True)
        )
        memory = PeakMemory(self._target.model.device)
        started = time.perf_counter()
        answers = tuple(Answer(ask(text)) for text in texts)
        synchronize(self._target.model.device)
        return Outcome(
            answers=answers,
            stats=RapidStats(prompt_tokens=sum(map(len, encoded))),
            wall_s=time.perf_counter() - started,
            same_prompt=same_prompt,
            rest_bytes=memory.rest_bytes,
            peak_bytes=memory.peak_bytes(),
        )


@contextmanager
def _prompt_cached(target: CachedModel) -> Iterator[None]:
    """Let assisted generation start after the cached tokens.

    Without this it would read the whole prompt again. ``generate()`` without an assistant skips cached tokens
    itself.
    """
    model = target.model
    inner: Callable[..., Any] = model.prepare_inputs_for_generation  # type: ignore[assignment]  # torch: Tensor | Module

    @functools.wraps(inner)
    def prepare(input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any) -> Any:
        if kwargs.get("is_first_iteration") and next_sequence_length is None:
            next_sequence_length = input_ids.shape[1] - kwargs["cache"].get_seq_length()
        return inner(input_ids, next_sequence_length=next_sequence_length, **kwargs)

    with _overridden(model, "prepare_inputs_for_generation", prepare):
        yield


@contextmanager
def _assistant_cached(drafter: CachedModel) -> Iterator[None]:
    """Let the assistant start from its cache: assisted generation has no argument for it."""
    inner: Callable[..., Any] = drafter.model.generate  # type: ignore[assignment]  # as above

    def generate(*args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("cache", drafter.cache)  # later rounds pass it themselves
        return inner(*args, **kwargs)

    with _overridden(drafter.model, "generate", generate):
        yield


@contextmanager
def _overridden(model: PreTrainedModel, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Override a method of the model within the context."""
    setattr(model, name, method)
    try:
        yield
    finally:
        delattr(model, name)


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config else None
    if configured is None:
        return frozenset()
    return frozenset([configured] if isinstance(configured, int) else configured)
