"""The LLMs inside what LangChain wraps around them: bindings, retries, fallbacks, configurable fields."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import merge_configs
from langchain_core.runnables.configurable import DynamicRunnable

Place = Callable[[Any, Mapping[str, Any], bool], Runnable[Any, Any]]
"""From an LLM, the arguments bound to it, and whether it is a fallback, to what takes its place."""


def replace_llms(
    runnable: Any,
    config: RunnableConfig | None,
    place: Place,
    *,
    unbound: Collection[str] = (),
    bound: Mapping[str, Any] | None = None,
    fallback: bool = False,
) -> Runnable[Any, Any]:
    """``runnable`` with others in the place of its LLMs.

    Args:
        runnable: An LLM, or what LangChain made of one or more.
        config: Chooses among what is configurable; ``None`` chooses the defaults.
        place: Says what takes an LLM's place.
        unbound: Arguments that ``place`` binds anew where they were bound outside.
        bound: What was bound outside.
        fallback: Whether the runnable is one.
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
