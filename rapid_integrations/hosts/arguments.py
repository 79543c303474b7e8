"""The keyword arguments of an LLM's constructor, checked, with nothing ignored."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

from rapid_integrations.config import EngineLimits, GenerationOptions, kv_dtype_name
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.hosts.base import LOADING_NAMES, changed_loading, is_pipeline
from rapid_integrations.hosts.call import OPTION_NAMES, describe_type, refuse_unknown, rename_synonyms
from rapid_integrations.tools.formats import check_format_name


def prepare_arguments(arguments: Mapping[str, Any], allowed: set[str], owner: str) -> dict[str, Any]:
    """The keyword arguments of ``owner``'s constructor, checked and normalised.

    Raises:
        ConfigurationError: One is unknown, missing, given twice, out of range, or contradicts another.
    """
    named = rename_synonyms(arguments)
    refuse_unknown(named, allowed, owner)
    for name in ("stop", "metadata", "messages_to_prompt", "completion_to_prompt"):
        if named.get(name, ...) is None:
            del named[name]
    target = named.get("target")
    if target is None:
        raise ConfigurationError(
            f"{owner} needs a target: a Hugging Face id, a folder, a RapidPipeline, or a loaded model "
            f"together with tokenizer=. {owner}.demo() runs on the packaged pair."
        )
    for name in ("target", "drafter"):
        if isinstance(named.get(name), PathLike):
            named[name] = fspath(named[name])
    if is_pipeline(target):
        if set_twice := sorted(set(changed_loading(named)) & set(LOADING_NAMES) - {"target"}):
            raise ConfigurationError(
                f"{', '.join(set_twice)} cannot be given together with a RapidPipeline, whose models are "
                "loaded."
            )
    elif not isinstance(named["target"], str) and named.get("tokenizer") is None:
        raise ConfigurationError(f"target is {describe_type(target)}: a loaded model needs tokenizer= too.")
    for name in ("dtype", "drafter_dtype"):
        if named.get(name) is not None:
            named[name] = str(named[name]).removeprefix("torch.")
    if isinstance(limits := named.get("limits"), Mapping):
        named["limits"] = EngineLimits(**limits)
    return _with_normalised_options(named)


def check_update(arguments: Mapping[str, Any], allowed: set[str], owner: str) -> dict[str, Any]:
    """Changes to the fields of ``owner``, checked and normalised like the constructor's arguments.

    Raises:
        ConfigurationError: One is unknown or out of range.
    """
    named = rename_synonyms(arguments)
    refuse_unknown(named, allowed, owner)
    return _with_normalised_options(named)


def _with_normalised_options(named: dict[str, Any]) -> dict[str, Any]:
    options = GenerationOptions().override(**{n: value for n, value in named.items() if n in OPTION_NAMES})
    check_format_name(named.get("tool_format"))
    if "kv_dtype" in named:
        named["kv_dtype"] = kv_dtype_name(named["kv_dtype"])
    return named | {name: value for name, value in options.flat().items() if name in named}
