"""The file format of one prefix: tokens, keys and values as safetensors, checked at every read.

A file holds

* ``tokens``: ``[tokens]`` int64;
* for every layer and head ``<layer>.keys.<head>`` and ``<layer>.values.<head>``: ``[tokens, head_dim]``. The
  rows of a head are contiguous in memory, too, so that writing copies nothing and reading a shorter prefix
  reads only the bytes that it needs;
* ``checksums``: one 64-bit sum for every 1,024 tokens.

The file name consists of the format version, the model's fingerprint and a hash of the tokens.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rapid_integrations.engine.cache.fingerprint import ModelIdentity
from rapid_integrations.engine.cache.sequence_kv import SequenceKV

_FORMAT = "1"
_BLOCK_TOKENS = 1024

# Names of prefix files in any version of the format.
PREFIX_FILE = re.compile(r"rapid-kv\d+-[0-9a-f]{16}-[0-9a-f]{32}\.safetensors")


def name_start(fingerprint: str) -> str:
    """The common beginning of the names of a model's files."""
    return f"rapid-kv{_FORMAT}-{fingerprint[:16]}-"


def file_name(fingerprint: str, tokens: np.ndarray) -> str:
    """The name of the file with these tokens."""
    digest = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
    return f"{name_start(fingerprint)}{digest[:32]}.safetensors"


def write_prefix(path: Path, fingerprint: str, tokens: np.ndarray, kv: SequenceKV) -> None:
    """Write a prefix to ``path``.

    Args:
        path: A temporary file; the caller renames it to :func:`file_name` when it is complete.
        fingerprint: The model's.
        tokens: The ``kv.length`` tokens in the cache, int64.
        kv: The cache; it must not change during the call.

    Raises:
        OSError: The file cannot be written.
    """
    tensors = {name: rows.cpu().contiguous() for name, rows in _rows(kv)}
    checksums = np.zeros(_num_blocks(tokens.size), dtype=np.uint64)
    for rows in tensors.values():
        checksums += _checksums(rows)
    tensors["checksums"] = torch.from_numpy(checksums.view(np.int64))
    tensors["tokens"] = torch.from_numpy(tokens)
    try:
        save_file(tensors, path, {"format": _FORMAT, "fingerprint": fingerprint})
    except SafetensorError as error:  # safetensors raises this instead of OSError, for a full disk too
        raise OSError(str(error)) from error


def read_tokens(path: Path, fingerprint: str) -> np.ndarray:
    """The tokens of a file, ``[tokens]`` int64.

    Raises:
        ValueError: The file is damaged, or its contents do not match its name.
        OSError: The file cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tokens: np.ndarray = file.get_tensor("tokens").numpy().copy()
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if metadata.get("format") != _FORMAT or metadata.get("fingerprint") != fingerprint:
        raise ValueError("its format or model differs from its name")
    if tokens.dtype != np.int64 or tokens.ndim != 1 or file_name(fingerprint, tokens) != path.name:
        raise ValueError("its tokens differ from its name")
    return tokens


def read_prefix(path: Path, model: ModelIdentity, *, length: int, capacity: int) -> SequenceKV:
    """A cache with the first ``length`` tokens of a file.

    Args:
        path: The file; :func:`read_tokens` has accepted it.
        model: The model that the cache is for.
        length: At most the number of tokens in the file.
        capacity: The number of tokens that the cache has room for.

    Raises:
        ValueError: The file is damaged, or its layers are not the model's.
        OSError: The file cannot be read.
    """
    kv = SequenceKV(max(length, capacity))
    # Checksums cover whole blocks, so whole blocks are read.
    checksums = np.zeros(_num_blocks(length), dtype=np.uint64)
    try:
        with safe_open(path, "pt") as file:
            expected = {name for name, _ in _rows(model.example)} | {"tokens", "checksums"}
            if expected != set(file.keys()):
                raise ValueError("its layers are not the model's")
            written = file.get_tensor("checksums").numpy().view(np.uint64)
            (num_tokens,) = file.get_slice("tokens").get_shape()
            end = min(checksums.size * _BLOCK_TOKENS, num_tokens)
            for layer, keys, values in model.example.layers():
                buffers = []
                for kind, like in (("keys", keys), ("values", values)):
                    buffer = torch.empty(like.shape[0], kv.capacity, like.shape[2], dtype=like.dtype)
                    for head, head_buffer in enumerate(buffer):
                        rows = file.get_slice(f"{layer}.{kind}.{head}")[:end]
                        if rows.dtype != like.dtype or rows.shape[1:] != like.shape[2:]:
                            raise ValueError("its layers have another shape or dtype than the model's")
                        if rows.shape[0] != end:
                            raise ValueError("its layers have another number of tokens")
                        checksums += _checksums(rows)
                        if not _all_finite(rows[:length]):
                            raise ValueError("it contains numbers that are not finite")
                        _bytes(head_buffer)[:length] = _bytes(rows)[:length]
                    buffers.append(buffer.to(like.device))
                kv.set_buffers(layer, *buffers)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if not np.array_equal(checksums, written[: checksums.size]):
        raise ValueError("its checksum is wrong")
    kv.length = length
    return kv


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // _BLOCK_TOKENS)


def _rows(kv: SequenceKV) -> Iterator[tuple[str, Tensor]]:
    """Every head's keys and values, ``[tokens, head_dim]``, by their names in a file."""
    for layer, keys, values in kv.layers():
        for kind, heads in (("keys", keys), ("values", values)):
            for head, rows in enumerate(heads):
                yield f"{layer}.{kind}.{head}", rows


# The functions below process whole files in numpy: a thread that computes in torch creates its own pool of
# OpenMP threads, which would slow down the engine's.


def _bytes(rows: Tensor) -> np.ndarray:
    """The memory of contiguous rows, ``[tokens, bytes]`` uint8."""
    data: np.ndarray = rows.view(torch.uint8).numpy()
    return data


def _all_finite(rows: Tensor) -> bool:
    """Whether all numbers are finite: without the sign bit, infinity and NaN are the largest patterns."""
    bits = np.dtype(f"u{rows.element_size()}")
    infinity = torch.tensor([torch.inf], dtype=rows.dtype).view(torch.uint8).numpy().view(bits)
    unsigned = _bytes(rows).view(bits) & bits.type(np.iinfo(bits).max >> 1)
    return bool((unsigned < infinity).all())


def _checksums(rows: Tensor) -> np.ndarray:
    """Wrapping sums of 64-bit words, one for every block of tokens, ``[blocks]`` uint64."""
    data = _bytes(rows.contiguous())
    return np.array(
        [_word_sum(data[start : start + _BLOCK_TOKENS]) for start in range(0, len(data), _BLOCK_TOKENS)],
        dtype=np.uint64,
    )


def _word_sum(block: np.ndarray) -> int:
    data = block.reshape(-1)
    whole = data.size // 8 * 8
    words = data[:whole].view(np.uint64).sum(dtype=np.uint64)
    return (int(words) + int(data[whole:].sum(dtype=np.uint64))) % 2**64
