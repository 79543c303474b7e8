"""Parsing option values that typer does not parse: lengths, lists, probabilities; checks of output paths."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast, get_args

from rapid_integrations.errors import ConfigurationError

RetrievalName = Literal["natural", "gold", "missing", "unrelated", "adversarial"]


def parse_contexts(value: str) -> list[int]:
    """Context lengths in tokens: ``"1k,4k,600"`` is ``[1024, 4096, 600]``.

    Raises:
        ConfigurationError: A part is not a positive number, or a length occurs twice.
    """
    contexts = []
    for part in (part.strip().lower() for part in value.split(",")):
        digits = part.removesuffix("k")
        if not digits.isdecimal() or int(digits) == 0:
            raise ConfigurationError(
                f"the context length {part!r} is not allowed: write tokens, such as "
                "600 or 4k, separated by commas."
            )
        contexts.append(int(digits) * (1024 if part.endswith("k") else 1))
    if len(set(contexts)) < len(contexts):
        raise ConfigurationError(f"the context lengths {value!r} contain a length twice: give each once.")
    return contexts


def parse_context(option: str, value: str) -> int:
    """One context length in tokens.

    Raises:
        ConfigurationError: It is not a positive number, or there are several.
    """
    lengths = parse_contexts(value)
    if len(lengths) > 1:
        raise ConfigurationError(f"--{option} {value!r} gives several lengths: give one.")
    return lengths[0]


def parse_probabilities(option: str, value: str) -> tuple[float, ...]:
    """Probabilities: ``"0.8,.9"`` is ``(0.8, 0.9)``.

    Raises:
        ConfigurationError: A part is not a number from 0 to 1, or there is none.
    """
    names = parse_names(value)
    try:
        probabilities = tuple(dict.fromkeys(float(name) for name in names))
    except ValueError:
        probabilities = ()
    if not probabilities or not all(0 <= probability <= 1 for probability in probabilities):
        raise ConfigurationError(
            f"--{option} {value!r} is not allowed: write numbers from 0 to 1, separated by commas."
        )
    return probabilities


def parse_draft_tokens(value: str) -> int | None:
    """A number of draft tokens; ``"auto"`` is ``None``: chosen in every round.

    Raises:
        ConfigurationError: The value is neither.
    """
    if value == "auto":
        return None
    if not value.isdecimal():
        raise ConfigurationError(
            f"--num-draft-tokens {value} is not allowed: give a whole number >= 0, or "
            "'auto' to choose every round."
        )
    return int(value)


def check_writable(json_file: Path | None, plot_folder: Path | None = None) -> None:
    """Check before measuring that results can be written.

    Raises:
        ConfigurationError: A path has the wrong kind, or its folder does not exist.
    """
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise ConfigurationError(
            f"--json '{json_file}' cannot be written: it is a folder, or its folder does not exist."
        )
    if plot_folder is not None and plot_folder.exists() and not plot_folder.is_dir():
        raise ConfigurationError(f"--plot '{plot_folder}' is a file: name a folder.")


def parse_names(value: str) -> tuple[str, ...]:
    """Comma-separated names without repetitions; the empty text has none."""
    names = (part.strip().lower() for part in value.split(","))
    return tuple(dict.fromkeys(name for name in names if name))


def parse_batches(value: str) -> tuple[int, ...]:
    """Numbers of questions: ``"1,2,8"`` is ``(1, 2, 8)``.

    Raises:
        ConfigurationError: A part is not a positive number.
    """
    names = parse_names(value)
    if not names or not all(name.isdecimal() and int(name) for name in names):
        raise ConfigurationError(
            f"the batches {value!r} are not allowed: write whole numbers >= 1, separated by commas."
        )
    return tuple(dict.fromkeys(int(name) for name in names))


def parse_retrievals(value: str) -> tuple[RetrievalName, ...]:
    """Comma-separated qualities of retrieval.

    Raises:
        ConfigurationError: A name is unknown, or there is none.
    """
    names = parse_names(value)
    allowed = get_args(RetrievalName)
    if not names or set(names) - set(allowed):
        raise ConfigurationError(
            f"--retrieval {value!r} is not allowed: name one or more of {', '.join(allowed)}, with commas "
            "between."
        )
    return cast("tuple[RetrievalName, ...]", names)
