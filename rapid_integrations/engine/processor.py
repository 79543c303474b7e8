"""The processor of this machine, and the kernels that were measured to be fastest on three kinds of it.

torch's own matrix products and fused attention go through MKL. MKL uses its AVX-512 kernels on Intel
processors only; on others it computes products of few rows in one thread or splits them badly. The flags of
:class:`ProcessorProfile` say which replacements pay; the README files of ``attention`` and ``model`` have the
measurements.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch


def processor_facts() -> dict[str, str]:
    """The first value of each field in ``/proc/cpuinfo``; empty if there is no such file."""
    facts: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                facts.setdefault(name.strip(), value.strip())
    except OSError:
        return {}
    return facts


@dataclass(frozen=True, slots=True)
class ProcessorProfile:
    """The fastest CPU kernels on one kind of processor.

    Attributes:
        fused_attention: Whether torch's fused kernel beats matrix products where several queries share keys.
        single_query_by_products: Whether matrix products beat the fused kernel for one query whose keys no
            other head shares.
        bfloat16_in_pairs: Whether torch's fused kernel takes less time for two queries in bfloat16 than for
            one.
        max_blocked_weight: Weights with fewer numbers are multiplied with few rows in blocks of their
            outputs; 0 never.
        few_rows_only: Whether oneDNN's products pay for few rows by a large weight only.
    """

    fused_attention: bool
    single_query_by_products: bool
    bfloat16_in_pairs: bool
    max_blocked_weight: int
    few_rows_only: bool


# Measured on a Xeon, a Zen 4 and a Zen 3, in this order.
INTEL = ProcessorProfile(
    fused_attention=True,
    single_query_by_products=False,
    bfloat16_in_pairs=False,
    max_blocked_weight=0,
    few_rows_only=True,
)
AVX512 = ProcessorProfile(
    fused_attention=False,
    single_query_by_products=True,
    bfloat16_in_pairs=True,
    max_blocked_weight=2**20,
    few_rows_only=False,
)
OTHER = ProcessorProfile(
    fused_attention=True,
    single_query_by_products=True,
    bfloat16_in_pairs=False,
    max_blocked_weight=2**62,
    few_rows_only=False,
)


def _detect() -> ProcessorProfile:
    if "GenuineIntel" in processor_facts().get("vendor_id", platform.processor()):
        return INTEL
    return AVX512 if torch.backends.cpu.get_cpu_capability() == "AVX512" else OTHER


CURRENT = _detect()
"""The profile of this machine."""
