"""The identity of a model for stored keys and values: a hash of the model, and the layout of its caches.

Stored KV may be used only by a model that would compute the same numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.errors import ConfigurationError

# Elements hashed of each weight, in addition to the sum of all its bits. Both together take about as long as
# one pass over the weights.
_SAMPLED_ELEMENTS = 4096


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """A model's hash and the layout of its caches.

    Attributes:
        fingerprint: 64 hexadecimal digits, see :func:`fingerprint`.
        example: A cache of one token. Its layers have the shapes, dtypes and devices of every cache of the
            model.
    """

    fingerprint: str
    example: SequenceKV


class IdentifiedModel(Protocol):
    """A model whose KV can be stored on disk: ``CausalModel``."""

    def identity(self) -> ModelIdentity:
        """The model's hash and the layout of its caches."""

    def __hash__(self) -> int:
        """Models are keys of the cache's dictionaries."""


def fingerprint(model: PreTrainedModel, kv_dtype: torch.dtype | None = None) -> str:
    """A hash that is equal for two models only if they compute the same, for all practical purposes.

    It covers the configuration (and with it the version of transformers), and of every weight its name,
    shape, dtype, the sum of all its 64-bit words, and about 4,096 elements spread evenly over it.

    Args:
        model: The model.
        kv_dtype: The dtype of its keys and values, if it is not the dtype that the model computes in.

    Raises:
        ConfigurationError: A weight is offloaded, so that its values cannot be read.
    """
    configuration = model.config.to_dict()
    # These depend on where the model was loaded from; the class and the weights cover the rest.
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
                    f"models are identified by their weights, but '{name}' is offloaded: choose another "
                    "device_map, or leave out the options that keep results for later runs "
                    "(prefix_cache_dir, an evaluation's journal)."
                )
            digest.update(f"{name} {tuple(part.shape)} {part.dtype} {_word_sum(part)}".encode())
            elements = part.reshape(-1)
            sample = elements[:: max(1, elements.numel() // _SAMPLED_ELEMENTS)].contiguous()
            digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _parts(weight: Tensor) -> Iterator[Tensor]:
    """The weight itself, or the plain tensors that a quantised weight consists of."""
    # torch's protocol for tensors that wrap others, for example torchao's.
    if hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from _parts(getattr(weight, name))
    else:
        yield weight.detach()


def _word_sum(tensor: Tensor) -> int:
    """The wrapping sum of a tensor's 64-bit words, plus the sum of the remaining bytes."""
    data = tensor.reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum())
