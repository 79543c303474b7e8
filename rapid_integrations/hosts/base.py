"""An LLM's pipeline and its calls, for both frameworks.

Every entry point of both frameworks goes through :meth:`RapidBase._parse_call` and one of four methods
(``_events``, ``_aevents``, ``_complete``, ``_acomplete``), each of which makes one call of the pipeline.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field

from rapid_integrations.config import EngineLimits
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.hosts.call import Call, describe_type
from rapid_integrations.hosts.fields import LOADING_NAMES, RapidFields
from rapid_integrations.hosts.prompt_text import PromptText

if TYPE_CHECKING:
    from rapid_integrations.events import Completion, TextEvent
    from rapid_integrations.pipeline import RapidPipeline
    from rapid_integrations.prompts import PromptParts

DEMO_TARGET = "rapid-integrations/demo-target"
DEMO_DRAFTER = "rapid-integrations/demo-drafter"
"""The names of the bundled pair. A stored configuration has them instead of the folders of one machine."""

LLM = TypeVar("LLM", bound="RapidBase")

# One lock for all LLMs: if two threads use an LLM for the first time at once, its models load only once.
_loading = threading.RLock()


class PipelineSlot:
    """Holds an LLM's pipeline, which holds the loaded models.

    Copies of an LLM share the slot. It is a pydantic field, because LangChain rebuilds an LLM from its fields
    when a configurable field changes, and private attributes would be lost.

    Attributes:
        values: The loading options that the pipeline was made from.
        pipeline: The pipeline; ``None`` until the first use.
    """

    def __init__(self) -> None:
        self.values: tuple[Any, ...] = ()
        self.pipeline: RapidPipeline | None = None


class RapidBase(RapidFields):
    """The fields of an LLM, its pipeline, and calls of the pipeline.

    The classes for each framework inherit from this class and from the framework's own base class. It has no
    constructor of its own; that is in :class:`~rapid_integrations.hosts.model.RapidModel`, the first base of
    the public classes.
    """

    # Arguments of calls that a subclass reads itself.
    _own_arguments: ClassVar[tuple[str, ...]] = ()

    pipeline_slot: PipelineSlot = Field(default_factory=PipelineSlot, exclude=True, repr=False)

    # Loading

    @property
    def pipeline(self) -> RapidPipeline:
        """This LLM's pipeline. The first use loads the models, unless another pipeline has loaded them."""
        values = tuple(getattr(self, name) for name in LOADING_NAMES)
        with _loading:
            if self.pipeline_slot.pipeline is not None and not _same(self.pipeline_slot.values, values):
                self.pipeline_slot = PipelineSlot()  # copies of this LLM may still use the old one
            slot = self.pipeline_slot
            if slot.pipeline is None:
                slot.values, slot.pipeline = values, self._load()
            return slot.pipeline

    def _load(self) -> RapidPipeline:
        if is_pipeline(self.target):
            pipeline: RapidPipeline = self.target
            return pipeline
        from rapid_integrations.pipeline import RapidPipeline

        loading = {name: getattr(self, name) for name in LOADING_NAMES}
        target, drafter = (_demo_path(loading.pop(name)) for name in ("target", "drafter"))
        return RapidPipeline.from_pretrained(target, drafter, options=self.options, **loading)

    # Calls

    def _parse_call(self, arguments: Mapping[str, Any], stop: Any = None) -> Call:
        """Parse a call's keyword arguments; ``stop=None`` leaves this LLM's stop strings.

        Raises:
            ConfigurationError: An argument is unknown, given twice, or not allowed.
        """
        return Call.parse(
            arguments,
            options=self.options,
            retriever=self.retriever,
            stop=stop,
            ignored=self._own_arguments,
        )

    def _parts(self, prompt: Any, call: Call) -> PromptParts:
        """The prompt of one request in parts; ``prompt`` is a text here, and may be more in a subclass."""
        text = prompt if isinstance(prompt, PromptText) else PromptText(prompt)
        return text.parts(query=call.query, context=call.context, system_prompt=self.system_prompt)

    def _prepare(self, prompts: Sequence[Any], call: Call) -> tuple[RapidPipeline, list[PromptParts]]:
        """The slow part of a call, which asynchronous calls run in a thread: load models, parse prompts."""
        return self.pipeline, [self._parts(prompt, call) for prompt in prompts]

    def _events(self, prompt: Any, call: Call) -> Generator[TextEvent]:
        """The events of one request. Closing the generator cancels the request."""
        with closing(self.pipeline.stream(self._parts(prompt, call), **call.arguments())) as events:
            for event in events:
                call.emit(event)
                yield event

    async def _aevents(self, prompt: Any, call: Call) -> AsyncGenerator[TextEvent]:
        """The events of one request. Closing the generator, or cancelling its task, cancels the request."""
        pipeline, (parts,) = await asyncio.to_thread(self._prepare, [prompt], call)
        async with aclosing(pipeline.astream(parts, **call.arguments())) as events:
            async for event in events:
                call.emit(event)
                yield event

    def _complete(
        self,
        prompts: Sequence[Any],
        call: Call,
        *,
        on_event: Callable[[int, TextEvent], None] | None = None,
    ) -> list[Completion]:
        """The answers of several requests, decoded together."""

        def forward(index: int, event: TextEvent) -> None:
            call.emit(event)
            if on_event is not None:
                on_event(index, event)

        pipeline, parts = self._prepare(prompts, call)
        return pipeline.generate(parts, on_event=forward, **call.arguments())

    async def _acomplete(
        self,
        prompts: Sequence[Any],
        call: Call,
        *,
        on_event: Callable[[int, TextEvent], Awaitable[None]] | None = None,
    ) -> list[Completion]:
        """The answers of several requests, decoded together; if one fails the others are cancelled."""

        async def forward(index: int, event: TextEvent) -> None:
            call.emit(event)
            if on_event is not None:
                await on_event(index, event)

        pipeline, parts = await asyncio.to_thread(self._prepare, prompts, call)
        return await pipeline.agenerate(parts, on_event=forward, **call.arguments())


def is_pipeline(target: Any) -> bool:
    """Whether ``target`` is a pipeline; recognised by its methods, because importing the class is slow."""
    return hasattr(target, "agenerate") and hasattr(target, "astream")


def check_llm(llm: Any, kind: type[LLM], owner: str, needed: str = "a RapidLLM") -> LLM:
    """Return ``llm`` if it is of the ``kind`` that ``owner`` needs.

    Raises:
        ConfigurationError: It is of another kind.
    """
    if not isinstance(llm, kind):
        raise ConfigurationError(
            f"llm is {describe_type(llm)}: {owner} needs {needed}, which keeps a document and what was "
            "retrieved from it apart."
        )
    return llm


def usage(completion: Completion) -> dict[str, int]:
    """Token counts under the names that both frameworks' token counters read."""
    prompt, answer = completion.stats.prompt_tokens, completion.stats.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    # Plain data is compared by value, objects by identity: == of a loaded model may be slow or no bool.
    return all(a is b or (isinstance(a, (str, bool, Mapping, EngineLimits)) and a == b)
               for a, b in zip(left, right, strict=True))  # fmt: skip


def _demo_path(name: Any) -> Any:
    """The folder of a bundled model; any other ``name`` unchanged."""
    if name not in (DEMO_TARGET, DEMO_DRAFTER):
        return name
    from rapid_integrations.demo import DRAFTER_PATH, TARGET_PATH

    return TARGET_PATH if name == DEMO_TARGET else DRAFTER_PATH
