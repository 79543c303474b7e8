"""Replaces the LLMs inside LangChain's wrappers: bindings, retries, fallbacks, configurable fields.

The question-answering chain uses it to check its LLMs and to bind them to a question.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import merge_configs
from langchain_core.runnables.configurable import DynamicRunnable

Replace = Callable[[Any, Mapping[str, Any], bool], Runnable[Any, Any]]
"""Maps an LLM, the arguments bound to it, and whether it is a fallback, to its replacement."""


def replace_llms(
    runnable: Any,
    config: RunnableConfig | None,
    replace: Replace,
    *,
    unbound: Collection[str] = (),
    bound: Mapping[str, Any] | None = None,
    is_fallback: bool = False,
) -> Runnable[Any, Any]:
    """A copy of ``runnable`` with its LLMs replaced.

    Args:
        runnable: An LLM, possibly inside LangChain's wrappers.
        config: Selects configurable alternatives; ``None`` selects the defaults.
        replace: Returns the replacement of an LLM.
        unbound: Names of bound arguments that are removed, because ``replace`` binds them itself.
        bound: Arguments that wrappers around ``runnable`` bind.
        is_fallback: Whether ``runnable`` is a fallback.
    """
    bound = bound or {}

    def replace_in(
        part: Any,
        *,
        config: RunnableConfig | None = config,
        bound: Mapping[str, Any] = bound,
        is_fallback: bool = is_fallback,
    ) -> Runnable[Any, Any]:
        return replace_llms(part, config, replace, unbound=unbound, bound=bound, is_fallback=is_fallback)

    match runnable:
        case RunnableBindingBase():
            kept = {name: value for name, value in runnable.kwargs.items() if name not in unbound}
            merged = merge_configs(runnable.config, config)
            inner = replace_in(runnable.bound, config=merged, bound={**runnable.kwargs, **bound})
            return runnable.model_copy(update={"bound": inner, "kwargs": kept})
        case RunnableWithFallbacks():
            first = replace_in(runnable.runnable)
            fallbacks = [replace_in(fallback, is_fallback=True) for fallback in runnable.fallbacks]
            return runnable.model_copy(update={"runnable": first, "fallbacks": fallbacks})
        case DynamicRunnable():  # configurable fields or alternatives
            chosen, chosen_config = runnable.prepare(config)
            inner = replace_in(chosen, config=chosen_config)
            return inner.with_config(runnable.config) if runnable.config else inner
        case _:
            return replace(runnable, bound, is_fallback)
