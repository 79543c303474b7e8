"""Ways to answer a question about a document, behind one interface: a stream of text events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from transformers import DynamicCache

from rapid_integrations.config import GenerationOptions, RetrievalParams
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError, ContextLengthError
from rapid_integrations.evaluation.retrieval import Found, GivenChunks
from rapid_integrations.evaluation.tasks.task import Task, TaskQuestion
from rapid_integrations.events import Completion, PrefillProgress, TextDelta, TextEvent
from rapid_integrations.pipeline import RapidPipeline
from rapid_integrations.prompts import Message, PromptParts, Segment, SegmentKind
from rapid_integrations.tokenization.streaming import TextAssembler

METHOD_NAMES = (
    "lc",
    "rag",
    "sd",
    "streaming",
    "rapid",
    "rapid-fixed",
    "rapid-paper",
    "mixture",
    "generate",
)
SINK_TOKENS = 4
"""The first tokens of a prompt that a streaming drafter keeps (arXiv:2309.17453, section 3.1)."""


@dataclass(frozen=True, slots=True)
class Case:
    """One question as every method gets it.

    Attributes:
        task: The document it is about.
        question: The question.
        prompt: The prompt with the whole document as its context.
        found: What was retrieved for the question; the same for every method that reads it.
    """

    task: Task
    question: TaskQuestion
    prompt: PromptParts
    found: Found


class Method(Protocol):
    """A way to answer.

    Attributes:
        name: How reports name it.
        label: How tables show it.
        speculates: Whether it drafts, so that acceptance means something.
        uses_retrieval: Whether a model reads what was retrieved for the question.
    """

    @property
    def name(self) -> str: ...  # noqa: D102  # the class's docstring says it

    @property
    def label(self) -> str: ...  # noqa: D102

    @property
    def speculates(self) -> bool: ...  # noqa: D102

    @property
    def uses_retrieval(self) -> bool: ...  # noqa: D102

    def in_force(self, options: GenerationOptions) -> GenerationOptions:
        """The options with what makes no difference to this method at its default.

        Where this is equal, and the chunks are or it uses none, its answers cost and say the same.
        """
        ...

    def stream(self, pipeline: RapidPipeline, case: Case, options: GenerationOptions) -> Iterator[TextEvent]:
        """Answer; the last event is the completion."""
        ...


@dataclass(frozen=True, slots=True)
class EngineMethod:
    """A method that is the engine with certain options.

    Attributes:
        name: How reports name it.
        label: How tables show it.
        reads: The target reads the whole document, or only what was retrieved.
        speculates: Whether it drafts.
        options: Flat options it insists on.
        drafter_reads: What was retrieved, or the start and the end of the prompt as far as the retrieval
            budget goes: :func:`sinks_and_window`.
        dial: The flat option that sets how far the drafter is trusted, where the method has one.
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
        """Whether the target or a drafter reads what was retrieved."""
        return self.reads == "retrieved" or (self.speculates and self.drafter_reads == "retrieved")

    def in_force(self, options: GenerationOptions) -> GenerationOptions:
        """The options that it runs with, less those that make no difference."""
        own = options.override(**self.options)
        return replace(
            own,
            speculation=own.speculation.in_force,
            # A window is as long as the budget.
            retrieval=own.retrieval if self.uses_retrieval or self.speculates else RetrievalParams(),
        )

    def stream(self, pipeline: RapidPipeline, case: Case, options: GenerationOptions) -> Iterator[TextEvent]:
        """Answer through the pipeline."""
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
    """The tokens that a streaming drafter reads: the first few, the attention sinks, and the last ones.

    So MagicDec drafts (arXiv:2408.11049, section 4.2, with StreamingLLM's cache, arXiv:2309.17453), with one
    difference: the tokens are read anew, so that nothing of what stands between them is in their keys and
    values. Positions are counted without the gap, as StreamingLLM does. The answer's tokens come on top: the
    window does not move on.

    Args:
        tokens: A prompt.
        window: How many of its last tokens are kept, beside the first :data:`SINK_TOKENS`; at least 1.
    """
    return [*tokens[: min(SINK_TOKENS, max(0, len(tokens) - window))], *tokens[-window:]]


class TransformersGenerate:
    """The same target through transformers' own ``generate()``: greedy, with a ``DynamicCache``.

    The cache is kept between questions and cropped to the prefix they share, so that a document is read once
    here too. What is timed as decoding is the ``generate()`` call after the prompt was read, but for its last
    token, as in the engine. Holds the last document's cache; make a new one for another pipeline.
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
        """How tokens are drawn, and nothing else."""
        return GenerationOptions(sampling=options.sampling)

    def stream(self, pipeline: RapidPipeline, case: Case, options: GenerationOptions) -> Iterator[TextEvent]:
        """Answer with ``generate()``; the text arrives at once.

        Raises:
            ConfigurationError: The options ask for more than greedy decoding.
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
        # A thread of its own, that ends with the answer: OpenMP keeps a pool for every thread that computes,
        # and one beside the engine's would slow the other methods.
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
        """The kept cache, rolled back to what it shares with ``prompt``; else a new one."""
        shared = 0
        for kept, wanted in zip(self._tokens, prompt[:-1], strict=False):
            if kept != wanted:
                break
            shared += 1
        cache, self._cache, kept_tokens, self._tokens = self._cache, None, len(self._tokens), []
        if cache is not None and shared:
            try:
                cache.crop(shared - kept_tokens)
            except RuntimeError:  # a sliding window has forgotten what the prefix needs
                cache = None
        self._cache = cache if cache is not None and shared else DynamicCache(config=model.config)
        return self._cache


def make_method(name: str) -> Method:
    """The method of a name.

    Args:
        name: One of :data:`METHOD_NAMES`.

    Raises:
        ConfigurationError: There is none of this name.
    """
    for method in ENGINE_METHODS:
        if method.name == name:
            return method
    if name == TransformersGenerate.name:
        return TransformersGenerate()
    raise ConfigurationError(f"there is no method {name!r}: allowed are {', '.join(METHOD_NAMES)}.")


def question_prompt(template: str, *, context: str, question: str, answer_start: str = "") -> PromptParts:
    """The prompt that asks a question about a context.

    Args:
        template: Text with ``{context}`` and ``{question}`` once each, in this order.
        context: The document; braces and the like in it mean nothing.
        question: The question.
        answer_start: What the answer begins with, as a part of the prompt.

    Raises:
        ConfigurationError: The template lacks a place.
    """
    segments = fill_template(
        "prompt template", template, ("context", "context", context), ("question", "query", question)
    )
    return PromptParts(
        (Message("user", segments),),
        answer_start=(Segment("scaffold", answer_start),) if answer_start else (),
    )


def fill_template(what: str, template: str, *places: tuple[str, SegmentKind, str]) -> tuple[Segment, ...]:
    """A template with its places filled: braces and the like in what fills them mean nothing.

    Args:
        what: What errors call the template.
        template: Text with ``{name}`` once for each place, in their order.
        places: Names, kinds and texts.

    Raises:
        ConfigurationError: The template lacks a place.
    """
    segments, rest = [], template
    for name, kind, text in places:
        before, found, rest = rest.partition(f"{{{name}}}")
        if not found:
            names = " and then ".join(f"{{{place}}}" for place, _, _ in places)
            raise ConfigurationError(f"the {what} {template!r} must hold {names}, once each.")
        segments += [Segment("scaffold", before), Segment(kind, text)]
    return tuple(segment for segment in (*segments, Segment("scaffold", rest)) if segment.text)
