"""The models of a command: the bundled pair, or models that were named on the command line."""

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
    """Suppress the progress bars, log lines and warnings of the libraries that load models."""
    import warnings

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # untyped in transformers
    if not sys.stderr.isatty():  # a terminal shows the progress of a download
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # as above
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # as above
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


def check_demo_options(
    drafter: str | None,
    dtype: str | None,
    gguf_file: str | None = None,
    drafter_gguf_file: str | None = None,
) -> None:
    """Refuse options that do not exist for the bundled pair.

    Raises:
        ConfigurationError: ``drafter`` is not one of its drafters, or ``dtype`` or a GGUF file is given.
    """
    if gguf_file is not None or drafter_gguf_file is not None:
        raise ConfigurationError(
            "--gguf-file and --drafter-gguf-file name files in the folder or hub repository of --target and "
            "--drafter: give --target too."
        )
    if drafter not in (None, "small", "self") or dtype is not None:
        raise ConfigurationError(
            "without --target the demo pair answers: --drafter is then 'small' or 'self', and "
            "--dtype is fixed."
        )


def load_pipeline(
    target: str | None,
    drafter: str | None,
    options: Mapping[str, Any],
    *,
    dtype: str | None = None,
    gguf_file: str | None = None,
    drafter_gguf_file: str | None = None,
    **loading: Any,
) -> RapidPipeline:
    """Load the bundled pair, or the models that were named.

    Args:
        target: Hub id, folder or GGUF file; ``None`` is the bundled pair.
        drafter: Hub id, folder or GGUF file, ``"self"`` or ``None``; with the bundled pair ``"small"``,
            ``"self"`` or ``None``.
        options: Flat generation options.
        dtype: Number format of the weights; ``None`` with the bundled pair.
        gguf_file: GGUF file in the target's folder or repository; ``None`` with the bundled pair.
        drafter_gguf_file: The same for the drafter.
        **loading: Other fields of :class:`~rapid_integrations.loading_options.LoadingOptions`.

    Raises:
        RapidError: The models cannot be loaded, or do not match.
    """
    from rapid_integrations.config import GenerationOptions
    from rapid_integrations.pipeline import RapidPipeline

    if target is None:
        check_demo_options(drafter, dtype, gguf_file, drafter_gguf_file)
        return RapidPipeline.demo(self_speculation=drafter == "self", **loading, **options)
    with loading_errors(target, drafter):
        return RapidPipeline.from_pretrained(
            target,
            None if drafter == "self" else drafter,
            options=GenerationOptions().override(**options),
            dtype=dtype,
            gguf_file=gguf_file,
            drafter_gguf_file=drafter_gguf_file,
            **loading,
        )


@contextmanager
def loading_errors(target: str, drafter: str | None) -> Iterator[None]:
    """Turn transformers' errors for a missing or unknown model into one line.

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
            if path is not None and path.startswith(("/", ".", "~")) and not Path(path).exists():
                reason = f"there is no folder '{path}'."
        raise ConfigurationError(f"'{names}' cannot be loaded: {reason}") from error
