"""The profile of a processor follows from its vendor and its vector instructions."""

import pytest
import torch

from rapid_integrations.engine import processor


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("GenuineIntel", "AVX512", processor.INTEL),
        ("GenuineIntel", "AVX2", processor.INTEL),
        ("AuthenticAMD", "AVX512", processor.AVX512),
        ("AuthenticAMD", "AVX2", processor.OTHER),
        ("", "DEFAULT", processor.OTHER),
    ],
)
def test_vendor_and_instructions_select_the_profile(vendor, capability, expected, monkeypatch) -> None:
    monkeypatch.setattr(processor, "processor_facts", lambda: {"vendor_id": vendor})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert processor._detect() is expected
