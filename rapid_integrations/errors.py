"""The errors that this package raises on purpose.

Each is a :class:`RapidError` and also the builtin exception that a caller would expect, so that both
``except RapidError`` and ``except ValueError`` work. A message gives the value that arrived, the values that
are allowed, and the action to take.
"""


class RapidError(Exception):
    """Base class of all errors of this package."""


class ConfigurationError(RapidError, ValueError):
    """An option is unknown, not allowed, or contradicts another."""


class ShapeMismatchError(RapidError, ValueError):
    """Two tensors that must have the same shape have different shapes."""


class UnsupportedModelError(RapidError, ValueError):
    """A model cannot run in this engine, for example because its state cannot be rolled back."""


class VocabularyMismatchError(RapidError, ValueError):
    """Target and drafter do not share a vocabulary."""


class ContextLengthError(RapidError, ValueError):
    """A prompt and ``max_new_tokens`` together exceed the model's context window."""


class PromptError(RapidError, ValueError):
    """A prompt is empty or cannot be rendered with the model's chat template."""


class ToolCallError(RapidError, ValueError):
    """An answer contains no tool call although one was required."""


class DocumentError(RapidError, ValueError):
    """A document's file, or its entry in an index, cannot be read."""


class RetrievalError(RapidError, RuntimeError):
    """A retriever or an index is unusable.

    Raised at set-up, and where the document itself is chosen by retrieval. A retriever that fails during any
    other answer raises nothing: the drafter reads the start and the end of the document instead.
    """


class GenerationError(RapidError, RuntimeError):
    """The engine failed on one request. The original exception is its ``__cause__``."""


class EngineMemoryError(GenerationError, MemoryError):
    """A request did not fit into memory, even after all cached prefixes were freed."""


class EngineClosedError(RapidError, RuntimeError):
    """The engine was closed before or while a request ran."""


class QueueFullError(RapidError, RuntimeError):
    """The engine's queue is full, see ``EngineLimits.max_queued_requests``."""


class DeadlineExceededError(RapidError, TimeoutError):
    """A request took longer than its ``timeout_s``."""
