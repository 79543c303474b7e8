"""Measures the peak memory of a run, and waits for the device before a clock is read."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# The value that resets the peak of the resident set, see proc(5).
_RESET_PEAK = "5"


class PeakMemory:
    """Measures peak memory from its construction on.

    On a CUDA device it measures the memory that torch has allocated there, otherwise the resident memory of
    this process. Only Linux reports the peak of the latter.

    Args:
        device: The target's device.

    Attributes:
        rest_bytes: Bytes in use at construction; ``None`` if the system does not report them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        self.rest_bytes: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.rest_bytes = torch.cuda.memory_allocated(device)
        elif _reset_resident_peak():
            self.rest_bytes = _resident("VmRSS")

    def peak_bytes(self) -> int | None:
        """The maximum of bytes in use since construction; ``None`` if the system does not report it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return None if self.rest_bytes is None else _resident("VmHWM")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work, so that elapsed time includes it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _reset_resident_peak() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:  # not Linux, or a sandbox that forbids it
        return False
    return True


def _resident(name: str) -> int | None:
    """The field of this name in the process's status, in bytes."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return None
