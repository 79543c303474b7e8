"""What every face's class can do: be made, copied and pickled, without its models being copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import ConfigDict

from rapid_integrations.config import EngineLimits
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.hosts.arguments import check_update, prepare_arguments
from rapid_integrations.hosts.base import DEMO_DRAFTER, DEMO_TARGET, RapidBase


class RapidModel(RapidBase):
    """How :class:`~rapid_integrations.RapidLLM` and :class:`~rapid_integrations.ChatRapid` are made."""

    model_config = ConfigDict(
        extra="forbid", populate_by_name=True, arbitrary_types_allowed=True, protected_namespaces=()
    )

    def __init__(self, target: Any = None, drafter: Any = None, **kwargs: Any) -> None:
        given = {"target": target, "drafter": drafter, **kwargs}
        super().__init__(**prepare_arguments(given, _argument_names(type(self)), type(self).__name__))

    @classmethod
    def from_pretrained(
        cls,
        target: Any,
        drafter: Any = None,
        *,
        retriever: Any = None,
        embeddings: Any = None,
        tokenizer: Any = None,
        drafter_tokenizer: Any = None,
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
        limits: EngineLimits | None = None,
        **options: Any,
    ) -> Self:
        """An LLM over models in transformers' format.

        Args:
            target: The model whose answers these are: a hub id, a folder, or a loaded model.
            drafter: The model that proposes tokens, with the same vocabulary; ``None`` lets the target draft.
            retriever: Finds what the drafter reads: a LangChain or LlamaIndex retriever, vector store or
                index, or a callable from a query to chunks. ``None`` searches the prompt's own context.
            embeddings: A LangChain or LlamaIndex embedding model, or a sentence-transformers name, for
                searching the prompt's own context; ``None`` searches by words.
            tokenizer: The target's tokenizer; required with a loaded target.
            drafter_tokenizer: The drafter's, to check the vocabulary with; for a loaded drafter.
            dtype: As transformers takes it; likewise ``device_map`` and ``quantization_config``, and the
                three of the drafter.
            device_map: See ``dtype``.
            quantization_config: See ``dtype``.
            drafter_dtype: See ``dtype``.
            drafter_device_map: See ``dtype``.
            drafter_quantization_config: See ``dtype``.
            revision: The target's revision on the hub.
            drafter_revision: The drafter's.
            local_files_only: Whether nothing may be downloaded.
            chat_template: Whether prompts go through the tokenizer's chat template.
            kv_dtype: What keys and values are held in, e.g. ``"bfloat16"``, which in float32 takes half the
                memory; :class:`~rapid_integrations.engine.model.causal_model.CausalModel` gives the effects.
            limits: What the engine may take of the machine.
            **options: Generation options, and the fields of both frameworks' LLMs (``callbacks``, ``cache``,
                ``system_prompt``, …).

        Raises:
            ConfigurationError: An argument is unknown, out of range, or contradicts another.
        """
        return cls(
            target=target,
            drafter=drafter,
            retriever=retriever,
            embeddings=embeddings,
            tokenizer=tokenizer,
            drafter_tokenizer=drafter_tokenizer,
            dtype=dtype,
            device_map=device_map,
            quantization_config=quantization_config,
            drafter_dtype=drafter_dtype,
            drafter_device_map=drafter_device_map,
            drafter_quantization_config=drafter_quantization_config,
            revision=revision,
            drafter_revision=drafter_revision,
            local_files_only=local_files_only,
            chat_template=chat_template,
            kv_dtype=kv_dtype,
            limits=limits,
            **options,
        )

    @classmethod
    def demo(cls, *, self_speculation: bool = False, **overrides: Any) -> Self:
        """An LLM over the packaged pair of small trained models, which knows the demo's little language only.

        Args:
            self_speculation: Let the target draft for itself instead of the smaller drafter.
            **overrides: As in :meth:`from_pretrained`, other than the models.

        Raises:
            ConfigurationError: An override is unknown or out of range.
        """
        from rapid_integrations.demo import OPTIONS

        drafter = None if self_speculation else DEMO_DRAFTER
        return cls(DEMO_TARGET, drafter, dtype="float32", local_files_only=True, **{**OPTIONS, **overrides})

    # Copies share the pipeline; a pickle carries configuration only.

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        copy = self.model_copy()
        for name in ("trace_metadata", "metadata", "tags"):
            if isinstance(value := copy.__dict__.get(name), (dict, list)):
                copy.__dict__[name] = value.copy()
        if memo is not None:
            memo[id(self)] = copy
        return copy

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with ``update``, over the same engine. Deep copies do not copy models either.

        Raises:
            ConfigurationError: An updated option is unknown or out of range.
        """
        update = check_update(update or {}, _argument_names(type(self)), type(self).__name__)
        copy = super().model_copy(update=update)
        copy.__dict__.pop("_serialized", None)  # LangChain keeps the JSON form of the original there
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """The constructor's arguments.

        Raises:
            ConfigurationError: The models were handed over loaded, and a pickle carries no weights.
        """
        for name in ("target", "drafter"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigurationError(
                    f"{name} was given as a loaded object, and a pickled {type(self).__name__} carries no "
                    "weights: build it from a hub id or a folder to pickle it."
                )
        fields = type(self).model_fields.keys() - {"pipeline_slot"}
        return {name: value for name, value in self.__dict__.items() if name in fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the LLM anew; it loads its models, or finds them loaded, at the first use."""
        self.__init__(**state)  # type: ignore[misc] # how both frameworks' components come back


def _argument_names(cls: type[RapidModel]) -> set[str]:
    return {name for key, field in cls.model_fields.items() for name in (key, field.alias) if name}
