"""The options of loading models, defined once for the pipeline, both frameworks' classes and the commands.

To add an option: add a field to :class:`LoadingOptions`, the pydantic field of the same name in
:mod:`rapid_integrations.hosts.fields` (a test compares the two), and use it in
:mod:`rapid_integrations.loading`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, TypeVar

from rapid_integrations.config import EngineLimits, kv_dtype_name
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.validation import check

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class LoadingOptions:
    """Which models to load, and how.

    Models are loaded from safetensors or GGUF files only and without remote code. If an option that begins
    with ``drafter_`` is given and ``drafter`` is not, the target is loaded a second time as its own drafter.

    Attributes:
        target: The model that reads the whole prompt and decides: a hub id, a folder, a file that ends in
            ``.gguf``, or a loaded model.
        drafter: The model that proposes tokens: the same kinds of value, with the target's vocabulary.
            ``None`` (default) lets the target draft for itself.
        embeddings: Ranks chunks of the prompt's own context densely: embeddings of either framework, or a
            sentence-transformers name. ``None`` (default) ranks them by BM25.
        tokenizer: The target's tokenizer. Required for a loaded target; ``None`` (default) loads it from the
            target's id, folder or GGUF file.
        drafter_tokenizer: The tokenizer of a loaded drafter, to compare its vocabulary with the target's.
        limits: How much memory and parallelism the engine may use: :class:`EngineLimits` or a dict of its
            fields. ``None`` (default) uses its defaults.
        dtype: Number format of the weights: ``"auto"``, ``"bfloat16"``, a torch dtype, … ``None`` (default)
            is float32 on a CPU and the checkpoint's own format on an accelerator.
        device_map: As in transformers; ``None`` (default) uses the accelerator if there is one.
        quantization_config: As in transformers. Default ``None``.
        drafter_dtype: Like ``dtype``; ``None`` (default) is the target's, for a drafter that is loaded here.
        drafter_device_map: Like ``device_map``: the drafter can have a device of its own. ``None`` (default)
            is the target's, for a drafter that is loaded here.
        drafter_quantization_config: As in transformers, or ``"int8"`` on a CPU, which needs no other package.
            It makes the target a cheap drafter for itself. Default ``None``.
        revision: The target's revision on the hub. Default ``None``: the main branch.
        drafter_revision: The drafter's revision on the hub.
        local_files_only: Never download anything. Default ``False``.
        chat_template: Apply the tokenizer's chat template to prompts, if it has one. Default ``True``.
        kv_dtype: Number format of both models' keys and values: ``"float32"``, ``"bfloat16"``, ``"float16"``
            or the torch dtype. ``"bfloat16"`` halves the memory that they take in float32;
            :class:`~rapid_integrations.engine.model.causal_model.CausalModel` describes the effect. ``None``
            (default) is the format that the models compute in.
        gguf_file: The name of a GGUF file in the target's hub repository or folder, which is loaded in place
            of its safetensors files: weights, tokenizer and chat template. ``None`` (default) loads those,
            or the file that ``target`` itself names.
        drafter_gguf_file: The same for the drafter, or without a drafter for the target's second copy.

    Raises:
        ConfigurationError: A value is not allowed, or options contradict each other.
    """

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

    def __post_init__(self) -> None:
        """Normalise and validate every field."""
        given = {name: getattr(self, name) for name in self.names()}
        for name, value in self.normalise(given).items():
            object.__setattr__(self, name, value)
        check(
            self,
            limits=(
                self.limits is None or isinstance(self.limits, EngineLimits),
                "an EngineLimits, a dict of its fields, or None",
            ),
            local_files_only=(isinstance(self.local_files_only, bool), "True or False"),
            chat_template=(isinstance(self.chat_template, bool), "True or False"),
        )
        if not isinstance(self.target, str) and self.tokenizer is None:
            raise ConfigurationError(
                f"a loaded {type(self.target).__name__} was given without its tokenizer: a loaded "
                "model needs tokenizer= too."
            )
        self._check_loaded_model("target", "")
        self._check_loaded_model("drafter", "drafter_")
        self._check_gguf_file("gguf_file", self.target)
        self._check_gguf_file("drafter_gguf_file", self.target if self.second_copy else self.drafter)
        if self.second_copy and not isinstance(self.target, str):
            raise ConfigurationError(
                "drafter_* options load the target a second time, but a loaded target was given: pass "
                "drafter=… too."
            )

    def _check_loaded_model(self, role: str, prefix: str) -> None:
        model = getattr(self, role)
        if model is None or isinstance(model, str):
            return
        for name in ("dtype", "device_map", "quantization_config", "gguf_file"):
            if getattr(self, prefix + name) is not None:
                raise ConfigurationError(
                    f"{prefix + name} says how to load the {role}, but a loaded one was given: leave it out, "
                    "or give the model's name."
                )

    def _check_gguf_file(self, name: str, source: Any) -> None:
        file = getattr(self, name)
        if file is None:
            return
        check(
            self,
            **{name: (isinstance(file, str) and file.lower().endswith(".gguf"), "the name of a .gguf file")},
        )
        if str(source).lower().endswith(".gguf"):
            raise ConfigurationError(
                f"{name}={file!r} is a file in a folder or hub repository, but '{source}' is a GGUF file "
                f"itself: leave {name} out, or give the folder or repository."
            )

    @property
    def second_copy(self) -> bool:
        """Whether the target is loaded a second time, as its own drafter."""
        how = ("dtype", "device_map", "quantization_config", "revision", "gguf_file")
        return self.drafter is None and any(getattr(self, f"drafter_{name}") is not None for name in how)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all options, ``target`` and ``drafter`` included."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @staticmethod
    def normalise(options: Mapping[str, Any]) -> dict[str, Any]:
        """``options`` in the form in which they are kept: paths and dtypes as text, limits as one object.

        Args:
            options: Values by name, of loading options or others; others are returned unchanged.

        Raises:
            ConfigurationError: ``kv_dtype`` or a limit is not allowed.
        """
        return {name: _NORMALISERS[name](v) if name in _NORMALISERS else v for name, v in options.items()}

    @classmethod
    def changed(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of ``options`` that are loading options and differ from their defaults and from ``None``."""
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        return {
            name: value
            for name, value in options.items()
            if name in defaults and value is not None and value is not defaults[name]
        }


def _path_text(value: Any) -> Any:
    return fspath(value) if isinstance(value, PathLike) else value


def _dtype_name(value: Any) -> Any:
    # A torch dtype is recognised by its text, because importing torch takes seconds.
    text = str(value)
    return text.removeprefix("torch.") if isinstance(value, str) or text.startswith("torch.") else value


def _limits(value: Any) -> Any:
    return EngineLimits(**value) if isinstance(value, Mapping) else value


_NORMALISERS: dict[str, Callable[[Any], Any]] = {
    "target": _path_text,
    "drafter": _path_text,
    "gguf_file": _path_text,
    "drafter_gguf_file": _path_text,
    "dtype": _dtype_name,
    "drafter_dtype": _dtype_name,
    "kv_dtype": kv_dtype_name,
    "limits": _limits,
}


def show_loading_options(function: Function) -> Function:
    """Show the loading options in the signature of a function that takes them as ``**kwargs``.

    ``help()``, notebooks and documentation tools read the signature; calls are not affected.
    """
    signature = inspect.signature(function)
    *before, keywords = signature.parameters.values()
    shown = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(LoadingOptions)
        if f.name not in signature.parameters
    ]
    function.__signature__ = signature.replace(parameters=[*before, *shown, keywords])  # type: ignore[attr-defined] # read by inspect.signature
    return function
