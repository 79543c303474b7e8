"""The options that the commands share: their types, names and help."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import typer

from rapid_integrations.errors import ConfigurationError

RetrievalName = Literal["natural", "gold", "missing", "unrelated", "adversarial"]


class Acceptance(StrEnum):
    """Values of ``--acceptance``."""

    LOSSLESS = "lossless"
    AUGMENTED = "augmented"
    MIXTURE = "mixture"
    PAPER = "paper"


class RetrieverName(StrEnum):
    """Values of ``--retriever``."""

    BM25 = "bm25"
    DENSE = "dense"


class TaskName(StrEnum):
    """Values of ``rapid eval --task``."""

    DEMO = "demo"
    RULER = "ruler"
    INFINITEBENCH = "infinitebench"
    LONGBENCH_V2 = "longbench-v2"


class Dtype(StrEnum):
    """Values of ``--dtype``."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


TargetOption = Annotated[
    str | None,
    typer.Option(
        help="Model that reads the whole document: hub id or folder. Default: the bundled demo pair."
    ),
]
DrafterOption = Annotated[
    str | None,
    typer.Option(
        help="Model that drafts: hub id or folder, or 'self': the target drafts for itself, as it does by "
        "default. With the demo pair: 'small' (default) or 'self'."
    ),
]
AcceptanceOption = Annotated[Acceptance | None, typer.Option(help="When a drafted token is accepted.")]
StrengthOption = Annotated[
    float | None, typer.Option(help="How strongly the drafter steers the answer (η of the paper), from 0.")
]
AdaptiveOption = Annotated[
    bool | None,
    typer.Option(
        "--adaptive-transfer/--fixed-transfer",
        help="Lower η where the target is sure or the drafter has not agreed with it, or keep it.",
    ),
]
MixtureOption = Annotated[
    float | None, typer.Option(help="The target's share under --acceptance mixture, from 0 to 1.")
]
DraftTokensOption = Annotated[
    str | None,
    typer.Option(metavar="N|auto", help="Tokens drafted a round; 0 decodes plainly."),
]
EmbeddingsOption = Annotated[
    str | None, typer.Option(help="Embedding model for dense retrieval, a sentence-transformers name.")
]
RetrieverOption = Annotated[
    RetrieverName | None,
    typer.Option(help="How the drafter's passages are found: by words, or by --embeddings."),
]
MaxNewTokensOption = Annotated[int | None, typer.Option(help="The longest answer in tokens.")]
PrefixCacheDirOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Keep what the models have read of long documents in this folder, for the next question.",
    ),
]
DrafterQuantizationOption = Annotated[
    Literal["int8"] | None,
    typer.Option(help="Round the drafter's weights, on a CPU: cheap where --drafter is 'self'."),
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Number format of --target's weights.")]
KvDtypeOption = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option(
        help="Number format of keys and values. Default: what the models compute in. A narrower one takes "
        "less memory, and rounds."
    ),
]


def parse_contexts(value: str) -> list[int]:
    """Context lengths in tokens: ``"1k,4k,600"`` is ``[1024, 4096, 600]``.

    Raises:
        ConfigurationError: A part is not a positive number, or comes twice.
    """
    contexts = []
    for part in (part.strip().lower() for part in value.split(",")):
        digits = part.removesuffix("k")
        if not digits.isdecimal() or int(digits) == 0:
            raise ConfigurationError(
                f"the context length {part!r} is not allowed: write tokens, such as "
                "600 or 4k, with commas between."
            )
        contexts.append(int(digits) * (1024 if part.endswith("k") else 1))
    if len(set(contexts)) < len(contexts):
        raise ConfigurationError(f"the context lengths {value!r} name one twice: name each once.")
    return contexts


def parse_context(option: str, value: str) -> int:
    """One context length in tokens.

    Raises:
        ConfigurationError: It is not a positive number, or there are several.
    """
    lengths = parse_contexts(value)
    if len(lengths) > 1:
        raise ConfigurationError(f"--{option} {value!r} names several lengths: one at a time.")
    return lengths[0]


def parse_chances(option: str, value: str) -> tuple[float, ...]:
    """Chances: ``"0.8,.9"`` is ``(0.8, 0.9)``.

    Raises:
        ConfigurationError: A part is not a number from 0 to 1, or there is none.
    """
    names = parse_names(value)
    try:
        chances = tuple(dict.fromkeys(float(name) for name in names))
    except ValueError:
        chances = ()
    if not chances or not all(0 <= chance <= 1 for chance in chances):
        raise ConfigurationError(
            f"--{option} {value!r} is not allowed: write numbers from 0 to 1 with commas between."
        )
    return chances


def parse_draft_tokens(value: str) -> int | None:
    """A number of draft tokens; ``"auto"`` is ``None``, chosen every round.

    Raises:
        ConfigurationError: It is neither.
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
    """Find out that results could not be written before they are measured.

    Raises:
        ConfigurationError: A path is of the wrong kind, or its folder does not exist.
    """
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise ConfigurationError(
            f"--json '{json_file}' cannot be written: it is a folder, or its folder does not exist."
        )
    if plot_folder is not None and plot_folder.exists() and not plot_folder.is_dir():
        raise ConfigurationError(f"--plot '{plot_folder}' is a file: name a folder.")


def parse_names(value: str) -> tuple[str, ...]:
    """Names with commas between, each once; the empty text has none."""
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
            f"the batches {value!r} are not allowed: write whole numbers >= 1 with commas between."
        )
    return tuple(dict.fromkeys(int(name) for name in names))


def parse_retrievals(value: str) -> tuple[RetrievalName, ...]:
    """Qualities of retrieval with commas between.

    Raises:
        ConfigurationError: One is unknown, or there is none.
    """
    names = parse_names(value)
    allowed = get_args(RetrievalName)
    if not names or set(names) - set(allowed):
        raise ConfigurationError(
            f"--retrieval {value!r} is not allowed: name one or more of {', '.join(allowed)}, with commas "
            "between."
        )
    return cast("tuple[RetrievalName, ...]", names)
