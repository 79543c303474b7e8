"""The choice of a benchmark's models. Each worker process gets it and loads the models it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rapid_integrations.demo import DRAFTER_PATH, TARGET_PATH
from rapid_integrations.engine.model.pretrained import load_model, load_tokenizer
from rapid_integrations.model_choice import check_demo_options, load_pipeline, loading_errors
from rapid_integrations.pipeline import RapidPipeline


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """The models and options that the command line named.

    Attributes:
        target: Hub id, folder or GGUF file; ``None`` selects the bundled pair.
        drafter: Hub id, folder, GGUF file, ``"self"`` or ``None``; with the bundled pair ``"small"``,
            ``"self"`` or ``None``.
        embeddings: The model of dense retrieval; ``None`` selects BM25.
        dtype: The dtype of the weights; ``None`` selects float32 on a CPU and the checkpoint's dtype on an
            accelerator.
        options: Flat options of every request.
        drafter_quantization: The quantisation of the engine's drafter, also if the target drafts for itself.
            It does not apply to the transformers baselines.
        kv_dtype: The dtype of the engine's keys and values. Transformers uses the dtype of the weights.
        gguf_file: GGUF file in the target's folder or repository.
        drafter_gguf_file: The same for the drafter, or for a second copy of the target in the engine.
    """

    target: str | None = None
    drafter: str | None = None
    embeddings: str | None = None
    dtype: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    drafter_quantization: str | None = None
    kv_dtype: str | None = None
    gguf_file: str | None = None
    drafter_gguf_file: str | None = None

    def __post_init__(self) -> None:
        """Reject options that the bundled pair does not support, before a process starts."""
        if self.target is None:
            check_demo_options(self.drafter, self.dtype, self.gguf_file, self.drafter_gguf_file)

    @property
    def has_drafter(self) -> bool:
        """Whether there is a drafter with its own weights."""
        if self.target is None:
            return self.drafter != "self"
        return self.drafter not in (None, "self")

    def load_pipeline(self, *, self_drafting: bool) -> RapidPipeline:
        """Load the engine's pipeline, with the drafter or with the target drafting for itself."""
        drafter = "self" if self_drafting else self.drafter
        return load_pipeline(
            self.target,
            drafter,
            self.options,
            embeddings=self.embeddings,
            dtype=self.dtype,
            drafter_quantization_config=self.drafter_quantization,
            kv_dtype=self.kv_dtype,
            gguf_file=self.gguf_file,
            # Of a drafter that is left out here.
            drafter_gguf_file=None if self_drafting and self.has_drafter else self.drafter_gguf_file,
        )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the target's tokenizer."""
        with loading_errors(str(self._sources[0]), None):
            return load_tokenizer(
                self._sources[0], gguf_file=self.gguf_file, local_files_only=self.target is None
            )

    def load_bare(self) -> tuple[PreTrainedModel, PreTrainedModel | None]:
        """Load target and drafter with transformers alone, in the dtype that the engine uses."""
        target, drafter = self._sources
        with loading_errors(target, drafter):
            assistant = None if drafter is None else self._load(drafter, self.drafter_gguf_file)
            return self._load(target, self.gguf_file), assistant

    @property
    def _sources(self) -> tuple[str, str | None]:
        if self.target is None:
            return str(TARGET_PATH), str(DRAFTER_PATH) if self.has_drafter else None
        return self.target, self.drafter if self.has_drafter else None

    def _load(self, source: str, gguf_file: str | None) -> PreTrainedModel:
        model = load_model(
            source,
            gguf_file=gguf_file,
            dtype="float32" if self.target is None else self.dtype,
            local_files_only=self.target is None,
        )
        model.eval()  # type: ignore[no-untyped-call]  # untyped in transformers
        return model
