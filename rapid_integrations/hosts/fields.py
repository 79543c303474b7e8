"""The fields of an LLM, and their stored form.

Both frameworks require pydantic models, so every loading option and every generation option is a pydantic
field here. :class:`~rapid_integrations.loading_options.LoadingOptions` and
:class:`~rapid_integrations.config.GenerationOptions` define and validate them; a test compares names and
defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from rapid_integrations.config import EngineLimits, GenerationOptions
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.hosts.call import OPTION_NAMES, describe_type, identity
from rapid_integrations.loading_options import LoadingOptions

LOADING_NAMES = LoadingOptions.names()

# The frameworks' base classes have many fields (callbacks, caches, tags, …). A stored configuration has only
# those that change an answer or its delivery and that JSON can hold. Not every LLM class has all of them.
_STORED_FIELDS = (
    "name", "system_prompt", "pydantic_program_mode", "tool_format", "streaming", "disable_streaming",
    "output_version",
)  # fmt: skip

# Objects that an answer depends on and that JSON cannot hold: an LLM that has one is not serializable, and
# a cache distinguishes them by identity. Not every LLM class has all of them.
_OBJECT_FIELDS = (
    "retriever", "messages_to_prompt", "completion_to_prompt", "output_parser", "query_wrapper_prompt",
)  # fmt: skip

_DEFAULTS = GenerationOptions()


class RapidFields(BaseModel):
    """The fields of an LLM.

    The first group are the loading options, see :class:`~rapid_integrations.loading_options.LoadingOptions`.
    The second group are the generation options, see :class:`~rapid_integrations.config.GenerationOptions`;
    each of them is also an argument of a single call.

    Attributes:
        retriever: Finds the drafter's context; ``None`` ranks chunks of the prompt's own context.
        system_prompt: Becomes the first message of prompts that have no system message.
        tool_format: How the model writes tool calls: ``"hermes"``, ``"llama3"`` or ``"mistral"``; ``None``
            detects it from the tokenizer.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    target: Any
    drafter: Any = None
    embeddings: Any = None
    tokenizer: Any = None
    drafter_tokenizer: Any = None
    limits: EngineLimits | None = None
    dtype: Any = None
    device_map: Any = None
    quantization_config: Any = None
    drafter_dtype: Any = None
    drafter_device_map: Any = None
    drafter_quantization_config: Any = None
    revision: str | None = None
    drafter_revision: str | None = None
    local_files_only: bool = False
    chat_template: bool = True
    kv_dtype: str | None = None
    gguf_file: str | None = None
    drafter_gguf_file: str | None = None

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

    retriever: Any = None
    system_prompt: str | None = Field(default=None)
    tool_format: str | None = None

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        # Names, and the options that differ from their defaults: a loaded model would print all its layers.
        yield "target", self.model_name
        for name in ("drafter", "retriever"):
            if (value := getattr(self, name)) is not None:
                yield name, value if isinstance(value, str) else type(value).__name__
        for name in sorted(OPTION_NAMES):
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                yield name, value

    @property
    def model_name(self) -> str:
        """The target's name: its hub id or path, or the name that a loaded model has."""
        if isinstance(self.target, str):
            return self.target
        path = getattr(getattr(self.target, "config", None), "_name_or_path", "")
        return str(path or getattr(self.target, "name", "") or type(self.target).__name__)

    @property
    def options(self) -> GenerationOptions:
        """The default options of a call.

        Raises:
            ConfigurationError: A field was assigned a value that is not allowed.
        """
        return _DEFAULTS.override(**{name: getattr(self, name) for name in OPTION_NAMES})

    def to_config(self) -> dict[str, Any]:
        """The constructor arguments that rebuild this LLM, as plain data without weights.

        Raises:
            ConfigurationError: The LLM has an object (a loaded model, a retriever, …) that JSON cannot hold.
        """
        config = self._loading_config()
        for name, value in config.items():
            if not isinstance(value, (str, int, float, Mapping)):
                raise ConfigurationError(
                    f"{name} is {describe_type(value)}, which JSON cannot hold: an LLM is serializable when "
                    "target and drafter are hub ids or paths, embeddings is a name, retriever is given to "
                    "calls, and no prompt function, output parser or wrapper is set."
                )
        config |= {name: getattr(self, name) for name in sorted(OPTION_NAMES)}
        config["stop"] = list(self.stop)
        if self.choices is not None:
            config["choices"] = list(self.choices)
        for name in _STORED_FIELDS:
            field = type(self).model_fields.get(name)
            if field is not None:
                value = getattr(self, name)
                if value != field.get_default(call_default_factory=True):
                    config[name] = value
        return config

    def describe(self) -> dict[str, Any]:
        """Everything that an answer depends on except the call, as plain data; objects by their identity."""
        return {
            "model_name": self.model_name,
            **{name: identity(value) for name, value in self._loading_config().items()},
            **{name: getattr(self, name) for name in sorted(OPTION_NAMES)},
            "stop": list(self.stop),
            "system_prompt": self.system_prompt,
            "tool_format": self.tool_format,
        }

    def _loading_config(self) -> dict[str, Any]:
        """Loading options and objects that differ from their defaults, as plain data where possible."""
        config = LoadingOptions.changed({name: getattr(self, name) for name in LOADING_NAMES})
        for name in _OBJECT_FIELDS:
            value, field = getattr(self, name, None), type(self).model_fields.get(name)
            if value is not None and field is not None and value is not field.default:
                config[name] = value
        for name, value in config.items():
            if isinstance(value, EngineLimits):
                config[name] = dataclasses.asdict(value)
            elif name.endswith("quantization_config") and hasattr(value, "to_dict"):
                config[name] = value.to_dict()
        return config
