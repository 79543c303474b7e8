"""The engine's public interface: submit requests from any thread, get their events, close.

One worker thread owns the models and runs :class:`~rapid_integrations.engine.scheduler.Scheduler`. All other
threads only touch the :class:`~rapid_integrations.engine.requests.RequestQueue`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from rapid_integrations.config import EngineLimits
from rapid_integrations.engine.cache.prefix_cache import PrefixCache
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.requests import Listener, Request, RequestHandle, RequestQueue
from rapid_integrations.engine.scheduler import Scheduler
from rapid_integrations.errors import ContextLengthError, PromptError, VocabularyMismatchError

# Embedding matrices of one vocabulary are padded to different multiples. A larger difference is another
# vocabulary.
_MAX_PADDING = 1024


class Engine:
    """Serves requests on one target and one drafter.

    Args:
        target: The target model.
        drafter: The drafter; the same object as ``target`` for self-speculation; ``None`` for plain decoding.
        limits: Limits on memory, batch and queue.

    Raises:
        VocabularyMismatchError: The models' vocabularies differ in size by more than padding.
        ConfigurationError: ``limits.prefix_cache_dir`` or ``limits.cuda_graph_tokens`` cannot be used.
    """

    def __init__(
        self, target: CausalModel, drafter: CausalModel | None, *, limits: EngineLimits | None = None
    ) -> None:
        if drafter is not None and abs(target.vocab_size - drafter.vocab_size) > _MAX_PADDING:
            raise VocabularyMismatchError(
                f"target '{target.name}' has {target.vocab_size:,} tokens, drafter '{drafter.name}' "
                f"{drafter.vocab_size:,}: they must share one vocabulary. Choose a drafter of its family."
            )
        self.target = target
        self.drafter = drafter
        self.limits = limits or EngineLimits()
        self._queue = RequestQueue(self.limits.max_queued_requests)
        self._scheduler = Scheduler(target, drafter, self.limits, self._queue)
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, request: Request, listener: Listener) -> RequestHandle:
        """Queue a request.

        Args:
            request: The prompts and parameters.
            listener: Called with every event, in order, in the worker thread. It must return at once.

        Returns:
            A handle that cancels the request.

        Raises:
            PromptError: A prompt is empty.
            ContextLengthError: A prompt and its answer do not fit into the model's context window.
            QueueFullError: Too many requests wait.
            EngineClosedError: The engine is closed.
        """
        max_new_tokens = request.sampling.max_new_tokens
        _check_fits("prompt", request.target_tokens, self.target, max_new_tokens)
        if request.drafter_tokens is not None:
            drafter = self.drafter or self.target
            _check_fits("drafter's prompt", request.drafter_tokens, drafter, max_new_tokens)
        handle = RequestHandle(request, listener)
        self._queue.put(handle)
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._scheduler.run, name="rapid-engine", daemon=True)
                self._thread.start()
        return handle

    def close(self) -> None:
        """Fail all running requests, end the worker, and wait until prefixes are written. Idempotent."""
        self._queue.close()
        with self._starting:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    @property
    def prefix_cache(self) -> PrefixCache:
        """The KV of earlier requests, kept for later ones."""
        return self._scheduler.prefix_cache

    @property
    def vocab_size(self) -> int:
        """The number of tokens that both models know, padding included."""
        return self._scheduler.decoder.vocab_size

    @property
    def closed(self) -> bool:
        """Whether it takes no further requests: it was closed, or its worker failed."""
        return self._queue.closed

    @property
    def num_running(self) -> int:
        """The number of requests that hold memory: in prefill, waiting for a load, or decoding."""
        return self._scheduler.num_running


def _check_fits(what: str, tokens: Sequence[int], model: CausalModel, max_new_tokens: int) -> None:
    if not tokens:
        raise PromptError(f"the {what} is empty: it needs at least one token.")
    allowed = model.context_window - max_new_tokens
    if len(tokens) > allowed:
        raise ContextLengthError(
            f"the {what} has {len(tokens):,} tokens; '{model.name}' takes {max(allowed, 0):,} "
            f"({model.context_window:,} less max_new_tokens={max_new_tokens:,}). Shorten the context or "
            "lower max_new_tokens."
        )
