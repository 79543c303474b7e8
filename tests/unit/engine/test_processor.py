"""Detection of the processor's profile."""

import pytest
import torch

from rapid_integrations.engine import processor


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("GenuineIntel", "AVX512", "INTEL"),
        ("GenuineIntel", "AVX2", "INTEL"),
        ("AuthenticAMD", "AVX512", "AVX512"),
        ("AuthenticAMD", "AVX2", "OTHER"),
        ("", "DEFAULT", "OTHER"),
    ],
)
def test_the_profile_depends_on_vendor_and_capability(vendor, capability, expected, monkeypatch) -> None:
    monkeypatch.setattr(processor, "processor_facts", lambda: {"vendor_id": vendor})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert processor._detect() is getattr(processor, expected)
