"""Checks that the option classes share: one value of one option, and the names of keyword arguments."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable

from rapid_integrations.errors import ConfigurationError


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise if an option has a value that is not allowed.

    Args:
        condition: Whether the value is allowed.
        name: The option, for the message.
        value: The value that was given.
        allowed: The allowed values in words: ``"an integer >= 1"``.

    Raises:
        ConfigurationError: ``condition`` is false.
    """
    if not condition:
        raise ConfigurationError(f"{name}={value!r} is not allowed: {name} must be {allowed}.")


def is_int(value: object, minimum: int) -> bool:
    """Whether ``value`` is an integer of at least ``minimum``; ``True`` and ``False`` are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number; ``True`` and ``False`` are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def refuse_unknown(names: Iterable[str], allowed: Collection[str], where: str) -> None:
    """Raise for keyword arguments that would otherwise be ignored.

    Args:
        names: The names that were given.
        allowed: The names that are known.
        where: The function or class that was called, for the message.

    Raises:
        ConfigurationError: A name is unknown. The message suggests the most similar known name.
    """
    if unknown := sorted(set(names) - set(allowed)):
        described = []
        for name in unknown:
            similar = difflib.get_close_matches(name, allowed, 1)
            described.append(f"{name} (did you mean {similar[0]}?)" if similar else name)
        raise ConfigurationError(
            f"{where} does not take {', '.join(described)}: allowed are {', '.join(sorted(allowed))}."
        )
