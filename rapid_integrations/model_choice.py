"""The models that the commands run on: the bundled pair, or those that were named."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapid_integrations.errors import ConfigurationError, RapidError

if TYPE_CHECKING:
    from rapid_integrations.pipeline import RapidPipeline


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' own progress bars, log lines and warnings out of the output."""
    import warnings

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # untyped in transformers
    if not sys.stderr.isatty():  # on a terminal a download's progress is worth seeing
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # as above
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # as above
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


def check_demo_options(drafter: str | None, dtype: str | None) -> None:
    """Refuse what the bundled pair cannot be asked for.

    Raises:
        ConfigurationError: Its drafter or its number format was changed.
    """
    if drafter not in (None, "small", "self") or dtype is not None:
        raise ConfigurationError(
            "without --target the demo pair answers: --drafter is then 'small' or 'self', and "
            "--dtype is fixed."
        )


def load_pipeline(
    target: str | None,
    drafter: str | None,
    embeddings: str | None,
    dtype: str | None,
    options: Mapping[str, Any],
    prefix_cache_dir: Path | None = None,
    drafter_quantization: str | None = None,
    kv_dtype: str | None = None,
) -> RapidPipeline:
    """The demo pair, or the models that were named.

    Raises:
        RapidError: They cannot be loaded, or do not fit each other.
    """
    from rapid_integrations.config import EngineLimits, GenerationOptions
    from rapid_integrations.pipeline import RapidPipeline

    limits = EngineLimits(prefix_cache_dir=None if prefix_cache_dir is None else str(prefix_cache_dir))
    if target is None:
        check_demo_options(drafter, dtype)
        return RapidPipeline.demo(
            self_speculation=drafter == "self",
            drafter_quantization_config=drafter_quantization,
            embeddings=embeddings,
            limits=limits,
            kv_dtype=kv_dtype,
            **options,
        )
    with loading_errors(target, drafter):
        return RapidPipeline.from_pretrained(
            target,
            None if drafter == "self" else drafter,
            embeddings=embeddings,
            dtype=None if dtype is None else str(dtype),
            drafter_quantization_config=drafter_quantization,
            options=GenerationOptions().override(**options),
            limits=limits,
            kv_dtype=kv_dtype,
        )


@contextmanager
def loading_errors(target: str, drafter: str | None) -> Iterator[None]:
    """Raise what transformers raises for a model that is not there, or not one it knows, in one line.

    Raises:
        ConfigurationError: Names the models and the reason.
    """
    try:
        yield
    except RapidError:
        raise
    except (OSError, ValueError) as error:
        names = target if drafter is None else f"{target}' and '{drafter}"
        reason = str(error).strip().split("\n")[0]
        for path in (target, drafter):
            if path is not None and path.startswith(("/", ".", "~")) and not Path(path).is_dir():
                reason = f"there is no folder '{path}'."
        raise ConfigurationError(f"'{names}' cannot be loaded: {reason}") from error
