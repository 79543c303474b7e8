"""The machine and the package versions that results depend on."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from rapid_integrations.engine.processor import processor_facts

_PACKAGES = ("rapid-integrations", "torch", "transformers", "bm25s", "faiss-cpu")


def machine(device: torch.device | None = None) -> dict[str, str]:
    """The processor, the operating system, and the accelerator if ``device`` is one."""
    fallback = platform.processor() or platform.machine()
    facts = {"processor": processor_facts().get("model name", fallback), "system": platform.platform()}
    if device is not None and device.type == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name(device)
    return facts


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that results depend on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a source tree, or with another build of faiss
            continue
    return versions
