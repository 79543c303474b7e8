"""One prefix as a file: tokens, keys and values as safetensors, checked whenever they are read.

A file has the tokens as ``tokens``; for every layer and head a tensor ``<layer>.keys.<head>`` and one of the
values, ``[tokens, head_dim]`` (a head's rows lie together, in memory too, so that nothing is copied to be
written, and no more is read than a shorter prefix needs); and ``checksums``, one for every 1,024 tokens. Its
name says the format, the model and the tokens.
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

# Any version's.
PREFIX_FILE = re.compile(r"rapid-kv\d+-[0-9a-f]{16}-[0-9a-f]{32}\.safetensors")


def name_start(fingerprint: str) -> str:
    """What the names of a model's files begin with."""
    return f"rapid-kv{_FORMAT}-{fingerprint[:16]}-"


def file_name(fingerprint: str, tokens: np.ndarray) -> str:
    """The name of the file with these tokens."""
    digest = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
    return f"{name_start(fingerprint)}{digest[:32]}.safetensors"


def write_prefix(path: Path, fingerprint: str, tokens: np.ndarray, kv: SequenceKV) -> None:
    """Write a prefix to ``path``.

    Args:
        path: The file; the caller moves it to its name when it is whole.
        fingerprint: The model's.
        tokens: The ``kv.length`` tokens in the cache.
        kv: The cache, which must not change meanwhile.

    Raises:
        OSError: It cannot be written.
    """
    tensors = {name: rows.cpu().contiguous() for name, rows in _rows(kv)}
    checksums = np.zeros(_num_blocks(tokens.size), dtype=np.uint64)
    for rows in tensors.values():
        checksums += _checksums(rows)
    tensors["checksums"] = torch.from_numpy(checksums.view(np.int64))
    tensors["tokens"] = torch.from_numpy(tokens)
    try:
        save_file(tensors, path, {"format": _FORMAT, "fingerprint": fingerprint})
    except SafetensorError as error:  # what it makes of an OSError, a full disk among them
        raise OSError(str(error)) from error


def read_tokens(path: Path, fingerprint: str) -> np.ndarray:
    """The tokens of a file, ``[tokens]`` int64.

    Raises:
        ValueError: It is damaged, or not what its name says.
        OSError: It cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tokens: np.ndarray = file.get_tensor("tokens").numpy().copy()
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if metadata.get("format") != _FORMAT or metadata.get("fingerprint") != fingerprint:
        raise ValueError("it is of another format or model than its name says")
    if tokens.dtype != np.int64 or tokens.ndim != 1 or file_name(fingerprint, tokens) != path.name:
        raise ValueError("its tokens are not those that its name says")
    return tokens


def read_prefix(path: Path, model: ModelIdentity, *, length: int, capacity: int) -> SequenceKV:
    """A cache with the first ``length`` tokens of a file.

    Args:
        path: The file; its tokens are known (:func:`read_tokens`).
        model: The model that the cache is for.
        length: At most as many tokens as it has.
        capacity: Tokens that the cache has room for.

    Raises:
        ValueError: It is damaged, or not of this model.
        OSError: It cannot be read.
    """
    kv = SequenceKV(max(length, capacity))
    # Whole blocks are read, for their checksums.
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
                    for head, held in enumerate(buffer):
                        rows = file.get_slice(f"{layer}.{kind}.{head}")[:end]
                        if rows.dtype != like.dtype or rows.shape[1:] != like.shape[2:]:
                            raise ValueError("its layers are not of the model's shape and dtype")
                        if rows.shape[0] != end:
                            raise ValueError("its layers have other tokens")
                        checksums += _checksums(rows)
                        if not _all_finite(rows[:length]):
                            raise ValueError("it has numbers that are not finite")
                        _bytes(held)[:length] = _bytes(rows)[:length]
                    buffers.append(buffer.to(like.device))
                kv.hold(layer, *buffers)
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


# What is done to all of a file is done in numpy: a thread that computes in torch keeps a pool of threads,
# which slows the engine's.


def _bytes(rows: Tensor) -> np.ndarray:
    """The memory of contiguous numbers, ``[tokens, bytes]`` uint8."""
    data: np.ndarray = rows.view(torch.uint8).numpy()
    return data


def _all_finite(rows: Tensor) -> bool:
    """Whether each number is: without its sign, the bits of infinity and NaN are the largest."""
    bits = np.dtype(f"u{rows.element_size()}")
    infinity = torch.tensor([torch.inf], dtype=rows.dtype).view(torch.uint8).numpy().view(bits)
    unsigned = _bytes(rows).view(bits) & bits.type(np.iinfo(bits).max >> 1)
    return bool((unsigned < infinity).all())


def _checksums(rows: Tensor) -> np.ndarray:
    """Sums of 64-bit words that wrap, one for every block of tokens, ``[blocks]`` uint64."""
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
