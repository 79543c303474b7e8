"""Every error this package raises on purpose.

Each is a :class:`RapidError` and the builtin exception a caller would expect, so that both
``except RapidError`` and ``except ValueError`` work. Messages say what arrived, what is allowed, what to do.
"""


class RapidError(Exception):
    """Base of every error this package raises."""


class ConfigurationError(RapidError, ValueError):
    """An option is unknown, out of range, or contradicts another."""


class ShapeMismatchError(RapidError, ValueError):
    """Two tensors that must agree in shape do not."""


class UnsupportedModelError(RapidError, ValueError):
    """A model cannot run in this engine, for example because its state cannot be rolled back."""


class VocabularyMismatchError(RapidError, ValueError):
    """Target and drafter do not share a vocabulary."""


class ContextLengthError(RapidError, ValueError):
    """A prompt and the tokens asked for do not fit into the model's context window."""


class PromptError(RapidError, ValueError):
    """A prompt is empty or cannot be rendered with the model's chat template."""


class ToolCallError(RapidError, ValueError):
    """An answer was to call a tool and did not."""


class DocumentError(RapidError, ValueError):
    """A document cannot be read: its file, or what an index keeps of it."""


class RetrievalError(RapidError, RuntimeError):
    """A retriever or an index is unusable.

    Raised at set-up, and where what is to be read depends on what is found; elsewhere a failure during an
    answer only falls back.
    """


class GenerationError(RapidError, RuntimeError):
    """The engine failed on one request. The original exception is the cause."""


class EngineMemoryError(GenerationError, MemoryError):
    """A request did not fit into memory, even after cached prefixes were freed."""


class EngineClosedError(RapidError, RuntimeError):
    """The engine was closed before or while a request ran."""


class QueueFullError(RapidError, RuntimeError):
    """The engine's bounded queue takes no more requests."""


class DeadlineExceededError(RapidError, TimeoutError):
    """A request ran past its ``timeout_s``."""
