"""What decides a run's answers: two runs of one identity may be one run that was interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from rapid_integrations.config import GenerationOptions
from rapid_integrations.engine.cache.fingerprint import fingerprint
from rapid_integrations.evaluation.methods import Method
from rapid_integrations.evaluation.report import machine, package_versions
from rapid_integrations.evaluation.settings import Setting
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
    """Models, options, methods, settings, tasks, versions, and what the times depend on.

    Args:
        pipeline: The models; their weights are read once.
        methods: All that are asked.
        settings: All that they are asked in, as :func:`make_settings` makes them.
        options: Those that the settings change.
        prompt_template: Where a task has none.
        about: The tasks, as the report's settings describe them.

    Returns:
        Plain data that JSON can hold.

    Raises:
        ConfigurationError: A model's weights are not in memory.
    """
    target, drafter = pipeline.engine.target, pipeline.engine.drafter
    tokenizer = pipeline.tokenizer
    # A thread of its own: OpenMP keeps a pool for every thread that computes, and one beside the engine's
    # would slow the answers.
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
    """What differs between two identities, in words; where equal models and the data lie is left out.

    Args:
        then: One identity.
        now: The other.
        path: Where in an identity these are.
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
    """What a method makes of the default options, where it leaves them."""
    default = GenerationOptions()
    own = method.in_force(default).flat()
    return {name: own[name] for name, value in default.flat().items() if own[name] != value}
