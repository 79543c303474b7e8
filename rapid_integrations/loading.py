"""Load models and share one engine among all pipelines that name the same models.

:func:`model_specs` derives the specifications of target and drafter from :class:`LoadingOptions`.
:data:`ENGINES` keeps one engine for each pair of specifications, for as long as a pipeline uses it.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rapid_integrations.config import EngineLimits
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.model.pretrained import load_tokenizer
from rapid_integrations.errors import VocabularyMismatchError
from rapid_integrations.loading_options import LoadingOptions


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model, and how to load it.

    Attributes:
        source: A hub id, a folder, a GGUF file or a loaded model. The other fields except ``kv_dtype`` have
            no effect on a loaded model. They are the arguments of :meth:`CausalModel.load`.
        dtype: Number format of the weights.
        device_map: As in transformers.
        quantization_config: As in transformers.
        revision: Revision on the hub.
        local_files_only: Never download anything.
        kv_dtype: Number format of keys and values.
        gguf_file: The GGUF file in the hub repository.
    """

    source: str | Path | PreTrainedModel
    dtype: Any = None
    device_map: Any = None
    quantization_config: Any = None
    revision: str | None = None
    local_files_only: bool = False
    kv_dtype: Any = None
    gguf_file: str | None = None

    @property
    def loaded(self) -> bool:
        """Whether ``source`` is a loaded model."""
        return not isinstance(self.source, (str, Path))

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for two specifications of the same model."""
        if self.loaded:
            return ("loaded", str(id(self.source)), repr(self.kv_dtype))
        # Quantisation configs and device maps are not hashable, but differ in their text.
        return (str(self.source), *(repr(value) for value in self._how_to_load().values()))

    def load(self) -> CausalModel:
        """The model, with the engine's interface.

        Raises:
            UnsupportedModelError: Its state cannot be rolled back.
            ConfigurationError: An option is not allowed, or its GGUF file cannot be read.
            OSError: It cannot be found.
        """
        if not isinstance(self.source, (str, Path)):
            return CausalModel(self.source, kv_dtype=self.kv_dtype)
        return CausalModel.load(self.source, **self._how_to_load())

    def _how_to_load(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "source"}

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in the model's folder, repository or GGUF file.

        Raises:
            UnsupportedModelError: The GGUF file has none.
            ConfigurationError: The GGUF file cannot be read.
            OSError: There is none.
        """
        return load_tokenizer(
            str(self.source),
            gguf_file=self.gguf_file,
            revision=self.revision,
            local_files_only=self.local_files_only,
        )


def model_specs(options: LoadingOptions) -> tuple[ModelSpec, ModelSpec | None]:
    """The specifications of target and drafter; ``None`` if the target drafts for itself."""
    target = ModelSpec(
        **_place(options.target, options.gguf_file),
        dtype=options.dtype,
        device_map=options.device_map,
        quantization_config=options.quantization_config,
        revision=options.revision,
        local_files_only=options.local_files_only,
        kv_dtype=options.kv_dtype,
    )
    if options.drafter is None and not options.second_copy:
        return target, None
    source, gguf_file = options.drafter, options.drafter_gguf_file
    if options.second_copy:
        source, gguf_file = options.target, gguf_file or options.gguf_file
    drafter = dataclasses.replace(
        target,
        **_place(source, gguf_file),
        quantization_config=options.drafter_quantization_config,
        revision=options.drafter_revision or (options.revision if options.second_copy else None),
    )
    # A loaded drafter has its format and its device; one that is loaded here has the target's by default.
    if options.drafter_dtype is not None or drafter.loaded:
        drafter = dataclasses.replace(drafter, dtype=options.drafter_dtype)
    if options.drafter_device_map is not None or drafter.loaded:
        drafter = dataclasses.replace(drafter, device_map=options.drafter_device_map)
    return target, None if drafter.key == target.key else drafter


def _place(source: Any, gguf_file: str | None) -> dict[str, Any]:
    """A model's place, as fields of a specification. A GGUF file on this machine has one name: its path."""
    if gguf_file is not None and Path(source).is_dir():
        return {"source": str(Path(source) / gguf_file), "gguf_file": None}
    return {"source": source, "gguf_file": gguf_file}


def check_same_vocabulary(target: PreTrainedTokenizerBase, drafter: PreTrainedTokenizerBase) -> None:
    """Check that every token id has the same text in both vocabularies.

    Raises:
        VocabularyMismatchError: A token has another id in the drafter's vocabulary, or is missing in one.
    """
    target_ids, drafter_ids = target.get_vocab(), drafter.get_vocab()
    if target_ids == drafter_ids:
        return
    tokens = target_ids.keys() | drafter_ids.keys()
    differing = [token for token in tokens if target_ids.get(token) != drafter_ids.get(token)]
    example = min(differing, key=lambda token: (target_ids.get(token, len(target_ids)), token))
    raise VocabularyMismatchError(
        f"target and drafter must share a vocabulary; {len(differing):,} of {len(target_ids):,} tokens "
        f"differ, for example {example!r}: {target_ids.get(example)} in the target, "
        f"{drafter_ids.get(example)} in the drafter. Choose a drafter of the target's family, or none: the "
        "target then drafts for itself."
    )


@dataclass(slots=True)
class _SharedEngine:
    """An engine, or its loading in progress, and the number of pipelines that use it."""

    engine: Future[Engine]
    users: int = 0

    @property
    def usable(self) -> bool:
        """Whether the engine is still loading, or is loaded and open."""
        if not self.engine.done():
            return True
        return self.engine.exception() is None and not self.engine.result().closed


class EngineRegistry:
    """Engines by the models that they run. Usable from any thread."""

    def __init__(self) -> None:
        # Reentrant: garbage collection can release an engine in the thread that holds the lock.
        self._lock = threading.RLock()
        self._shared: dict[tuple[Any, ...], _SharedEngine] = {}

    def acquire(
        self, target: ModelSpec, drafter: ModelSpec | None, limits: EngineLimits
    ) -> tuple[Engine, Callable[[], None]]:
        """An engine for these models, which is loaded if it is not in use yet.

        Args:
            target: The target.
            drafter: The drafter; ``None`` lets the target draft for itself.
            limits: How much memory and parallelism the engine may use.

        Returns:
            The engine, and a function that releases it. The last release closes the engine.
        """
        key = (target.key, drafter.key if drafter else None, limits)
        with self._lock:
            shared = self._shared.get(key)
            first = shared is None or not shared.usable
            if shared is None or first:
                shared = self._shared[key] = _SharedEngine(Future())
            shared.users += 1
        if first:
            # In a separate thread, because OpenMP keeps a thread pool for every thread that has computed. A
            # pool of the calling thread beside the engine's makes a small forward pass four times slower.
            loader = threading.Thread(
                target=_load, args=(shared.engine, target, drafter, limits), name="rapid-loading"
            )
            loader.start()
            loader.join()
        try:
            engine = shared.engine.result()
        except BaseException:
            self._release(key, shared)
            raise
        return engine, lambda: self._release(key, shared)

    def _release(self, key: tuple[Any, ...], shared: _SharedEngine) -> None:
        with self._lock:
            shared.users -= 1
            if shared.users:
                return
            if self._shared.get(key) is shared:
                del self._shared[key]
        if shared.engine.done() and shared.engine.exception() is None:
            shared.engine.result().close()


def _load(engine: Future[Engine], target: ModelSpec, drafter: ModelSpec | None, limits: EngineLimits) -> None:
    try:
        target_model = target.load()
        drafter_model = drafter.load() if drafter else target_model
        engine.set_result(Engine(target_model, drafter_model, limits=limits))
    except BaseException as error:
        engine.set_exception(error)


ENGINES = EngineRegistry()
"""The engines of this process."""
