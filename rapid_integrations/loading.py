"""From the names of two models to a running engine, shared by everybody in the process who names the same.

Loading is lazy and counted: engines live as long as a pipeline uses them.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rapid_integrations.config import EngineLimits
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.errors import ConfigurationError, VocabularyMismatchError


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which model, and how to load it.

    Attributes:
        source: Hub id, folder, or a loaded model.
        dtype: As :meth:`CausalModel.load` takes it.
        device_map: As in transformers.
        quantization_config: As in transformers.
        revision: Hub revision.
        local_files_only: Never ask the hub.
        kv_dtype: As :class:`CausalModel` takes it.
    """

    source: str | Path | PreTrainedModel
    dtype: Any = None
    device_map: Any = None
    quantization_config: Any = None
    revision: str | None = None
    local_files_only: bool = False
    kv_dtype: Any = None

    @property
    def loaded(self) -> bool:
        """Whether ``source`` is a model already."""
        return not isinstance(self.source, (str, Path))

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for specifications of one and the same model."""
        if not isinstance(self.source, (str, Path)):
            return ("loaded", str(id(self.source)), repr(self.kv_dtype))
        # Quantisation configs and device maps are not hashable; their text tells them apart.
        rest = (getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "source")
        return (str(self.source), *(repr(value) for value in rest))

    def load(self) -> CausalModel:
        """The model behind the engine's interface.

        Raises:
            UnsupportedModelError: It cannot be rolled back.
            OSError: It cannot be found.
        """
        if not isinstance(self.source, (str, Path)):
            if self.dtype is not None or self.device_map is not None or self.quantization_config is not None:
                raise ConfigurationError(
                    "dtype, device_map and quantization_config say how to load a model, but a loaded one was "
                    "given: leave them out, or give the model's name."
                )
            return CausalModel(self.source, kv_dtype=self.kv_dtype)
        return CausalModel.load(
            self.source,
            dtype=self.dtype,
            device_map=self.device_map,
            quantization_config=self.quantization_config,
            revision=self.revision,
            local_files_only=self.local_files_only,
            kv_dtype=self.kv_dtype,
        )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the model.

        Raises:
            ConfigurationError: The model was given loaded, so that there is no name to look beside.
            OSError: There is none.
        """
        if not isinstance(self.source, (str, Path)):
            raise ConfigurationError(
                f"a loaded {type(self.source).__name__} was given without its tokenizer: pass tokenizer=…."
            )
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(self.source),
            revision=self.revision or "main",
            local_files_only=self.local_files_only,
            trust_remote_code=False,
        )
        return tokenizer


def check_same_vocabulary(target: PreTrainedTokenizerBase, drafter: PreTrainedTokenizerBase) -> None:
    """Make sure that a token means the same to both models.

    Raises:
        VocabularyMismatchError: A token's text has another id, or is missing.
    """
    ours, theirs = target.get_vocab(), drafter.get_vocab()
    if ours == theirs:
        return
    differing = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    example = min(differing, key=lambda token: (ours.get(token, len(ours)), token))
    raise VocabularyMismatchError(
        f"target and drafter must share a vocabulary; {len(differing):,} of {len(ours):,} tokens differ, for "
        f"example {example!r}: {ours.get(example)} in the target, {theirs.get(example)} in the drafter. "
        "Choose a drafter of the target's family, or none (the target then drafts for itself)."
    )


@dataclass(slots=True)
class _Shared:
    engine: Future[Engine]
    users: int = 0

    @property
    def usable(self) -> bool:
        """Whether the engine is being loaded, or is loaded and open."""
        if not self.engine.done():
            return True
        return self.engine.exception() is None and not self.engine.result().closed


class EngineRegistry:
    """Engines by the models they run; thread-safe."""

    def __init__(self) -> None:
        # Garbage collection may let go of an engine in the very thread that holds the lock.
        self._lock = threading.RLock()
        self._shared: dict[tuple[Any, ...], _Shared] = {}

    def acquire(
        self, target: ModelSpec, drafter: ModelSpec | None, limits: EngineLimits
    ) -> tuple[Engine, Callable[[], None]]:
        """The engine for these models, loaded if nobody uses it yet, and a function that lets go of it.

        Args:
            target: The target.
            drafter: The drafter; ``None`` lets the target draft for itself.
            limits: What the engine may take.
        """
        key = (target.key, drafter.key if drafter else None, limits)
        with self._lock:
            shared = self._shared.get(key)
            first = shared is None or not shared.usable
            if shared is None or first:
                shared = self._shared[key] = _Shared(Future())
            shared.users += 1
        if first:
            # A thread of its own: OpenMP keeps a pool for every thread that ever computed, and with the
            # caller's beside the worker's a small forward pass takes four times as long.
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

    def _release(self, key: tuple[Any, ...], shared: _Shared) -> None:
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
