"""Checks that the option classes share: one value of one option, and the names of keyword arguments."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable
from typing import Any

from rapid_integrations.errors import ConfigurationError


def check(options: object, **conditions: tuple[bool, str]) -> None:
    """Raise if an option has a value that is not allowed.

    Args:
        options: The object that has the options as attributes.
        **conditions: For each option, whether its value is allowed, and the allowed values in words::

            check(self, top_k=(is_int(self.top_k, 1), "an integer >= 1"))

    Raises:
        ConfigurationError: A condition does not hold.
    """
    for name, (holds, allowed) in conditions.items():
        if not holds:
            raise not_allowed(name, getattr(options, name), allowed)


def not_allowed(name: str, value: object, allowed: str) -> ConfigurationError:
    """The error for an option that has another value than those ``allowed``, which are given in words."""
    return ConfigurationError(f"{name}={value!r} is not allowed: {name} must be {allowed}.")


def is_int(value: object, minimum: int) -> bool:
    """Whether ``value`` is an integer of at least ``minimum``; ``True`` and ``False`` are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_number(value: object, minimum: float = -math.inf) -> bool:
    """Whether ``value`` is a finite number of at least ``minimum``; ``True`` and ``False`` are not."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return math.isfinite(value) and value >= minimum


def is_positive(value: Any) -> bool:
    """Whether ``value`` is a finite number above 0."""
    return is_number(value, 0) and value != 0


def is_fraction(value: Any) -> bool:
    """Whether ``value`` is a number in [0, 1]."""
    return is_number(value, 0) and value <= 1


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
