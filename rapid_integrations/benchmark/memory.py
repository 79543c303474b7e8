"""How much memory a run takes at its peak."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# What proc(5) calls resetting the peak of the resident set.
_RESET_PEAK = "5"


class PeakMemory:
    """Watches from its making on.

    On a CUDA device it is what torch has allocated there, elsewhere the resident memory of this process,
    which only Linux tells the peak of.

    Args:
        device: Where the target is.

    Attributes:
        rest_bytes: In use when the watch began; ``None`` where nobody says.
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
        """The most since the watch began; ``None`` where nobody says."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return None if self.rest_bytes is None else _resident("VmHWM")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock tells the truth."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _reset_resident_peak() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:  # not Linux, or a sandbox that forbids it: there is no peak to report
        return False
    return True


def _resident(name: str) -> int | None:
    """A line of the process's status, in bytes."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return None
