"""What tells whether stored keys and values are those that a model would compute itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.errors import ConfigurationError

# Of each weight, beside the sum of all its bits: together they cost about one pass over the weights.
_SAMPLED_ELEMENTS = 4096


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Who computed keys and values, and how they look.

    Attributes:
        fingerprint: 64 hexadecimal digits, see :func:`fingerprint`.
        example: A cache of one token: its layers have the shapes, dtypes and devices of every cache of the
            model.
    """

    fingerprint: str
    example: SequenceKV

    @classmethod
    def of(cls, model: CausalModel) -> ModelIdentity:
        """The identity of ``model``, which reads a token for it.

        Raises:
            ConfigurationError: Its weights are not in memory.
        """
        example = SequenceKV(1)
        model.forward([Step(example, [0], 0)])
        return cls(fingerprint(model.model, model.kv_dtype), example)


def fingerprint(model: PreTrainedModel, kv_dtype: torch.dtype | None = None) -> str:
    """A hash that is equal for two models only if they compute the same, for all practical purposes.

    It covers the configuration (and with it the version of transformers), and of every weight its name,
    shape, dtype, the sum of all its 64-bit words, and about 4,096 elements spread evenly over it.

    Args:
        model: The model.
        kv_dtype: What its keys and values are held in, where that is not what it computes in.

    Raises:
        ConfigurationError: A weight is offloaded, so that its values cannot be read.
    """
    configuration = model.config.to_dict()
    # These depend on where it was loaded from; the class and the weights say the rest.
    for name in ("_name_or_path", "architectures", "dtype"):
        configuration.pop(name, None)
    digest = hashlib.sha256(type(model).__name__.encode())
    digest.update(json.dumps(configuration, sort_keys=True, default=str).encode())
    if kv_dtype is not None:
        digest.update(f"keys and values in {kv_dtype}".encode())
    for name, weight in model.state_dict().items():
        for part in _parts(weight):
            if part.is_meta:
                raise ConfigurationError(
                    f"models are told apart by their weights, but '{name}' is offloaded: choose another "
                    "device_map, or leave out what is kept for later runs (prefix_cache_dir, an evaluation's "
                    "journal)."
                )
            digest.update(f"{name} {tuple(part.shape)} {part.dtype} {_word_sum(part)}".encode())
            elements = part.reshape(-1)
            sample = elements[:: max(1, elements.numel() // _SAMPLED_ELEMENTS)].contiguous()
            digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _parts(weight: Tensor) -> Iterator[Tensor]:
    """A weight, or the plain tensors that one of a quantised type consists of."""
    # torch's protocol for tensors that wrap others; torchao's are such.
    if hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from _parts(getattr(weight, name))
    else:
        yield weight.detach()


def _word_sum(tensor: Tensor) -> int:
    """The sum of a tensor's bytes, taken as 64-bit words that wrap, those left over apart."""
    data = tensor.reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum())
