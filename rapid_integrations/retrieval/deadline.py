"""Calling a retriever with a time limit, so that a slow one cannot delay an answer."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

MAX_ABANDONED = 8
"""Upper limit on calls that are still running after their time limit."""


class TimedOutError(Exception):
    """The function did not return within its time limit."""


class TooManyError(Exception):
    """The function was not called, because too many earlier calls are still running."""


class Deadline:
    """Runs a function in a separate thread, with a time limit.

    A thread that exceeds the limit keeps running, so an index that it builds is available for the next
    question. If too many such threads are running, no further function is called.
    """

    def __init__(self) -> None:
        self._abandoned = 0
        self._lock = threading.Lock()

    def run(self, function: Callable[[], Result], timeout_s: float) -> Result:
        """Call ``function`` and return its result, or raise its error.

        Args:
            function: Called without arguments, in the caller's context variables.
            timeout_s: Time limit in seconds.

        Raises:
            TimedOutError: The function is still running.
            TooManyError: :data:`MAX_ABANDONED` earlier calls are still running.
            RuntimeError: The function raised a ``BaseException`` that is not an ``Exception``.
        """
        with self._lock:
            if self._abandoned >= MAX_ABANDONED:
                raise TooManyError
        outcome: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
        given_up = threading.Event()
        # The hosts pass tracing and callbacks in context variables.
        variables = contextvars.copy_context()

        def work() -> None:
            try:
                result: Result | BaseException = variables.run(function)
            except BaseException as error:
                result = error
            with self._lock:
                outcome.put(result)
                self._abandoned -= given_up.is_set()

        threading.Thread(target=work, name="rapid-retrieval", daemon=True).start()
        try:
            result = outcome.get(timeout=timeout_s)
        except queue.Empty:
            with self._lock:
                if outcome.empty():
                    given_up.set()
                    self._abandoned += 1
                    raise TimedOutError from None
                result = outcome.get()
        if isinstance(result, Exception):
            raise result
        if isinstance(result, BaseException):
            raise RuntimeError(f"{type(result).__name__}: {result}") from result
        return result
