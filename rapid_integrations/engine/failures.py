"""Failures of one request: panics of native code, and memory that runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rapid_integrations.errors import GenerationError


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise panics of native code as a :class:`GenerationError`.

    pyo3 raises the panics of Rust code (tokenizers, llguidance) as a ``BaseException`` that passes every
    ``except Exception``, although it concerns a single request. Exits of the interpreter are not touched.
    """
    try:
        yield
    except (Exception, GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as panic:
        raise as_generation_error(panic) from panic


def as_generation_error(error: BaseException) -> GenerationError:
    """The error that the owner of a request gets for an unexpected ``error``, which becomes its cause."""
    wrapped = GenerationError(f"the engine failed on this request: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on any device."""
    # The CPU allocator has no exception type of its own.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
