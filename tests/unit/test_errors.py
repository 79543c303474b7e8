"""Every error is a RapidError and the builtin that a caller would expect."""

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


def test_the_list_is_complete() -> None:
    defined = {name for name, kind in inspect.getmembers(errors, inspect.isclass)} - {"RapidError"}
    assert defined == BUILTINS.keys()


@pytest.mark.parametrize("name", BUILTINS)
def test_errors_can_be_caught_either_way(name: str) -> None:
    kind = getattr(errors, name)
    assert kind.__doc__
    with pytest.raises(errors.RapidError, match=r"^told$"):
        raise kind("told")
    with pytest.raises(BUILTINS[name], match=r"^told$"):
        raise kind("told")
