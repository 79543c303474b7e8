"""What both faces share: the configuration, the pipeline it loads, and a host's call as one request.

Every entry point of both frameworks goes through :meth:`RapidBase._parse_call` and one method of the
pipeline, so that sync, async, streaming and batched answers cannot drift apart.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from rapid_integrations.config import EngineLimits, GenerationOptions
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.hosts.call import OPTION_NAMES, Call, describe_type, identity
from rapid_integrations.hosts.prompt_text import PromptText

if TYPE_CHECKING:
    from rapid_integrations.events import Completion, TextEvent
    from rapid_integrations.pipeline import RapidPipeline
    from rapid_integrations.prompts import PromptParts

DEMO_TARGET = "rapid-integrations/demo-target"
DEMO_DRAFTER = "rapid-integrations/demo-drafter"
"""The names of the packaged pair, which serialize better than the folders they stand for."""

LLM = TypeVar("LLM", bound="RapidBase")

_DEFAULTS = GenerationOptions()
LOADING_NAMES = (
    "target", "drafter", "embeddings", "tokenizer", "drafter_tokenizer", "limits", "dtype", "device_map",
    "quantization_config", "drafter_dtype", "drafter_device_map", "drafter_quantization_config", "revision",
    "drafter_revision", "local_files_only", "chat_template", "kv_dtype",
)  # fmt: skip

# Beside options, fields of one face or another that say how it behaves.
_PLAIN_FIELDS = (
    "name", "system_prompt", "pydantic_program_mode", "tool_format", "streaming", "disable_streaming",
    "output_version",
)  # fmt: skip

# Objects that an answer depends on and JSON cannot hold; those of LlamaIndex are fields of one face only.
_OBJECT_FIELDS = (
    "retriever", "messages_to_prompt", "completion_to_prompt", "output_parser", "query_wrapper_prompt",
)  # fmt: skip

# One lock for all: two threads that ask the same LLM first must not load its models twice.
_loading = threading.RLock()


class PipelineSlot:
    """Where an LLM keeps its pipeline, and with it the loaded models.

    Copies share it, and so do LLMs that LangChain builds anew for a changed field: a field, not a private
    attribute, is what reaches those.
    """

    def __init__(self) -> None:
        self.values: tuple[Any, ...] = ()
        self.pipeline: RapidPipeline | None = None


class RapidBase(BaseModel):
    """The fields of an LLM, and its pipeline, which is loaded when it is first needed.

    The option fields mean what :class:`~rapid_integrations.config.GenerationOptions` says; each can also be
    given to a single call. A test holds names and defaults together. ``tool_format`` says how the model
    writes tool calls: ``"hermes"``, ``"llama3"`` or ``"mistral"``; ``None`` asks its tokenizer.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    target: Any
    drafter: Any = None
    retriever: Any = None
    embeddings: Any = None
    tokenizer: Any = None
    drafter_tokenizer: Any = None
    limits: EngineLimits | None = None
    dtype: str | None = None
    device_map: Any = None
    quantization_config: Any = None
    drafter_dtype: str | None = None
    drafter_device_map: Any = None
    drafter_quantization_config: Any = None
    revision: str | None = None
    drafter_revision: str | None = None
    local_files_only: bool = False
    chat_template: bool = True
    kv_dtype: str | None = None

    temperature: float = _DEFAULTS.sampling.temperature
    top_k: int | None = _DEFAULTS.sampling.top_k
    top_p: float | None = _DEFAULTS.sampling.top_p
    min_p: float | None = _DEFAULTS.sampling.min_p
    repetition_penalty: float = _DEFAULTS.sampling.repetition_penalty
    seed: int | None = _DEFAULTS.sampling.seed
    max_new_tokens: int = _DEFAULTS.sampling.max_new_tokens
    stop: tuple[str, ...] = _DEFAULTS.sampling.stop
    ignore_eos: bool = _DEFAULTS.sampling.ignore_eos
    acceptance: str = _DEFAULTS.speculation.acceptance
    transfer_strength: float = _DEFAULTS.speculation.transfer_strength
    num_draft_tokens: int | None = _DEFAULTS.speculation.num_draft_tokens
    max_draft_tokens: int = _DEFAULTS.speculation.max_draft_tokens
    tail_rule: str = _DEFAULTS.speculation.tail_rule
    adaptive_transfer: bool = _DEFAULTS.speculation.adaptive_transfer
    mixture_weight: float = _DEFAULTS.speculation.mixture_weight
    retrieval_chunk_tokens: int = _DEFAULTS.retrieval.chunk_tokens
    retrieval_min_tokens: int = _DEFAULTS.retrieval.min_tokens
    retrieval_max_tokens: int | None = _DEFAULTS.retrieval.max_tokens
    retrieval_context_divisor: float = _DEFAULTS.retrieval.context_divisor
    retrieval_min_score: float | None = _DEFAULTS.retrieval.min_score
    retrieval_timeout_s: float = _DEFAULTS.retrieval.timeout_s
    json_schema: str | None = _DEFAULTS.output_format.json_schema
    regex: str | None = _DEFAULTS.output_format.regex
    choices: tuple[str, ...] | None = _DEFAULTS.output_format.choices
    timeout_s: float | None = _DEFAULTS.timeout_s

    system_prompt: str | None = Field(default=None)
    tool_format: str | None = None

    _own_arguments: ClassVar[tuple[str, ...]] = ()  # of calls, which a face reads itself

    pipeline_slot: PipelineSlot = Field(default_factory=PipelineSlot, exclude=True, repr=False)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        # Loaded models print all their layers, so only names and what is not a default.
        yield "target", self.model_name
        for name, value in changed_loading({n: getattr(self, n) for n in ("drafter", "retriever")}).items():
            yield name, value if isinstance(value, str) else type(value).__name__
        for name in sorted(OPTION_NAMES):
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                yield name, value

    @property
    def model_name(self) -> str:
        """The target's name: its hub id or folder, or what the loaded model calls itself."""
        if isinstance(self.target, str):
            return self.target
        named = getattr(getattr(self.target, "config", None), "_name_or_path", "") or getattr(
            self.target, "name", ""
        )
        return str(named or type(self.target).__name__)

    @property
    def options(self) -> GenerationOptions:
        """What a call runs with unless it says otherwise.

        Raises:
            ConfigurationError: A field was assigned a value that is out of range.
        """
        return _DEFAULTS.override(**{name: getattr(self, name) for name in OPTION_NAMES})

    @property
    def pipeline(self) -> RapidPipeline:
        """The pipeline behind this LLM. The first use loads the models, or finds them loaded."""
        values = tuple(getattr(self, name) for name in LOADING_NAMES)
        with _loading:
            if self.pipeline_slot.pipeline is not None and not _same(self.pipeline_slot.values, values):
                self.pipeline_slot = PipelineSlot()  # the old one may serve others
            slot = self.pipeline_slot
            if slot.pipeline is None:
                slot.values, slot.pipeline = values, self._load()
            return slot.pipeline

    def _load(self) -> RapidPipeline:
        if is_pipeline(self.target):
            loaded: RapidPipeline = self.target
            return loaded
        from rapid_integrations.pipeline import RapidPipeline

        arguments = {name: getattr(self, name) for name in LOADING_NAMES}
        target, drafter = (_packaged(arguments.pop(name)) for name in ("target", "drafter"))
        return RapidPipeline.from_pretrained(target, drafter, options=self.options, **arguments)

    def _parse_call(self, arguments: Mapping[str, Any], stop: Any = None) -> Call:
        """The meaning of a call's keyword arguments; ``stop=None`` is this LLM's own.

        Raises:
            ConfigurationError: An argument is unknown, given twice, or out of range.
        """
        return Call.parse(
            arguments,
            options=self.options,
            retriever=self.retriever,
            stop=stop,
            elsewhere=self._own_arguments,
        )

    def _parts(self, prompt: Any, call: Call) -> PromptParts:
        """The prompt of one request: a text here, what the face hands on in general."""
        text = prompt if isinstance(prompt, PromptText) else PromptText(prompt)
        return text.parts(query=call.query, context=call.context, system_prompt=self.system_prompt)

    def _events(self, prompt: Any, call: Call) -> Generator[TextEvent]:
        """One request's events. Closing the generator cancels the request."""
        with closing(self.pipeline.stream(self._parts(prompt, call), **call.arguments())) as events:
            for event in events:
                call.emit(event)
                yield event

    async def _aevents(self, prompt: Any, call: Call) -> AsyncGenerator[TextEvent]:
        """One request's events. Closing the generator, or cancelling its task, cancels the request."""
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
        """Several requests' answers, decoded together."""

        def hear(index: int, event: TextEvent) -> None:
            call.emit(event)
            if on_event is not None:
                on_event(index, event)

        parts = [self._parts(prompt, call) for prompt in prompts]
        return self.pipeline.generate(parts, on_event=hear, **call.arguments())

    async def _acomplete(
        self,
        prompts: Sequence[Any],
        call: Call,
        *,
        on_event: Callable[[int, TextEvent], Awaitable[None]] | None = None,
    ) -> list[Completion]:
        """Several requests' answers, decoded together; if one fails the others are cancelled."""

        async def hear(index: int, event: TextEvent) -> None:
            call.emit(event)
            if on_event is not None:
                await on_event(index, event)

        pipeline, parts = await asyncio.to_thread(self._prepare, prompts, call)
        return await pipeline.agenerate(parts, on_event=hear, **call.arguments())

    def _prepare(self, prompts: Sequence[Any], call: Call) -> tuple[RapidPipeline, list[PromptParts]]:
        """What asynchronous calls do off the loop: load models, take long prompts apart."""
        return self.pipeline, [self._parts(prompt, call) for prompt in prompts]

    def _loading_data(self) -> dict[str, Any]:
        """The fields that say what to load and what to ask, where set, as plain data where they can be."""
        data = changed_loading({name: getattr(self, name) for name in LOADING_NAMES})
        for name in _OBJECT_FIELDS:
            value, field = getattr(self, name, None), type(self).model_fields.get(name)
            if value is not None and field is not None and value is not field.default:
                data[name] = value
        for name, value in data.items():
            if isinstance(value, EngineLimits):
                data[name] = dataclasses.asdict(value)
            elif name.endswith("quantization_config") and hasattr(value, "to_dict"):
                data[name] = value.to_dict()
        return data

    def to_config(self) -> dict[str, Any]:
        """The constructor arguments that rebuild this LLM, as plain data without weights.

        Raises:
            ConfigurationError: It holds an object (a loaded model, a retriever, …) that JSON cannot.
        """
        config = self._loading_data()
        for name, value in config.items():
            if not isinstance(value, (str, int, float, Mapping)):
                raise ConfigurationError(
                    f"{name} is {describe_type(value)}, which JSON cannot hold: an LLM is serializable when "
                    "target and drafter are hub ids or folders, embeddings is a name, retriever is given to "
                    "calls, and no prompt function, output parser or wrapper is set."
                )
        config |= {name: getattr(self, name) for name in sorted(OPTION_NAMES)}
        config["stop"] = list(self.stop)
        if self.choices is not None:
            config["choices"] = list(self.choices)
        for name in _PLAIN_FIELDS:
            field = type(self).model_fields.get(name)
            if field is not None:
                value = getattr(self, name)
                if value != field.get_default(call_default_factory=True):
                    config[name] = value
        return config

    def describe(self) -> dict[str, Any]:
        """Everything an answer depends on beside the call, as plain data; objects by their identity."""
        return {
            "model_name": self.model_name,
            **{name: identity(value) for name, value in self._loading_data().items()},
            **{name: getattr(self, name) for name in sorted(OPTION_NAMES)},
            "stop": list(self.stop),
            "system_prompt": self.system_prompt,
            "tool_format": self.tool_format,
        }


def changed_loading(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The loading arguments that differ from their defaults."""
    fields = RapidBase.model_fields
    return {
        name: value
        for name, value in arguments.items()
        if name in (*LOADING_NAMES, "retriever") and value is not fields[name].default and value is not None
    }


def is_pipeline(target: Any) -> bool:
    """Whether ``target`` is a pipeline; asked without importing it, for that loads torch."""
    return hasattr(target, "agenerate") and hasattr(target, "astream")


def check_llm(llm: Any, kind: type[LLM], owner: str, needed: str = "a RapidLLM") -> LLM:
    """``llm``, if it is of a ``kind`` that ``owner`` can work with.

    Raises:
        ConfigurationError: It is not.
    """
    if not isinstance(llm, kind):
        raise ConfigurationError(
            f"llm is {describe_type(llm)}: {owner} needs {needed}, which keeps a document and what was "
            "retrieved from it apart."
        )
    return llm


def usage(completion: Completion) -> dict[str, int]:
    """Token counts under the names both frameworks' counters know."""
    prompt, answer = completion.stats.prompt_tokens, completion.stats.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    # Plain data by value, anything else by identity: a loaded model's == may be costly or no bool.
    return all(a is b or (isinstance(a, (str, bool, Mapping, EngineLimits)) and a == b)
               for a, b in zip(left, right, strict=True))  # fmt: skip


def _packaged(name: Any) -> Any:
    if name not in (DEMO_TARGET, DEMO_DRAFTER):
        return name
    from rapid_integrations.demo import DRAFTER_PATH, TARGET_PATH

    return TARGET_PATH if name == DEMO_TARGET else DRAFTER_PATH
