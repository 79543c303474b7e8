"""The pipeline: a prompt in, text events out, with retrieval and the engine and without a host framework.

Every entry point of both frameworks calls :meth:`RapidPipeline.stream`, ``astream``, ``generate`` or
``agenerate``. Each of the four takes the same steps: ``_prepare`` parses the prompt, retrieves the drafter's
context, and encodes both models' prompts into one engine request; the engine decodes;
:class:`~rapid_integrations.answer.Answer` turns the engine's events into text events.
"""

from __future__ import annotations

import asyncio
import queue
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from rapid_integrations.answer import Answer, stop_matcher
from rapid_integrations.config import EngineLimits, GenerationOptions
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.requests import Event, Request, RequestHandle
from rapid_integrations.errors import ConfigurationError, ContextLengthError
from rapid_integrations.events import Completion, TextEvent
from rapid_integrations.loading import ENGINES, check_same_vocabulary, model_specs
from rapid_integrations.loading_options import LoadingOptions, show_loading_options
from rapid_integrations.prompts import PromptParts, encode_prompt
from rapid_integrations.retrieval import DrafterContext, RetrievedContext, Retriever, as_retriever
from rapid_integrations.structured.grammar import OutputConstraints
from rapid_integrations.tokenization.encoding import encode_plain
from rapid_integrations.tokenization.streaming import TextAssembler
from rapid_integrations.validation import refuse_unknown

DrafterPrompt = Callable[[Sequence[int]], Sequence[int]]
"""A function from the target's prompt tokens to the drafter's."""


class RapidPipeline:
    """A target, a drafter and a retriever that answer prompts.

    Make one with :meth:`from_pretrained` or :meth:`demo`. Pipelines can be used from any thread. Those over
    the same models share one engine, so that a further pipeline takes no memory for weights.

    Args:
        loading: The models, and how to load them.
        retriever: Finds the drafter's context; ``None`` ranks chunks of the prompt's own context.
        options: The default options of a call.

    Attributes:
        name: The target's name.
        tokenizer: The target's tokenizer.
        options: The default options of a call.
        chat_template: Whether prompts go through the tokenizer's chat template, if it has one.
        drafter_context: Finds the drafter's context.
    """

    def __init__(
        self, loading: LoadingOptions, *, retriever: Any = None, options: GenerationOptions | None = None
    ) -> None:
        target, drafter = model_specs(loading)
        self.tokenizer = loading.tokenizer or target.load_tokenizer()
        if drafter is not None and (loading.drafter_tokenizer is not None or not drafter.loaded):
            check_same_vocabulary(self.tokenizer, loading.drafter_tokenizer or drafter.load_tokenizer())
        self.options = options or GenerationOptions()
        self.chat_template = loading.chat_template
        self.drafter_context = DrafterContext(
            tokenizer=self.tokenizer, retriever=_as_retriever(retriever), embeddings=loading.embeddings
        )
        self._engine, release = ENGINES.acquire(target, drafter, loading.limits or EngineLimits())
        self.name = self._engine.target.name
        self._constraints = OutputConstraints(
            self.tokenizer, self._engine.target.eos_token_ids, self._engine.vocab_size
        )
        self._finalizer = weakref.finalize(self, release)

    @classmethod
    @show_loading_options
    def from_pretrained(
        cls,
        target: Any,
        drafter: Any = None,
        *,
        retriever: Any = None,
        options: GenerationOptions | None = None,
        **loading: Any,
    ) -> RapidPipeline:
        """Load models by name, safetensors or GGUF only and without remote code, or use loaded ones.

        Args:
            target: Hub id, folder, GGUF file or loaded model: it reads the whole prompt and decides.
            drafter: The same for the drafter, of any size, with the target's vocabulary. ``None`` lets the
                target draft for itself.
            retriever: Finds the drafter's context: a retriever, vector store or index of either framework, or
                a callable from a query to chunks. ``None`` ranks chunks of the prompt's own context.
            options: The default options of a call.
            **loading: The other fields of :class:`LoadingOptions`, which describes them: ``embeddings``,
                ``tokenizer``, ``drafter_tokenizer``, ``limits``, ``dtype``, ``device_map``,
                ``quantization_config``, ``drafter_dtype``, ``drafter_device_map``,
                ``drafter_quantization_config``, ``revision``, ``drafter_revision``, ``local_files_only``,
                ``chat_template``, ``kv_dtype``, ``gguf_file`` and ``drafter_gguf_file``.

        Raises:
            UnsupportedModelError: A model's state cannot be rolled back.
            VocabularyMismatchError: The models do not share a vocabulary.
            ConfigurationError: An option is unknown, not allowed, or contradicts another.
            OSError: A model or a tokenizer is not found.
        """
        refuse_unknown(
            loading, {*LoadingOptions.names(), "retriever", "options"}, f"{cls.__name__}.from_pretrained"
        )
        return cls(LoadingOptions(target, drafter, **loading), retriever=retriever, options=options)

    @classmethod
    def demo(
        cls,
        *,
        self_speculation: bool = False,
        drafter_quantization_config: Any = None,
        retriever: Any = None,
        embeddings: Any = None,
        limits: EngineLimits | Mapping[str, Any] | None = None,
        kv_dtype: Any = None,
        **options: Any,
    ) -> RapidPipeline:
        """The bundled pair of small trained models, which knows only the language of its demo documents.

        Args:
            self_speculation: Let the target draft for itself instead of the smaller drafter.
            drafter_quantization_config: As in :meth:`from_pretrained`.
            retriever: As in :meth:`from_pretrained`.
            embeddings: As in :meth:`from_pretrained`.
            limits: As in :meth:`from_pretrained`.
            kv_dtype: As in :meth:`from_pretrained`.
            **options: Flat generation options, as in :meth:`GenerationOptions.override`.

        Raises:
            ConfigurationError: An option is unknown or not allowed.
        """
        from rapid_integrations.demo import DRAFTER_PATH, OPTIONS, TARGET_PATH

        return cls.from_pretrained(
            TARGET_PATH,
            None if self_speculation else DRAFTER_PATH,
            retriever=retriever,
            options=GenerationOptions().override(**{**OPTIONS, **options}),
            embeddings=embeddings,
            limits=limits,
            dtype="float32",
            drafter_quantization_config=drafter_quantization_config,
            local_files_only=True,
            kv_dtype=kv_dtype,
        )

    @property
    def context_window(self) -> int:
        """The maximum number of tokens of prompt and answer together, for the target."""
        return self._engine.target.context_window

    @property
    def engine(self) -> Engine:
        """The engine, which other pipelines may share."""
        return self._engine

    def count_tokens(self, text: str) -> int:
        """The number of tokens of ``text`` for the target; control strings count as plain text."""
        return len(encode_plain(text, self.tokenizer))

    def encode(self, parts: PromptParts) -> list[int]:
        """The prompt's tokens, chat template applied; untrusted text makes no control token."""
        return encode_prompt(parts, self.tokenizer, chat_template=self.chat_template)

    def close(self) -> None:
        """Release the engine; the last pipeline that does so closes it. Idempotent."""
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
        """Answer one prompt, event by event. Closing the generator cancels the request.

        Args:
            prompt: A prompt in parts, or text, which is parsed by :meth:`PromptParts.from_text`.
            options: The options of this call; ``None`` uses the pipeline's.
            retriever: The retriever of this call, in any form that :func:`as_retriever` accepts; ``None``
                uses the pipeline's.
            drafter_prompt: Makes the drafter's prompt from the target's tokens, in place of retrieval. Not
                together with ``retriever``.

        Yields:
            The retrieved context (except where nothing is drafted or ``drafter_prompt`` is given), the
            progress of the prefill, the text, and the :class:`Completion` last.

        Raises:
            RapidError: The prompt, an option or the engine made an answer impossible.
        """
        answer = self._prepare(prompt, options, retriever, drafter_prompt)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        handle = self._engine.submit(answer.request, events.put)
        try:
            yield from answer.first_events
            while answer.completion is None:
                yield from answer.text_events(events.get())
        finally:
            handle.cancel()

    async def astream(
        self,
        prompt: PromptParts | str,
        *,
        options: GenerationOptions | None = None,
        retriever: Any = None,
    ) -> AsyncGenerator[TextEvent]:
        """:meth:`stream` for asyncio. It never blocks the loop; cancelling its task cancels the request."""
        answer = await asyncio.to_thread(self._prepare, prompt, options, retriever)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def put(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        handle = self._engine.submit(answer.request, put)
        try:
            for event in answer.first_events:
                yield event
            while answer.completion is None:
                for event in answer.text_events(await events.get()):
                    yield event
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
        """Answer several prompts together, in one batch of the engine.

        Args:
            prompts: The prompts, as in :meth:`stream`.
            options: As in :meth:`stream`.
            retriever: As in :meth:`stream`.
            on_event: Called with a prompt's index and each of its events, in the calling thread.

        Returns:
            One completion for each prompt, in their order.

        Raises:
            RapidError: The first failure; the other requests are cancelled.
        """
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        answers: list[Answer] = []
        handles: list[RequestHandle] = []
        completions: dict[int, Completion] = {}

        def report(index: int, text_events: Sequence[TextEvent]) -> None:
            for event in text_events:
                if on_event is not None:
                    on_event(index, event)

        def put(index: int, event: Event) -> None:
            events.put((index, event))

        try:
            for index, prompt in enumerate(prompts):
                answers.append(self._prepare(prompt, options, retriever))
                handles.append(self._engine.submit(answers[index].request, partial(put, index)))
                report(index, answers[index].first_events)
            while len(completions) < len(answers):
                index, engine_event = events.get()
                report(index, answers[index].text_events(engine_event))
                if (completion := answers[index].completion) is not None:
                    completions[index] = completion
        finally:
            for handle in handles:
                handle.cancel()
        return [completions[index] for index in range(len(answers))]

    async def agenerate(
        self,
        prompts: Sequence[PromptParts | str],
        *,
        options: GenerationOptions | None = None,
        retriever: Any = None,
        on_event: Callable[[int, TextEvent], Awaitable[None]] | None = None,
    ) -> list[Completion]:
        """:meth:`generate` for asyncio. ``on_event`` is awaited and delays its own prompt's events only."""

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
    ) -> Answer:
        """Make the engine's request: parse the prompt, retrieve, and encode both models' prompts."""
        options = options or self.options
        parts = PromptParts.from_text(prompt) if isinstance(prompt, str) else prompt
        if retriever is not None and drafter_prompt is not None:
            raise ConfigurationError(
                "retriever and drafter_prompt both decide the drafter's prompt: give one of them."
            )
        constraint = None
        if options.output_format:  # first, because an impossible format must not cost a retrieval
            constraint = self._constraints.make(options.output_format, tool=parts.forced_tool)

        target_tokens = self.encode(parts)
        drafter_tokens: Sequence[int] | None = None
        retrieved: RetrievedContext | None = None
        if options.speculation.num_draft_tokens != 0:
            if drafter_prompt is not None:
                drafter_tokens = list(drafter_prompt(target_tokens))
            else:
                drafter_tokens, retrieved = self._retrieve(parts, options, _as_retriever(retriever))

        speculation = options.speculation
        nothing_found = retrieved is not None and (not retrieved.chunks or retrieved.fallback is not None)
        if speculation.acceptance == "augmented" and (nothing_found or drafter_tokens == target_tokens):
            # The drafter has read nothing that retrieval knows: it may propose, and must not steer.
            speculation = replace(speculation, acceptance="lossless")
        stop, visible = options.sampling.stop, parts.visible_controls
        request = Request(
            target_tokens,
            drafter_tokens,
            options.sampling,
            speculation,
            stop_matcher=stop_matcher(self.tokenizer, stop, visible),
            timeout_s=options.timeout_s,
            constraint=constraint,
        )
        return Answer(request, retrieved, TextAssembler(self.tokenizer, stop, visible=visible))

    def _retrieve(
        self, parts: PromptParts, options: GenerationOptions, retriever: Retriever | None
    ) -> tuple[list[int], RetrievedContext]:
        """Find the drafter's context, and encode the prompt with it in place of the document.

        Raises:
            ContextLengthError: The drafter's context window is too small even without retrieved text.
        """
        find = partial(self.drafter_context.find, parts.query, parts.context, retriever=retriever)
        found = find(options.retrieval)
        tokens = self.encode(parts.with_context(found.text))
        drafter = self._engine.drafter or self._engine.target
        excess = len(tokens) + options.sampling.max_new_tokens - drafter.context_window
        if excess <= 0:
            return tokens, found
        # The drafter's window is too small: retrieve fewer tokens, by as many as the prompt is too long.
        budget = self.count_tokens(found.text) - excess
        if budget <= 0:
            raise ContextLengthError(
                f"the drafter's prompt has {len(tokens):,} tokens; '{drafter.name}' takes "
                f"{drafter.context_window - options.sampling.max_new_tokens:,} "
                f"({drafter.context_window:,} less max_new_tokens={options.sampling.max_new_tokens:,}). "
                "Lower max_new_tokens, shorten the question, or set num_draft_tokens=0."
            )
        found = find(options.override(retrieval_max_tokens=budget).retrieval)
        return self.encode(parts.with_context(found.text)), found


def _as_retriever(retriever: Any) -> Retriever | None:
    return None if retriever is None else as_retriever(retriever)
