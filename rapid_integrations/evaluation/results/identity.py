"""The identity of a run: everything its answers depend on. An interrupted run may continue if it is equal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from rapid_integrations.config import GenerationOptions
from rapid_integrations.engine.cache.fingerprint import fingerprint
from rapid_integrations.evaluation.methods.method import Method
from rapid_integrations.evaluation.methods.settings import Setting
from rapid_integrations.evaluation.results.environment import machine, package_versions
from rapid_integrations.evaluation.tasks.records import brief
from rapid_integrations.evaluation.tasks.sources import content_digest
from rapid_integrations.pipeline import RapidPipeline


def run_identity(
    pipeline: RapidPipeline,
    methods: Sequence[Method],
    settings: Sequence[Setting],
    options: GenerationOptions,
    prompt_template: str,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Models, options, methods, settings, tasks, versions and hardware of a run.

    Args:
        pipeline: The models; their weights are read once.
        methods: The methods.
        settings: The settings, as :func:`make_settings` makes them.
        options: The options that the settings change.
        prompt_template: The template for tasks without one.
        about: The tasks, as the report's settings describe them.

    Returns:
        JSON data.

    Raises:
        ConfigurationError: A model's weights are not in memory.
    """
    target, drafter = pipeline.engine.target, pipeline.engine.drafter
    tokenizer = pipeline.tokenizer
    # In a separate thread, because OpenMP keeps a pool for every thread that computes, and a pool beside the
    # engine's would slow down the answers.
    with ThreadPoolExecutor(1, thread_name_prefix="fingerprint") as thread:
        described = [
            {
                "name": model.name,
                "fingerprint": thread.submit(fingerprint, model.model, model.kv_dtype).result(),
            }
            for model in (target, drafter)
            if model is not None
        ]
    identity = {
        "target": described[0],
        "drafter": described[1] if len(described) > 1 else None,
        "kv_dtype": None if target.kv_dtype is None else str(target.kv_dtype).removeprefix("torch."),
        "tokenizer": content_digest((sorted(tokenizer.get_vocab().items()), tokenizer.chat_template)),
        "chat_template": pipeline.chat_template,
        "retriever": pipeline.drafter_context.name,
        "options": options.flat(),
        "prompt_template": prompt_template,
        "methods": [method.name for method in methods],
        "method_options": {method.name: _own_options(method) for method in methods},
        "retrieval": list(dict.fromkeys(setting.retrieval for setting in settings)),
        "sweep": {
            name: list(dict.fromkeys(setting.options[name] for setting in settings))
            for name in settings[0].options
        },
        "retrievers": list(dict.fromkeys(setting.retriever for setting in settings)),
        "tasks": dict(about),
        "device": str(target.device),
        "machine": {name: what for name, what in machine(target.device).items() if name != "system"},
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def differences(then: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """The differences of two identities, in words. Locations of equal models and of data are ignored.

    Args:
        then: The earlier identity.
        now: The present one.
        path: The position of these parts within their identities.
    """
    found = []
    for name in dict.fromkeys((*then, *now)):
        where = f"{path}{name}"
        old, new = then.get(name), now.get(name)
        if old == new or where == "tasks.data":
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            if old.get("fingerprint", 0) == new.get("fingerprint", 1):
                continue
            found += differences(old, new, f"{where}.")
        else:
            found.append(f"{where} was {brief(old)} and is {brief(new)}")
    return found


def _own_options(method: Method) -> dict[str, Any]:
    """The options that a method changes from the defaults."""
    default = GenerationOptions()
    own = method.in_force(default).flat()
    return {name: own[name] for name, value in default.flat().items() if own[name] != value}
