"""Text in, text events out: prompts, retrieval and the engine, with no host framework.

Every entry point of both frameworks wraps :meth:`RapidPipeline.stream` or its siblings, which wrap one
stream of engine events; sync, async, streaming and batched paths cannot drift apart.
"""

from __future__ import annotations

import asyncio
import queue
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rapid_integrations.config import EngineLimits, GenerationOptions, kv_dtype_name
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.requests import (
    Event,
    Failed,
    Finished,
    NewTokens,
    Prefilled,
    Request,
    RequestHandle,
)
from rapid_integrations.errors import ConfigurationError, ContextLengthError
from rapid_integrations.events import Completion, PrefillProgress, TextDelta, TextEvent
from rapid_integrations.loading import ENGINES, ModelSpec, check_same_vocabulary
from rapid_integrations.prompts import PromptParts, encode_prompt
from rapid_integrations.retrieval import DrafterContext, RetrievedContext, as_retriever
from rapid_integrations.structured.grammar import OutputConstraints
from rapid_integrations.tokenization.encoding import encode_plain
from rapid_integrations.tokenization.streaming import TextAssembler

DrafterPrompt = Callable[[Sequence[int]], Sequence[int]]
"""From the target's prompt tokens to the drafter's."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    request: Request
    retrieved: RetrievedContext | None
    visible_controls: frozenset[str]


@dataclass(slots=True)
class _Answer:
    """Turns one request's engine events into text events."""

    assembler: TextAssembler
    retrieved: RetrievedContext | None
    token_ids: list[int] = field(default_factory=list)

    def take(self, event: Event) -> list[TextEvent]:
        """The text events an engine event stands for; raises what the request failed with."""
        match event:
            case Prefilled(done, total):
                return [PrefillProgress(done, total)]
            case NewTokens(token_ids):
                self.token_ids.extend(token_ids)
                text = self.assembler.feed(token_ids)
                return [TextDelta(text, len(token_ids))] if text else []
            case Failed(error):
                raise error
            case Finished(reason, stats):
                rest = self.assembler.flush()
                if self.retrieved is not None:
                    stats.retriever = self.retrieved.retriever
                    stats.retrieval_s = self.retrieved.seconds
                    stats.retrieval_fallback = self.retrieved.fallback
                    stats.retrieved_chunks = self.retrieved.chunks
                completion = Completion(self.assembler.text, reason, stats, tuple(self.token_ids))
                return [TextDelta(rest, 0), completion] if rest else [completion]


class RapidPipeline:
    """A target, a drafter and a retriever, ready to answer.

    Make one with :meth:`from_pretrained` or :meth:`demo`. Pipelines are cheap and safe to use from any
    thread: those over the same models share one engine.

    Attributes:
        name: The target's name.
        tokenizer: The target's tokenizer.
        options: What calls run with unless they say otherwise.
        drafter_context: Finds what the drafter reads.
    """

    def __init__(
        self,
        target: ModelSpec,
        drafter: ModelSpec | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        drafter_tokenizer: PreTrainedTokenizerBase | None = None,
        retriever: Any = None,
        embeddings: Any = None,
        options: GenerationOptions | None = None,
        limits: EngineLimits | None = None,
        chat_template: bool = True,
    ) -> None:
        self.tokenizer = tokenizer or target.load_tokenizer()
        if drafter is not None and (drafter_tokenizer is not None or not drafter.loaded):
            check_same_vocabulary(self.tokenizer, drafter_tokenizer or drafter.load_tokenizer())
        self.options = options or GenerationOptions()
        self.chat_template = chat_template
        self.drafter_context = DrafterContext(
            tokenizer=self.tokenizer,
            retriever=None if retriever is None else as_retriever(retriever),
            embeddings=embeddings,
        )
        self._engine, release = ENGINES.acquire(target, drafter, limits or EngineLimits())
        self.name = self._engine.target.name
        self._constraints = OutputConstraints(
            self.tokenizer, self._engine.target.eos_token_ids, self._engine.vocab_size
        )
        self._finalizer = weakref.finalize(self, release)

    @classmethod
    def from_pretrained(
        cls,
        target: str | Path | PreTrainedModel,
        drafter: str | Path | PreTrainedModel | None = None,
        *,
        retriever: Any = None,
        embeddings: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        drafter_tokenizer: PreTrainedTokenizerBase | None = None,
        options: GenerationOptions | None = None,
        limits: EngineLimits | None = None,
        dtype: Any = None,
        device_map: Any = None,
        quantization_config: Any = None,
        drafter_dtype: Any = None,
        drafter_device_map: Any = None,
        drafter_quantization_config: Any = None,
        revision: str | None = None,
        drafter_revision: str | None = None,
        local_files_only: bool = False,
        chat_template: bool = True,
        kv_dtype: Any = None,
    ) -> RapidPipeline:
        """Load models by name, safetensors only and without remote code, or take loaded ones.

        Args:
            target: Hub id, folder or a loaded model: it reads the whole prompt and decides.
            drafter: The same for the drafter, of any size, with the target's vocabulary. ``None`` lets the
                target draft for itself; with a ``drafter_*`` option it does so as a second copy.
            retriever: Finds the drafter's context: a retriever, vector store or index of either framework, or
                a callable from a query to chunks. ``None`` ranks chunks of the prompt's own context.
            embeddings: Ranks them densely: embeddings of either framework or a sentence-transformers name.
                ``None`` ranks them by BM25.
            tokenizer: The target's tokenizer; required with a loaded target.
            drafter_tokenizer: The drafter's, to check the vocabulary with; for a loaded drafter.
            options: What calls run with unless they say otherwise.
            limits: What the engine may take of the machine.
            dtype: ``None`` is float32 on a CPU and the checkpoint's own on an accelerator.
            device_map: As in transformers; ``None`` is the accelerator where there is one.
            quantization_config: As in transformers.
            drafter_dtype: For the drafter.
            drafter_device_map: For the drafter, which may sit on a device of its own.
            drafter_quantization_config: For the drafter; the target quantised is a good one. ``"int8"``, on a
                CPU, needs nothing installed.
            revision: The target's hub revision.
            drafter_revision: The drafter's.
            local_files_only: Never ask the hub.
            chat_template: Whether prompts go through the tokenizer's chat template, where it has one.
            kv_dtype: What both models' keys and values are held in, e.g. ``"bfloat16"``, which in float32
                takes half the memory; :class:`CausalModel` says what it changes. ``None`` is what the models
                compute in.

        Raises:
            UnsupportedModelError: A model's state cannot be rolled back.
            VocabularyMismatchError: The models do not share a vocabulary.
            ConfigurationError: Options contradict each other.
        """
        kv_dtype = kv_dtype_name(kv_dtype)
        spec = ModelSpec(target, dtype, device_map, quantization_config, revision, local_files_only, kv_dtype)
        drafter_spec = None
        special = (drafter_dtype, drafter_device_map, drafter_quantization_config, drafter_revision)
        if drafter is not None or any(value is not None for value in special):
            if drafter is None and spec.loaded:
                raise ConfigurationError(
                    "drafter_* options load the target a second time, but a loaded target was given: pass "
                    "drafter=… too."
                )
            source = target if drafter is None else drafter
            loaded = not isinstance(source, (str, Path))
            drafter_spec = ModelSpec(
                source,
                drafter_dtype if drafter_dtype is not None or loaded else dtype,
                drafter_device_map if drafter_device_map is not None or loaded else device_map,
                drafter_quantization_config,
                drafter_revision if drafter is not None or drafter_revision else revision,
                local_files_only,
                kv_dtype,
            )
            if drafter_spec.key == spec.key:
                drafter_spec = None
        return cls(
            spec,
            drafter_spec,
            tokenizer=tokenizer,
            drafter_tokenizer=drafter_tokenizer,
            retriever=retriever,
            embeddings=embeddings,
            options=options,
            limits=limits,
            chat_template=chat_template,
        )

    @classmethod
    def demo(
        cls,
        *,
        self_speculation: bool = False,
        drafter_quantization_config: Any = None,
        retriever: Any = None,
        embeddings: Any = None,
        limits: EngineLimits | None = None,
        kv_dtype: Any = None,
        **options: Any,
    ) -> RapidPipeline:
        """The bundled, trained pair. It knows only its own little language; real work takes real models.

        Args:
            self_speculation: Let the target draft for itself instead of the smaller drafter.
            drafter_quantization_config: As in :meth:`from_pretrained`.
            retriever: As in :meth:`from_pretrained`.
            embeddings: As in :meth:`from_pretrained`.
            limits: As in :meth:`from_pretrained`.
            kv_dtype: As in :meth:`from_pretrained`.
            **options: Flat options, see :meth:`GenerationOptions.override`.
        """
        from rapid_integrations.demo import DRAFTER_PATH, OPTIONS, TARGET_PATH

        return cls.from_pretrained(
            TARGET_PATH,
            None if self_speculation else DRAFTER_PATH,
            retriever=retriever,
            embeddings=embeddings,
            options=GenerationOptions().override(**{**OPTIONS, **options}),
            limits=limits,
            dtype="float32",
            drafter_quantization_config=drafter_quantization_config,
            local_files_only=True,
            kv_dtype=kv_dtype,
        )

    @property
    def context_window(self) -> int:
        """The most tokens of prompt and answer together that the target reads."""
        return self._engine.target.context_window

    @property
    def engine(self) -> Engine:
        """The engine underneath."""
        return self._engine

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text`` in the target's vocabulary; control strings are plain characters here."""
        return len(encode_plain(text, self.tokenizer))

    def close(self) -> None:
        """Let go of the engine; it ends with its last pipeline. Idempotent."""
        self._finalizer()

    # Answering -------------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: PromptParts | str,
        *,
        options: GenerationOptions | None = None,
        retriever: Any = None,
        drafter_prompt: DrafterPrompt | None = None,
    ) -> Generator[TextEvent]:
        """Answer one prompt, event by event. Closing the iterator cancels the request.

        Args:
            prompt: Parts kept apart, or text that is split as :meth:`PromptParts.from_text` does.
            options: Instead of the pipeline's.
            retriever: Instead of the pipeline's; anything :func:`as_retriever` takes.
            drafter_prompt: Makes the drafter's prompt of the target's tokens, in the place of retrieval; not
                together with a ``retriever``.

        Yields:
            What was retrieved for the drafter (unless nothing is drafted, or ``drafter_prompt`` says what it
            reads), progress, text, and the :class:`Completion` last.

        Raises:
            RapidError: What the prompt, an option or the engine made impossible.
        """
        prepared = self._prepare(prompt, options, retriever, drafter_prompt)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        handle = self._engine.submit(prepared.request, events.put)
        answer = self._answer(prepared)
        try:
            if prepared.retrieved is not None:
                yield prepared.retrieved
            while True:
                for event in answer.take(events.get()):
                    yield event
                    if isinstance(event, Completion):
                        return
        finally:
            handle.cancel()

    async def astream(
        self,
        prompt: PromptParts | str,
        *,
        options: GenerationOptions | None = None,
        retriever: Any = None,
    ) -> AsyncGenerator[TextEvent]:
        """:meth:`stream` for asyncio: the loop is never blocked, cancelling the task cancels the request."""
        prepared = await asyncio.to_thread(self._prepare, prompt, options, retriever)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def put(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        handle = self._engine.submit(prepared.request, put)
        answer = self._answer(prepared)
        try:
            if prepared.retrieved is not None:
                yield prepared.retrieved
            while True:
                for event in answer.take(await events.get()):
                    yield event
                    if isinstance(event, Completion):
                        return
        finally:
            handle.cancel()

    def generate(
        self,
        prompts: Sequence[PromptParts | str],
        *,
        options: GenerationOptions | None = None,
        retriever: Any = None,
        on_event: Callable[[int, TextEvent], None] | None = None,
    ) -> list[Completion]:
        """Answer several prompts together.

        Args:
            prompts: One or more.
            options: Instead of the pipeline's.
            retriever: Instead of the pipeline's.
            on_event: Called with a prompt's index and each of its events, in the calling thread.

        Returns:
            One completion a prompt, in their order.

        Raises:
            RapidError: The first failure; the other requests are cancelled.
        """
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        handles: list[RequestHandle] = []
        answers: list[_Answer] = []
        completions: dict[int, Completion] = {}
        try:
            for index, prompt in enumerate(prompts):
                prepared = self._prepare(prompt, options, retriever)
                answers.append(self._answer(prepared))

                def put(event: Event, index: int = index) -> None:
                    events.put((index, event))

                handles.append(self._engine.submit(prepared.request, put))
                if on_event is not None and prepared.retrieved is not None:
                    on_event(index, prepared.retrieved)
            while len(completions) < len(handles):
                index, engine_event = events.get()
                for event in answers[index].take(engine_event):
                    if on_event is not None:
                        on_event(index, event)
                    if isinstance(event, Completion):
                        completions[index] = event
        finally:
            for handle in handles:
                handle.cancel()
        return [completions[index] for index in range(len(handles))]

    async def agenerate(
        self,
        prompts: Sequence[PromptParts | str],
        *,
        options: GenerationOptions | None = None,
        retriever: Any = None,
        on_event: Callable[[int, TextEvent], Awaitable[None]] | None = None,
    ) -> list[Completion]:
        """:meth:`generate` for asyncio; ``on_event`` is awaited, and holds up its own prompt only."""

        async def complete(index: int, prompt: PromptParts | str) -> Completion:
            async with aclosing(self.astream(prompt, options=options, retriever=retriever)) as events:
                async for event in events:
                    if on_event is not None:
                        await on_event(index, event)
                    if isinstance(event, Completion):
                        return event
            raise AssertionError("a stream ends with its completion or raises")

        tasks = [asyncio.create_task(complete(*item)) for item in enumerate(prompts)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # Preparing -------------------------------------------------------------------------------------------

    def _prepare(
        self,
        prompt: PromptParts | str,
        options: GenerationOptions | None,
        retriever: Any,
        drafter_prompt: DrafterPrompt | None = None,
    ) -> _Prepared:
        """Build both prompts: the target's with the whole context, the drafter's with what is retrieved."""
        options = options or self.options
        parts = PromptParts.from_text(prompt) if isinstance(prompt, str) else prompt
        if retriever is not None and drafter_prompt is not None:
            raise ConfigurationError(
                "retriever and drafter_prompt both say what the drafter reads: give one of them."
            )
        constraint = None
        if options.output_format:  # before all else, for one that cannot be honoured costs nothing then
            constraint = self._constraints.make(options.output_format, tool=parts.forced_tool)
        target_tokens = self.encode(parts)
        drafter_tokens, retrieved = None, None
        if options.speculation.num_draft_tokens != 0:
            if drafter_prompt is not None:
                drafter_tokens = list(drafter_prompt(target_tokens))
            else:
                drafter_tokens, retrieved = self._drafter_prompt(parts, options, retriever)
        stop = options.sampling.stop
        matcher = None
        if stop:
            watcher = TextAssembler(self.tokenizer, stop, visible=parts.visible_controls)

            def matcher(token: int) -> bool:
                watcher.feed([token])
                return watcher.stopped

        request = Request(
            target_tokens,
            drafter_tokens,
            options.sampling,
            options.speculation,
            stop_matcher=matcher,
            timeout_s=options.timeout_s,
            constraint=constraint,
        )
        return _Prepared(request, retrieved, parts.visible_controls)

    def _drafter_prompt(
        self, parts: PromptParts, options: GenerationOptions, retriever: Any
    ) -> tuple[list[int], RetrievedContext]:
        """The drafter's prompt within its window, and what was retrieved for it."""
        own = None if retriever is None else as_retriever(retriever)
        found = self.drafter_context.find(parts.query, parts.context, options.retrieval, retriever=own)
        tokens = self.encode(parts.with_context(found.text))
        drafter = self._engine.drafter or self._engine.target
        excess = len(tokens) + options.sampling.max_new_tokens - drafter.context_window
        if excess <= 0:
            return tokens, found
        # A drafter with a small window: retrieve as much less as the prompt is too long.
        budget = self.count_tokens(found.text) - excess
        if budget <= 0:
            raise ContextLengthError(
                f"the drafter's prompt has {len(tokens):,} tokens; '{drafter.name}' takes "
                f"{drafter.context_window - options.sampling.max_new_tokens:,} "
                f"({drafter.context_window:,} less max_new_tokens={options.sampling.max_new_tokens:,}). "
                "Lower max_new_tokens, shorten the question, or set num_draft_tokens=0."
            )
        smaller = options.override(retrieval_max_tokens=budget).retrieval
        found = self.drafter_context.find(parts.query, parts.context, smaller, retriever=own)
        return self.encode(parts.with_context(found.text)), found

    def encode(self, parts: PromptParts) -> list[int]:
        """The target's prompt tokens, chat template applied; untrusted text makes no control token."""
        return encode_prompt(parts, self.tokenizer, chat_template=self.chat_template)

    def _answer(self, prepared: _Prepared) -> _Answer:
        assembler = TextAssembler(
            self.tokenizer, prepared.request.sampling.stop, visible=prepared.visible_controls
        )
        return _Answer(assembler, prepared.retrieved)
