"""Options as dataclasses: each field of a command's dataclass becomes a command-line option."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from rapid_integrations.cli.parsing import parse_draft_tokens
from rapid_integrations.config import Acceptance
from rapid_integrations.errors import ConfigurationError

if TYPE_CHECKING:
    from rapid_integrations.pipeline import RapidPipeline

_Options = TypeVar("_Options")

DraftTokensOption = Annotated[
    str | None, typer.Option(metavar="N|auto", help="Draft tokens per round; 0 is plain decoding.")
]
KvDtypeOption = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option(
        help="Number format of keys and values. Default: the models' own. A narrower one takes less memory, "
        "and rounds."
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Same seed, same documents and questions.")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of the commands that load models: which models, how they decode, and what the drafter reads."""

    target: Annotated[
        str | None,
        typer.Option(
            help="Model that reads the whole document: hub id, folder or GGUF file. Default: the bundled demo"
            " pair."
        ),
    ] = None
    drafter: Annotated[
        str | None,
        typer.Option(
            help="Model that drafts: hub id, folder or GGUF file, or 'self': the target drafts for itself"
            " (default). With the demo pair: 'small' (default) or 'self'."
        ),
    ] = None
    gguf_file: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="GGUF file to load from --target's hub repository or folder."),
    ] = None
    drafter_gguf_file: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The same for --drafter, or for another copy of --target that drafts."
        ),
    ] = None
    drafter_quantization: Annotated[
        Literal["int8"] | None,
        typer.Option(help="Round the drafter's weights, on a CPU: useful if --drafter is 'self'."),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(help="Number format of --target's weights."),
    ] = None
    kv_dtype: KvDtypeOption = None
    retriever: Annotated[
        Literal["bm25", "dense"] | None,
        typer.Option(help="How the drafter's passages are found: by words, or by --embeddings."),
    ] = None
    embeddings: Annotated[
        str | None, typer.Option(help="Embedding model for dense retrieval, a sentence-transformers name.")
    ] = None
    transfer_strength: Annotated[
        float | None,
        typer.Option(help="Strength of the drafter's influence on the answer (η of the paper), from 0."),
    ] = None
    adaptive_transfer: Annotated[
        bool | None,
        typer.Option(
            "--adaptive-transfer/--fixed-transfer",
            help="Lower η where the target is sure or the drafter has not agreed with it, or keep it fixed.",
        ),
    ] = None
    num_draft_tokens: DraftTokensOption = None
    max_new_tokens: Annotated[int | None, typer.Option(help="Maximum length of an answer in tokens.")] = None

    def load_pipeline(self, generation: Mapping[str, Any], **loading: Any) -> RapidPipeline:
        """Load the models that the options name.

        Args:
            generation: Flat generation options.
            **loading: Further fields of :class:`~rapid_integrations.loading_options.LoadingOptions`.

        Raises:
            RapidError: The models cannot be loaded, or do not match.
        """
        from rapid_integrations.model_choice import load_pipeline

        return load_pipeline(
            self.target,
            self.drafter,
            generation,
            embeddings=self.embeddings,
            dtype=self.dtype,
            drafter_quantization_config=self.drafter_quantization,
            kv_dtype=self.kv_dtype,
            gguf_file=self.gguf_file,
            drafter_gguf_file=self.drafter_gguf_file,
            **loading,
        )

    def check_retriever(self) -> None:
        """Check that retriever and embeddings match.

        Raises:
            ConfigurationError: Dense retrieval has no embeddings, or BM25 has some.
        """
        if self.retriever == "dense" and not self.embeddings:
            raise ConfigurationError(
                "--retriever dense ranks passages by an embedding model: name one with --embeddings, for "
                "example BAAI/bge-m3, or use --retriever bm25."
            )
        if self.retriever == "bm25" and self.embeddings:
            raise ConfigurationError("--retriever bm25 takes no --embeddings: leave one of the two out.")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(ModelOptions):
    """Options of ``demo``, ``ask`` and ``eval``, where the acceptance rule may be chosen."""

    acceptance: Annotated[
        Acceptance | None, typer.Option(help="Rule by which draft tokens are accepted.")
    ] = None
    mixture_weight: Annotated[
        float | None, typer.Option(help="The target's share under --acceptance mixture, from 0 to 1.")
    ] = None

    def generation(self, **more: Any) -> dict[str, Any]:
        """The generation options that were given.

        Args:
            **more: Further flat options. They replace those of the command line.

        Raises:
            ConfigurationError: A value is out of range.
        """
        flat = {
            "acceptance": self.acceptance,
            "transfer_strength": self.transfer_strength,
            "adaptive_transfer": self.adaptive_transfer,
            "mixture_weight": self.mixture_weight,
            "max_new_tokens": self.max_new_tokens,
        }
        return generation_options(self.num_draft_tokens, **{**flat, **more})


def generation_options(num_draft_tokens: str | None, **flat: Any) -> dict[str, Any]:
    """The generation options that were given, validated before models are loaded.

    Args:
        num_draft_tokens: The value of ``--num-draft-tokens``.
        **flat: Flat generation options; ``None`` means not given.

    Raises:
        ConfigurationError: A value is out of range.
    """
    from rapid_integrations.config import GenerationOptions

    given = {name: value for name, value in flat.items() if value is not None}
    if num_draft_tokens is not None:
        given["num_draft_tokens"] = parse_draft_tokens(num_draft_tokens)
    GenerationOptions().override(**given)
    return given


def as_command(options: type[_Options], function: Callable[[_Options], None]) -> Callable[..., None]:
    """A function for typer that has a parameter for each field of a dataclass.

    Args:
        options: A dataclass whose fields have typer's annotations.
        function: The command. Its docstring becomes the command's help.
    """

    def command(**values: Any) -> None:
        function(options(**values))

    command.__doc__ = function.__doc__
    # typer reads the signature, with annotations that are not strings.
    types = get_type_hints(options, include_extras=True)
    fields = inspect.signature(options).parameters.values()
    parameters = [field.replace(annotation=types[field.name]) for field in fields]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = types
    return command
