"""A causal language model with the engine's one operation: read ragged new tokens, return selected logits.

A self-check compares packed forward passes, with a rollback in between, with the model's own forward pass,
and rejects models that differ. Unsupported features that the configuration shows, such as recurrent state,
are rejected before that with errors of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rapid_integrations.config import kv_dtype_name
from rapid_integrations.engine.attention.packed import PACKED, PackedBatch
from rapid_integrations.engine.cache.fingerprint import ModelIdentity, fingerprint
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.model.batch_entry import ReplayedPasses, Step
from rapid_integrations.engine.model.decoder import LeanDecoder
from rapid_integrations.engine.model.pretrained import load_model
from rapid_integrations.engine.model.quantized import Int8Linear, quantize_linears
from rapid_integrations.errors import ConfigurationError, UnsupportedModelError

# Rotary scalings whose angles depend on the highest position in the batch, so that a request's tokens would
# depend on the other requests.
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})

# A different rounding shifts a quantised activation by one step.
_QUANTIZED_EPS = 2**-8


class CausalModel:
    """A transformers causal LM that runs packed batches over :class:`SequenceKV` caches.

    Models of the Llama family are run by :class:`LeanDecoder` if the self-check finds the same results as the
    modelling code's. It ignores hooks that are registered later.

    Args:
        model: A loaded model. Other users can go on using it: its attention is switched to a function that is
            SDPA outside the engine.
        name: The name in messages and statistics; ``None`` is the model's own.
        check: Whether to run the self-check. Without it the modelling code is always run.
        kv_dtype: The dtype of keys and values: ``"bfloat16"``, ``"float16"`` (numbers up to 65,504),
            ``"float32"`` or a torch dtype; ``None`` is the model's dtype. A narrower one takes less memory,
            and less time if torch's kernels are fast in it. Queries, attention weights and attention outputs
            are rounded to it too; sums are in float32, and the rest of the model is unchanged. As with any
            model in 16 bits, another one of two nearly equally likely tokens may be chosen when the shape of
            a pass differs: with other requests in the batch, or while drafts are verified.

    Raises:
        UnsupportedModelError: The model's state cannot be rolled back, or the self-check fails.
        ConfigurationError: ``kv_dtype`` is none of these.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        name: str | None = None,
        check: bool = True,
        kv_dtype: str | torch.dtype | None = None,
    ) -> None:
        self.model = model.eval()  # type: ignore[no-untyped-call]  # untyped in transformers
        self.name = name or str(getattr(model, "name_or_path", "") or type(model).__name__)
        text_config = model.config.get_text_config(decoder=True)
        self.vocab_size = int(text_config.vocab_size)
        window = getattr(text_config, "max_position_embeddings", None)
        self.context_window = int(window) if window else 2**31
        self.device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]  # as above
        self.eos_token_ids = _eos_token_ids(model)
        _refuse_known_obstacles(model, text_config, self.name)
        self._lean: LeanDecoder | None = None
        # None until the self-check is over, which compares in the model's own dtype.
        self.kv_dtype: torch.dtype | None = None
        kv_name = kv_dtype_name(kv_dtype)
        previous_attention = model.config._attn_implementation
        model.set_attn_implementation(PACKED)
        if check:
            try:
                self._self_check()
            except UnsupportedModelError:
                model.set_attn_implementation(previous_attention)
                raise
        if kv_name is not None and getattr(torch, kv_name) != model.dtype:
            self.kv_dtype = getattr(torch, kv_name)

    @property
    def lean_decoder(self) -> LeanDecoder | None:
        """The decoder that runs the passes; ``None`` if the modelling code runs them."""
        return self._lean

    @property
    def lean(self) -> bool:
        """Whether passes are run by :class:`LeanDecoder` instead of the modelling code."""
        return self._lean is not None

    def shares_cache_with(self, other: CausalModel) -> bool:
        """Whether keys and values that ``other`` has computed are this model's, at any position."""
        return self is other and self._lean is not None

    @property
    def inverse_frequencies(self) -> Tensor:
        """The angles by which rotary embedding turns keys from one position to the next, ``[head_dim / 2]``.

        In radians; of a model that :class:`LeanDecoder` runs.
        """
        frequencies: Tensor = self.model.model.rotary_emb.inv_freq
        return frequencies

    def identity(self) -> ModelIdentity:
        """The model's hash and the layout of its caches, for which the model reads one token.

        Raises:
            ConfigurationError: The weights are not in memory.
        """
        example = SequenceKV(1)
        self.forward([Step(example, [0], 0)])
        return ModelIdentity(fingerprint(self.model, self.kv_dtype), example)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        gguf_file: str | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        revision: str | None = None,
        local_files_only: bool = False,
        kv_dtype: str | torch.dtype | None = None,
    ) -> CausalModel:
        """Load a model, see :func:`~rapid_integrations.engine.model.pretrained.load_model`.

        Args:
            source: Hub id, folder or GGUF file.
            gguf_file: As in ``load_model``, like the following arguments.
            dtype: As in ``load_model``.
            device_map: As in ``load_model``.
            quantization_config: As in ``load_model``; or ``"int8"`` on a CPU, also for a GGUF file
                (:mod:`rapid_integrations.engine.model.quantized`).
            revision: As in ``load_model``.
            local_files_only: As in ``load_model``.
            kv_dtype: As in the constructor.

        Raises:
            UnsupportedModelError: As in the constructor and ``load_model``.
            ConfigurationError: The quantisation is unknown or not for this device; ``kv_dtype`` is not
                allowed; the GGUF file cannot be read.
            OSError: From transformers, when the model is not found.
        """
        kv_dtype = kv_dtype_name(kv_dtype)
        int8 = isinstance(quantization_config, str)
        if int8 and quantization_config != "int8":
            raise ConfigurationError(
                f"quantization_config={quantization_config!r} is not allowed: it must be 'int8', a "
                "quantisation config of transformers, or None."
            )
        model = load_model(
            source,
            gguf_file=gguf_file,
            dtype=dtype,
            device_map=device_map,
            quantization_config=None if int8 else quantization_config,
            revision=revision,
            local_files_only=local_files_only,
        )
        if int8:
            quantize_linears(model)
        name = str(source) if gguf_file is None else f"{source}/{gguf_file}"
        return cls(model, name=name, kv_dtype=kv_dtype)

    @torch.inference_mode()
    def forward(self, steps: Sequence[Step], replayed: ReplayedPasses | None = None) -> Tensor:
        """Read every step's new tokens in one packed pass and advance the caches.

        Args:
            steps: One or more sequences; each cache at most once.
            replayed: Recorded passes of this model, which are replayed if they support the steps.

        Returns:
            ``[sum of num_logits, vocab_size]`` float32: for each step in order, the logits after its last
            ``num_logits`` tokens.
        """
        run = replayed if replayed is not None and replayed.supports(steps) else self._pass
        logits = run(steps).float()
        # After the pass, so that a failed one leaves the caches as they were.
        for step in steps:
            step.cache.length += len(step.tokens)
        return logits

    def _pass(self, steps: Sequence[Step]) -> Tensor:
        counts = [len(step.tokens) for step in steps]
        spans = [range(s.cache.length, s.cache.length + n) for s, n in zip(steps, counts, strict=True)]
        tokens = torch.tensor([token for step in steps for token in step.tokens], device=self.device)
        batch = PackedBatch(
            [step.cache for step in steps],
            counts,
            [step.num_logits for step in steps],
            kv_dtype=self.kv_dtype,
        )
        if self._lean is not None:
            return self._lean(tokens, spans, batch)
        positions = torch.tensor([position for span in spans for position in span], device=self.device)
        with batch.active():
            output = self.model(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=batch.wanted,
            )
        # The last layer of a model that is spread over devices may be on another one than the first.
        logits: Tensor = output.logits[0].to(self.device)
        return logits

    def _self_check(self) -> None:
        """Compare packed passes with the model's own forward pass.

        The packed passes have two sequences, several chunks and a rollback. They run through the modelling
        code first, and then, if it supports the model, through :class:`LeanDecoder`, which is kept if it
        agrees within rounding.
        """
        generator = torch.Generator().manual_seed(0)
        sample = torch.randint(0, self.vocab_size, (2, 12), generator=generator)
        junk = torch.randint(0, self.vocab_size, (3,), generator=generator).tolist()
        try:
            with torch.inference_mode():
                expected = self.model(input_ids=sample.to(self.device), use_cache=False).logits.float()
            expected = torch.cat([expected[0, 9:], expected[1, 11:]])
            difference = (self._packed_logits(sample, junk) - expected).abs().max().item()
        except Exception as error:
            raise UnsupportedModelError(
                f"'{self.name}' ({type(self.model).__name__}) cannot run packed batches: {error}. Use a "
                "decoder-only model whose attention goes through transformers' attention interface."
            ) from error
        eps = torch.finfo(self.model.dtype).eps
        if getattr(self.model, "is_quantized", False) or _in_int8(self.model):
            eps = max(eps, _QUANTIZED_EPS)
        scale = max(expected.std().item(), 1e-6)
        # Rounding depends on the shapes of the matrix products; wrong attention shifts logits by far more.
        tolerance = min(100 * math.sqrt(eps), 0.5) * scale
        if not difference <= tolerance:
            raise UnsupportedModelError(
                f"'{self.name}' ({type(self.model).__name__}) failed the self-check: after a packed pass and "
                f"a rollback its logits are off by {difference:.3g} (allowed {tolerance:.3g}). Its state "
                "probably cannot be rolled back; use a model with ordinary attention in every layer."
            )
        if LeanDecoder.supports(self.model):
            self._lean = LeanDecoder(self.model)
            difference = (self._packed_logits(sample, junk) - expected).abs().max().item()
            if not difference <= min(1000 * eps, 0.5) * scale:
                self._lean = None

    def _packed_logits(self, sample: Tensor, junk: list[int]) -> Tensor:
        """The last 3 logits of the first sequence in ``sample``, and the last one of the second."""
        left, right = sample.tolist()
        caches = SequenceKV(16), SequenceKV(16)
        self.forward([Step(caches[0], left[:7], 0), Step(caches[1], right[:4], 0)])
        self.forward([Step(caches[0], junk, 0), Step(caches[1], right[4:9], 0)])
        caches[0].rollback(7)
        return self.forward([Step(caches[0], left[7:], 3), Step(caches[1], right[9:], 1)])


def _in_int8(model: PreTrainedModel) -> bool:
    return any(isinstance(module, Int8Linear) for module in model.modules())


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """End-of-sequence tokens of the generation config, or of the model's config if it has none."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    if configured is None:
        return frozenset()
    return frozenset([configured] if isinstance(configured, int) else configured)


def _refuse_known_obstacles(model: PreTrainedModel, text_config: Any, name: str) -> None:
    """Raise an error with the reason for models that are known to be unsupported."""
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(
            f"'{name}' ({type(model).__name__}) keeps recurrent state, which cannot be rolled back after a "
            "rejected draft. Use a model with attention in every layer."
        )
    kinds = set(getattr(text_config, "layer_types", None) or ())
    if unsupported := kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"'{name}' ({type(model).__name__}) has layers of type {', '.join(sorted(unsupported))}; only "
            "full and sliding-window attention can be rolled back. Use another model."
        )
    if getattr(text_config, "attn_logit_softcapping", None):
        raise UnsupportedModelError(
            f"'{name}' ({type(model).__name__}) caps its attention scores (attn_logit_softcapping), which "
            "packed attention does not support. Use a model without that, for example Gemma 3."
        )
    rope = getattr(text_config, "rope_parameters", None) or {}
    groups = rope.values() if rope and all(isinstance(group, dict) for group in rope.values()) else [rope]
    types = {group.get("rope_type", "default") for group in groups}
    if batch_dependent := types & _BATCH_DEPENDENT_ROPE:
        raise UnsupportedModelError(
            f"'{name}' uses {', '.join(sorted(batch_dependent))} rotary scaling, whose angles depend on the "
            "other requests in a batch. Use a model with default, linear, llama3 or yarn scaling."
        )
