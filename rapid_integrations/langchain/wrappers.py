"""Finding the LLMs inside LangChain's wrappers: bindings, retries, fallbacks, configurable fields."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import merge_configs
from langchain_core.runnables.configurable import DynamicRunnable

Place = Callable[[Any, Mapping[str, Any], bool], Runnable[Any, Any]]
"""Maps an LLM, the arguments bound to it, and whether it is a fallback, to its replacement."""


def replace_llms(
    runnable: Any,
    config: RunnableConfig | None,
    place: Place,
    *,
    unbound: Collection[str] = (),
    bound: Mapping[str, Any] | None = None,
    fallback: bool = False,
) -> Runnable[Any, Any]:
    """A copy of ``runnable`` with its LLMs replaced.

    Args:
        runnable: An LLM, possibly inside LangChain's wrappers.
        config: Selects configurable alternatives; ``None`` selects the defaults.
        place: Returns the replacement of an LLM.
        unbound: Names of arguments that are removed from bindings, because ``place`` binds them itself.
        bound: Arguments bound by outer wrappers.
        fallback: Whether ``runnable`` is a fallback.
    """
    bound = bound or {}

    def inner(
        part: Any, bound: Mapping[str, Any], fallback: bool, config: RunnableConfig | None = config
    ) -> Runnable[Any, Any]:
        return replace_llms(part, config, place, unbound=unbound, bound=bound, fallback=fallback)

    if isinstance(runnable, RunnableBindingBase):
        given = {name: value for name, value in runnable.kwargs.items() if name not in unbound}
        merged = merge_configs(runnable.config, config)
        part = inner(runnable.bound, {**runnable.kwargs, **bound}, fallback, merged)
        return runnable.model_copy(update={"bound": part, "kwargs": given})
    if isinstance(runnable, RunnableWithFallbacks):
        first = inner(runnable.runnable, bound, fallback)
        others = [inner(part, bound, True) for part in runnable.fallbacks]
        return runnable.model_copy(update={"runnable": first, "fallbacks": others})
    if isinstance(runnable, DynamicRunnable):
        chosen, chosen_config = runnable.prepare(config)
        part = inner(chosen, bound, fallback, chosen_config)
        return part.with_config(runnable.config) if runnable.config else part
    return place(runnable, bound, fallback)
