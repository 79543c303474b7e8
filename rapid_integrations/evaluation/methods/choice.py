"""All methods by name."""

from __future__ import annotations

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.methods.engine_methods import ENGINE_METHODS
from rapid_integrations.evaluation.methods.generate import TransformersGenerate
from rapid_integrations.evaluation.methods.method import Method

METHOD_NAMES = (
    "lc",
    "rag",
    "sd",
    "streaming",
    "rapid",
    "rapid-fixed",
    "rapid-paper",
    "mixture",
    "generate",
)


def make_method(name: str) -> Method:
    """Find or make a method by its name.

    Args:
        name: One of :data:`METHOD_NAMES`.

    Raises:
        ConfigurationError: The name is unknown.
    """
    for method in ENGINE_METHODS:
        if method.name == name:
            return method
    if name == TransformersGenerate.name:
        return TransformersGenerate()
    raise ConfigurationError(f"there is no method {name!r}: allowed are {', '.join(METHOD_NAMES)}.")
