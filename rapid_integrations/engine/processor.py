"""What the operating system says of the processor."""

from __future__ import annotations


def processor_facts() -> dict[str, str]:
    """The fields of ``/proc/cpuinfo``, of each the first value; none where there is no such file."""
    facts: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                facts.setdefault(name.strip(), value.strip())
    except OSError:
        return {}
    return facts
