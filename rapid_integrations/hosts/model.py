"""The public classes' constructor, copies and pickles. Models are loaded once and never copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import ConfigDict

from rapid_integrations.config import GenerationOptions
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.hosts.base import DEMO_DRAFTER, DEMO_TARGET, RapidBase, is_pipeline
from rapid_integrations.hosts.call import OPTION_NAMES, rename_synonyms
from rapid_integrations.hosts.fields import LOADING_NAMES
from rapid_integrations.loading_options import LoadingOptions, show_loading_options
from rapid_integrations.tools.formats import check_format_name
from rapid_integrations.validation import refuse_unknown

# The frameworks pass None for these fields to mean the default, and the fields' types do not allow None.
_NONE_MEANS_DEFAULT = ("stop", "metadata", "messages_to_prompt", "completion_to_prompt")


class RapidModel(RapidBase):
    """Constructor, copies and pickles of :class:`~rapid_integrations.RapidLLM` and ``ChatRapid``.

    It is the first base of both classes, so that its methods take precedence over the frameworks' own.
    """

    model_config = ConfigDict(
        extra="forbid", populate_by_name=True, arbitrary_types_allowed=True, protected_namespaces=()
    )

    def __init__(self, target: Any = None, drafter: Any = None, **kwargs: Any) -> None:
        super().__init__(**_checked_arguments(type(self), {"target": target, "drafter": drafter, **kwargs}))

    @classmethod
    @show_loading_options
    def from_pretrained(
        cls, target: Any, drafter: Any = None, *, retriever: Any = None, **options: Any
    ) -> Self:
        """An LLM over models in transformers' format, which are loaded at the first use.

        Args:
            target: The model that decides: a hub id, a folder, a GGUF file, a loaded model (with
                ``tokenizer=``), or a :class:`~rapid_integrations.RapidPipeline`.
            drafter: The model that proposes tokens, with the same vocabulary; ``None`` lets the target draft.
            retriever: Finds the drafter's context: a LangChain or LlamaIndex retriever, vector store or
                index, or a callable from a query to chunks. ``None`` searches the prompt's own context.
            **options: Three groups of keyword arguments. Loading options, which
                :class:`~rapid_integrations.loading_options.LoadingOptions` describes: ``embeddings``,
                ``tokenizer``, ``drafter_tokenizer``, ``limits``, ``dtype``, ``device_map``,
                ``quantization_config``, ``drafter_dtype``, ``drafter_device_map``,
                ``drafter_quantization_config``, ``revision``, ``drafter_revision``, ``local_files_only``,
                ``chat_template``, ``kv_dtype``, ``gguf_file``, ``drafter_gguf_file``. Generation options,
                which :class:`~rapid_integrations.config.GenerationOptions` describes. Fields of the
                frameworks' own classes (``callbacks``, ``cache``, ``system_prompt``, …).

        Raises:
            ConfigurationError: An argument is unknown, not allowed, or contradicts another.
        """
        return cls(target=target, drafter=drafter, retriever=retriever, **options)

    @classmethod
    def demo(cls, *, self_speculation: bool = False, **overrides: Any) -> Self:
        """An LLM over the bundled pair of small trained models, which knows only its demo language.

        Args:
            self_speculation: Let the target draft for itself instead of the smaller drafter.
            **overrides: Arguments of :meth:`from_pretrained`, other than the models.

        Raises:
            ConfigurationError: An override is unknown or not allowed.
        """
        from rapid_integrations.demo import OPTIONS

        drafter = None if self_speculation else DEMO_DRAFTER
        return cls(DEMO_TARGET, drafter, dtype="float32", local_files_only=True, **{**OPTIONS, **overrides})

    # Copies share the pipeline; a pickle carries the configuration only.

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        copy = self.model_copy()
        # The only mutable containers among the fields. LlamaIndex's metadata is a property, not a field.
        for name in ("trace_metadata", "metadata", "tags"):
            if isinstance(value := copy.__dict__.get(name), (dict, list)):
                copy.__dict__[name] = value.copy()
        if memo is not None:
            memo[id(self)] = copy
        return copy

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with ``update``, over the same engine. Deep copies do not copy models either.

        Raises:
            ConfigurationError: An updated option is unknown or not allowed.
        """
        cls = type(self)
        changes = rename_synonyms(update or {})
        refuse_unknown(changes, _argument_names(cls), cls.__name__)
        copy = super().model_copy(update=_normalised(changes))
        copy.__dict__.pop("_serialized", None)  # LangChain keeps the JSON form of the original there
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """The constructor's arguments.

        Raises:
            ConfigurationError: A model was given as a loaded object, and a pickle carries no weights.
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
        """Rebuild the LLM. It loads its models at the first use, or shares them if they are loaded."""
        self.__init__(**state)  # type: ignore[misc] # both frameworks' base classes need their constructor


def _argument_names(cls: type[RapidModel]) -> set[str]:
    return {name for key, field in cls.model_fields.items() for name in (key, field.alias) if name}


def _checked_arguments(cls: type[RapidModel], given: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments, validated and normalised.

    Raises:
        ConfigurationError: One is unknown, missing, given twice, not allowed, or contradicts another.
    """
    arguments = rename_synonyms(given)
    refuse_unknown(arguments, _argument_names(cls), cls.__name__)
    for name in _NONE_MEANS_DEFAULT:
        if arguments.get(name, ...) is None:
            del arguments[name]
    target = arguments.get("target")
    if target is None:
        raise ConfigurationError(
            f"{cls.__name__} needs a target: a Hugging Face id, a folder, a RapidPipeline, or a loaded model "
            f"together with tokenizer=. {cls.__name__}.demo() runs on the bundled pair."
        )
    if not is_pipeline(target):
        LoadingOptions(**{name: value for name, value in arguments.items() if name in LOADING_NAMES})
    elif conflicting := sorted(LoadingOptions.changed(arguments).keys() - {"target"}):
        raise ConfigurationError(
            f"{', '.join(conflicting)} cannot be given together with a RapidPipeline, whose models are "
            "loaded."
        )
    return _normalised(arguments)


def _normalised(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments`` with loading and generation options validated and in the form in which they are kept."""
    check_format_name(arguments.get("tool_format"))
    given = {name: value for name, value in arguments.items() if name in OPTION_NAMES}
    options = GenerationOptions().override(**given).flat()
    return LoadingOptions.normalise(arguments) | {name: options[name] for name in given}
