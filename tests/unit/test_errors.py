"""Every error is a RapidError and the builtin exception that a caller would expect."""

import inspect

import pytest

from rapid_integrations import errors

BUILTINS = {
    "ConfigurationError": ValueError,
    "ShapeMismatchError": ValueError,
    "UnsupportedModelError": ValueError,
    "VocabularyMismatchError": ValueError,
    "ContextLengthError": ValueError,
    "PromptError": ValueError,
    "ToolCallError": ValueError,
    "DocumentError": ValueError,
    "RetrievalError": RuntimeError,
    "GenerationError": RuntimeError,
    "EngineMemoryError": MemoryError,
    "EngineClosedError": RuntimeError,
    "QueueFullError": RuntimeError,
    "DeadlineExceededError": TimeoutError,
}


def test_every_error_class_is_listed() -> None:
    defined = {name for name, kind in inspect.getmembers(errors, inspect.isclass)} - {"RapidError"}
    assert defined == BUILTINS.keys()


@pytest.mark.parametrize("name", BUILTINS)
def test_an_error_is_a_rapid_error_and_a_builtin(name: str) -> None:
    kind = getattr(errors, name)
    assert kind.__doc__
    with pytest.raises(errors.RapidError, match=r"^message$"):
        raise kind("message")
    with pytest.raises(BUILTINS[name], match=r"^message$"):
        raise kind("message")
