"""Options, as frozen dataclasses that validate themselves where they are made.

:class:`GenerationOptions` is what one request runs with; :meth:`GenerationOptions.override` takes the flat
keyword arguments of a call (``temperature=…, transfer_strength=…``) and refuses the ones it does not know.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any, Literal, get_args

from rapid_integrations.errors import ConfigurationError

Acceptance = Literal["lossless", "augmented", "mixture", "paper"]
TailRule = Literal["none", "target", "drafter"]


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigurationError(f"{name}={value!r} is not allowed: {name} must be {allowed}.")


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn, for target and drafter alike.

    Attributes:
        temperature: ``0`` is greedy; otherwise logits are divided by it.
        top_k: Keep the ``top_k`` likeliest tokens; ``None`` keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches ``top_p``, in (0, 1].
        min_p: Keep tokens at least ``min_p`` times as likely as the likeliest, in [0, 1].
        repetition_penalty: > 0; 1 is off. Above 1 makes tokens that the prompt or answer holds less likely.
        seed: Draws are a function of the seed and the output position, whatever is drafted or batched
            (plain decoding, which has no drafter, draws its own); ``None`` takes a fresh seed.
        max_new_tokens: The answer's length limit in tokens.
        stop: Strings that end the answer; they are not part of it.
        ignore_eos: Go on after an end-of-sequence token (benchmarks).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Validate every field and normalise ``stop`` to a tuple."""
        stop: Any = self.stop  # a single string is taken too
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))
        _require(
            _is_number(self.temperature) and self.temperature >= 0,
            "temperature", self.temperature, "a number >= 0 (0 is greedy)",
        )  # fmt: skip
        _require(self.top_k is None or _is_int(self.top_k, 1), "top_k", self.top_k, "an integer >= 1 or None")
        _require(
            self.top_p is None or (_is_number(self.top_p) and 0 < self.top_p <= 1),
            "top_p", self.top_p, "in (0, 1] or None",
        )  # fmt: skip
        _require(
            self.min_p is None or (_is_number(self.min_p) and 0 <= self.min_p <= 1),
            "min_p", self.min_p, "in [0, 1] or None",
        )  # fmt: skip
        _require(
            _is_number(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty", self.repetition_penalty, "a number > 0 (1 is off)",
        )  # fmt: skip
        _require(
            self.seed is None or (_is_int(self.seed, 0) and self.seed < 2**63),
            "seed", self.seed, "an integer in [0, 2**63) or None",
        )  # fmt: skip
        _require(_is_int(self.max_new_tokens, 1), "max_new_tokens", self.max_new_tokens, "an integer >= 1")
        _require(
            all(isinstance(text, str) and text for text in self.stop),
            "stop", self.stop, "non-empty strings",
        )  # fmt: skip

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class SpeculationParams:
    """How the drafter proposes and how far it is trusted.

    Attributes:
        acceptance: ``"lossless"``: the output is distributed as the target's own. ``"augmented"``: as
            autoregressive sampling from the retrieval-augmented target distribution. ``"mixture"``: as
            autoregressive sampling from ``mixture_weight · p + (1 - mixture_weight) · q``, the simple
            alternative to it. ``"paper"``: the rule as published (arXiv:2502.20330 Alg. 1, Eq. 10), whose
            output distribution is none of these.
        transfer_strength: eta >= 0 of Eq. 8, how strongly the drafter's distribution shifts the target's.
            Without effect under ``"lossless"`` and ``"mixture"``, as ``tail_rule`` is.
        mixture_weight: The target's share under ``"mixture"``, in [0, 1]: 1 is the target alone, 0 the
            drafter alone. A draft token stands with the chance ``1 - mixture_weight · TV(p, q)``, TV being
            the total variation distance.
        num_draft_tokens: gamma, the tokens drafted per round. ``None`` ends each draft where another token is
            not expected to pay, by measured costs and acceptance; ``0`` is the target's own plain decoding,
            without drafter or transfer.
        max_draft_tokens: The most that is drafted when gamma is chosen per round.
        tail_rule: Which part of the transfer is undone: ``"none"``; ``"target"``: tokens with less than a
            tenth of the largest augmented probability keep the target's weight (Eq. 9, renormalised);
            ``"drafter"``: only tokens with at least a tenth of the drafter's largest probability are shifted.
        adaptive_transfer: Under ``"augmented"``, lower eta where the target is sure, and where the drafter
            has not agreed with it so far: ``eta_t = eta · (1 - max p_t) · A_t⁸``, A being a running mean of
            the overlaps of p and q that begins at how far the drafter expects the question's words
            (:mod:`rapid_integrations.engine.decoding.transfer`). ``False`` keeps eta fixed, as published;
            ``"paper"`` always does.
    """

    acceptance: Acceptance = "augmented"
    transfer_strength: float = 10.0
    num_draft_tokens: int | None = None
    max_draft_tokens: int = 32
    tail_rule: TailRule = "none"
    adaptive_transfer: bool = True
    mixture_weight: float = 0.6

    def __post_init__(self) -> None:
        """Validate every field."""
        _require(
            self.acceptance in get_args(Acceptance),
            "acceptance", self.acceptance, f"one of {', '.join(get_args(Acceptance))}",
        )  # fmt: skip
        _require(
            _is_number(self.transfer_strength) and self.transfer_strength >= 0,
            "transfer_strength", self.transfer_strength, "a number >= 0",
        )  # fmt: skip
        _require(
            self.num_draft_tokens is None or _is_int(self.num_draft_tokens, 0),
            "num_draft_tokens", self.num_draft_tokens, "an integer >= 0, or None to choose per round",
        )  # fmt: skip
        _require(
            _is_int(self.max_draft_tokens, 1), "max_draft_tokens", self.max_draft_tokens, "an integer >= 1"
        )
        _require(
            self.tail_rule in get_args(TailRule),
            "tail_rule", self.tail_rule, f"one of {', '.join(get_args(TailRule))}",
        )  # fmt: skip
        _require(
            isinstance(self.adaptive_transfer, bool),
            "adaptive_transfer", self.adaptive_transfer, "True or False",
        )  # fmt: skip
        _require(
            _is_number(self.mixture_weight) and 0 <= self.mixture_weight <= 1,
            "mixture_weight", self.mixture_weight, "in [0, 1] (1 is the target alone)",
        )  # fmt: skip

    @property
    def effective_strength(self) -> float:
        """The transfer strength that the acceptance rule leaves in force."""
        return float(self.transfer_strength) if self.acceptance in ("augmented", "paper") else 0.0

    @property
    def adapts(self) -> bool:
        """Whether the transfer strength is lowered position by position."""
        # Under "paper" q is unknown at the bonus position, and the rule is kept as it was published.
        return self.acceptance == "augmented" and self.adaptive_transfer and self.transfer_strength > 0

    @property
    def uses_question_agreement(self) -> bool:
        """Whether it matters how far the drafter has read what the question is about."""
        return self.adapts or self.num_draft_tokens is None

    @property
    def drafter_steers(self) -> bool:
        """Whether the drafter has a say in what the output is, beyond proposing it."""
        return self.mixture_weight < 1 if self.acceptance == "mixture" else self.effective_strength > 0

    @property
    def in_force(self) -> SpeculationParams:
        """The same with what the other fields leave without effect at its default."""
        if self.num_draft_tokens == 0:
            return SpeculationParams(num_draft_tokens=0)
        default = SpeculationParams()
        changes: dict[str, Any] = {}
        if self.num_draft_tokens is not None:
            changes["max_draft_tokens"] = default.max_draft_tokens
        if self.acceptance in ("lossless", "mixture"):
            changes |= {name: getattr(default, name) for name in ("transfer_strength", "tail_rule")}
        if self.acceptance != "augmented":
            changes["adaptive_transfer"] = default.adaptive_transfer
        if self.acceptance != "mixture":
            changes["mixture_weight"] = default.mixture_weight
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class RetrievalParams:
    """What of the context the drafter reads. All lengths are in the drafter's tokens.

    Attributes:
        chunk_tokens: Length of the chunks the built-in index cuts the context into.
        min_tokens: The least retrieval budget; arXiv:2502.20330 §4.1 uses 4,096.
        context_divisor: The budget is ``max(min_tokens, context / context_divisor)``; published: 24.
        max_tokens: A fixed budget instead; ``None`` computes it.
        min_score: Chunks scored below are left out: cosine for dense retrieval (published: 0.3). ``None``
            takes 0.3 for dense retrieval and no threshold otherwise.
        timeout_s: A retriever slower than this is given up for the request, and the drafter falls back.
    """

    chunk_tokens: int = 512
    min_tokens: int = 4096
    context_divisor: float = 24.0
    max_tokens: int | None = None
    min_score: float | None = None
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        """Validate every field."""
        _require(_is_int(self.chunk_tokens, 1), "chunk_tokens", self.chunk_tokens, "an integer >= 1")
        _require(_is_int(self.min_tokens, 1), "min_tokens", self.min_tokens, "an integer >= 1")
        _require(
            _is_number(self.context_divisor) and self.context_divisor >= 1,
            "context_divisor", self.context_divisor, "a number >= 1",
        )  # fmt: skip
        _require(
            self.max_tokens is None or _is_int(self.max_tokens, 1),
            "max_tokens", self.max_tokens, "an integer >= 1 or None",
        )  # fmt: skip
        _require(
            self.min_score is None or _is_number(self.min_score),
            "min_score", self.min_score, "a number or None",
        )  # fmt: skip
        _require(
            _is_number(self.timeout_s) and self.timeout_s > 0,
            "timeout_s", self.timeout_s, "a number of seconds > 0",
        )  # fmt: skip

    def budget(self, context_tokens: int) -> int:
        """The most tokens to retrieve from a context of ``context_tokens`` tokens."""
        if self.max_tokens is not None:
            return self.max_tokens
        return max(self.min_tokens, math.ceil(context_tokens / self.context_divisor))


MAX_FORMAT_CHARS = 100_000
"""The longest schema, pattern or list of choices that is taken, in characters."""


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """What an answer has to look like; every token is chosen among those that keep to it. At most one is set.

    ``max_new_tokens`` and stop strings still end an answer wherever it is then.

    Attributes:
        json_schema: JSON that a schema describes: its text, a dict, or a pydantic model; kept as text.
            Properties come in the schema's order; a model's objects have no others. What a model's schema
            says but the model does not check is left out: that a set's items differ, that text is a path.
        regex: A pattern that the whole answer matches, in Rust's syntax: no look-around, no back-references.
        choices: The answer is one of these.
    """

    json_schema: str | None = None
    regex: str | None = None
    choices: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Validate every field, and normalise the schema to text and the choices to a tuple."""
        object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        _require(self.regex is None or isinstance(self.regex, str), "regex", self.regex, "a str or None")
        choices: Any = self.choices
        if choices is not None:
            _require(
                isinstance(choices, (list, tuple))
                and len(choices) > 0
                and all(isinstance(choice, str) and choice for choice in choices),
                "choices", choices, "a list of one or more non-empty strings, or None",
            )  # fmt: skip
            object.__setattr__(self, "choices", tuple(dict.fromkeys(choices)))
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if len(given) > 1:
            raise ConfigurationError(f"{' and '.join(given)} contradict each other: give one of them.")
        for name, value in given.items():
            _require_short(name, sum(map(len, value)))
            _require_utf8(name, value)

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return (self.json_schema, self.regex, self.choices) != (None, None, None)

    def override(self, **changes: Any) -> OutputFormat:
        """This format with flat ``changes``: one that is given replaces whatever was asked for before.

        Raises:
            ConfigurationError: A value is not allowed, or several are given.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        return OutputFormat(**given) if given else dataclasses.replace(self, **changes)


def _require_short(name: str, length: int) -> None:
    if length > MAX_FORMAT_CHARS:
        raise ConfigurationError(
            f"{name} has {length:,} characters; at most {MAX_FORMAT_CHARS:,} are taken. Simplify it."
        )


def _require_utf8(name: str, value: Iterable[str]) -> None:
    try:
        "".join(value).encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"{name} has {error.object[error.start]!r}, half of a surrogate pair, which no text holds by "
            "itself: give text that UTF-8 can encode."
        ) from error


def _schema_text(schema: Any) -> str | None:
    """A JSON schema as text in one canonical form; the order of its keys means something and is kept."""
    if schema is None:
        return None
    described = schema
    try:
        if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
            described = as_checked(schema.model_json_schema())
        elif isinstance(schema, str):
            _require_short("json_schema", len(schema))
            described = json.loads(schema)
        text = json.dumps(described, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ConfigurationError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # pydantic raises the last, and deep nesting does
        raise ConfigurationError(
            f"json_schema is not a JSON schema: {error}. Give a dict, the text of a JSON object, or a "
            "pydantic model class."
        ) from error
    if not isinstance(described, dict):
        shown = text if len(text) <= 80 else f"{text[:80]}…"
        raise ConfigurationError(
            f"json_schema={shown} is not allowed: json_schema must be a dict, the text of a JSON object, or "
            "a pydantic model class."
        )
    return text


# Formats that pydantic takes any JSON string for; whether a path exists no grammar can say.
_ANY_TEXT = ("binary", "password", "path", "file-path", "directory-path")


def as_checked(schema: Any) -> Any:
    """A pydantic model's schema, or what is made of one, as the model reads JSON.

    It has none of the properties that the model would ignore, nor the keywords that it does not check: they
    would be refused, since no grammar can keep to them.
    """
    if isinstance(schema, list):
        return [as_checked(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    checked: dict[str, Any] = {}
    for name, value in schema.items():
        if name in ("properties", "patternProperties", "$defs") and isinstance(value, dict):
            checked[name] = {key: as_checked(described) for key, described in value.items()}
        else:
            is_data = name in ("const", "enum", "default", "examples")
            checked[name] = value if is_data else as_checked(value)
    if checked.get("type") == "object" and "properties" in checked:
        checked.setdefault("additionalProperties", False)
    # A set may be given an item twice, unless it could be too small then.
    if checked.get("uniqueItems") and checked.get("minItems", 0) <= 1:
        del checked["uniqueItems"]
    if checked.get("format") in _ANY_TEXT:
        del checked["format"]
    return checked


# Call-level names that would be ambiguous without their group.
_ALIASES = {
    "retrieval_chunk_tokens": "chunk_tokens",
    "retrieval_min_tokens": "min_tokens",
    "retrieval_max_tokens": "max_tokens",
    "retrieval_min_score": "min_score",
    "retrieval_timeout_s": "timeout_s",
    "retrieval_context_divisor": "context_divisor",
}


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """Everything one request runs with.

    Attributes:
        sampling: How tokens are drawn.
        speculation: How drafting and acceptance work.
        retrieval: What the drafter reads.
        output_format: What the answer has to look like.
        timeout_s: Wall time the request may take from submission; ``None`` is no limit.
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    retrieval: RetrievalParams = field(default_factory=RetrievalParams)
    output_format: OutputFormat = field(default_factory=OutputFormat)
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        """Validate the time limit, and that an answer of a given format can end."""
        _require(
            self.timeout_s is None or (_is_number(self.timeout_s) and self.timeout_s > 0),
            "timeout_s", self.timeout_s, "a number of seconds > 0 or None",
        )  # fmt: skip
        if self.output_format and self.sampling.ignore_eos:
            raise ConfigurationError(
                "ignore_eos contradicts json_schema, regex and choices, whose answers end: leave one out."
            )

    @classmethod
    def names(cls) -> frozenset[str]:
        """Every flat name that :meth:`override` takes."""
        return frozenset(_SAMPLING | _SPECULATION | set(_ALIASES) | _FORMAT | {"timeout_s"})

    def override(self, **changes: Any) -> GenerationOptions:
        """These options with flat ``changes``, e.g. ``override(temperature=0.7, retrieval_max_tokens=2048)``.

        Raises:
            ConfigurationError: A name is unknown or a value out of range.
        """
        if not changes:
            return self
        if unknown := changes.keys() - self.names():
            raise ConfigurationError(
                f"unknown option{'s' if len(unknown) > 1 else ''} {', '.join(sorted(unknown))}: "
                f"allowed are {', '.join(sorted(self.names()))}."
            )
        retrieval = {_ALIASES[name]: changes[name] for name in changes if name in _ALIASES}
        sampling = {name: changes[name] for name in changes if name in _SAMPLING}
        speculation = {name: changes[name] for name in changes if name in _SPECULATION}
        return GenerationOptions(
            sampling=dataclasses.replace(self.sampling, **sampling),
            speculation=dataclasses.replace(self.speculation, **speculation),
            retrieval=dataclasses.replace(self.retrieval, **retrieval),
            output_format=self.output_format.override(**{n: changes[n] for n in changes if n in _FORMAT}),
            timeout_s=changes.get("timeout_s", self.timeout_s),
        )

    def flat(self) -> dict[str, Any]:
        """The same options under the flat names that :meth:`override` takes."""
        retrieval = dataclasses.asdict(self.retrieval)
        return {
            **dataclasses.asdict(self.sampling),
            **dataclasses.asdict(self.speculation),
            **{alias: retrieval[name] for alias, name in _ALIASES.items()},
            **dataclasses.asdict(self.output_format),
            "timeout_s": self.timeout_s,
        }


_SAMPLING = {f.name for f in dataclasses.fields(SamplingParams)}
_SPECULATION = {f.name for f in dataclasses.fields(SpeculationParams)}
_FORMAT = {f.name for f in dataclasses.fields(OutputFormat)}


KV_DTYPES = ("float32", "bfloat16", "float16")


def kv_dtype_name(given: Any) -> str | None:
    """The name of a number format that keys and values may be held in; ``None`` stays.

    Args:
        given: One of :data:`KV_DTYPES`, or torch's own.

    Raises:
        ConfigurationError: It is none of these.
    """
    if given is None:
        return None
    name = str(given).removeprefix("torch.")
    _require(name in KV_DTYPES, "kv_dtype", given, f"one of {', '.join(KV_DTYPES)}, or None: the model's own")
    return name


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine may take of the machine.

    Attributes:
        max_active_requests: Requests decoded together; more wait in the queue.
        max_queued_requests: Requests that may wait; one more raises ``QueueFullError``.
        prefill_chunk_tokens: Prompt tokens read per forward pass; decoding goes on in between.
        prefix_cache_bytes: Budget of the KV that is kept after a request for the next one on the same
            document, target and drafter together; 0 keeps nothing.
        prefix_cache_dir: A folder that keeps the KV of long prefixes for later processes; ``None`` has none.
            It is made where it does not exist. Whoever reads it can read the documents.
        prefix_cache_dir_bytes: Budget of the files there, of all models; the ones used least recently go.
        cuda_graph_tokens: Up to which context, at least 1,024 tokens, the drafter's short passes are replayed
            as CUDA graphs; 0 replays none. For drafters of the Llama, Mistral, Qwen 2 and Qwen 3 families in
            16 bits on an NVIDIA device. Their keys and values then take a power of two of tokens, and as many
            for each of up to eight requests.
    """

    max_active_requests: int = 8
    max_queued_requests: int = 1024
    prefill_chunk_tokens: int = 2048
    prefix_cache_bytes: int = 2 * 1024**3
    prefix_cache_dir: str | None = None
    # The KV of 120k tokens in an 8B model with grouped heads, in two bytes a number, takes most of this.
    prefix_cache_dir_bytes: int = 16 * 1024**3
    cuda_graph_tokens: int = 0

    def __post_init__(self) -> None:
        """Validate every field, and normalise the folder to text."""
        folder: Any = self.prefix_cache_dir  # a path is taken too
        if isinstance(folder, PathLike):
            object.__setattr__(self, "prefix_cache_dir", fspath(folder))
        _require(
            folder is None or (isinstance(self.prefix_cache_dir, str) and self.prefix_cache_dir != ""),
            "prefix_cache_dir", folder, "a folder's path or None",
        )  # fmt: skip
        for name, minimum in (
            ("max_active_requests", 1),
            ("max_queued_requests", 1),
            ("prefill_chunk_tokens", 1),
            ("prefix_cache_bytes", 0),
            ("prefix_cache_dir_bytes", 1),
        ):
            value = getattr(self, name)
            _require(_is_int(value, minimum), name, value, f"an integer >= {minimum}")
        graphs = self.cuda_graph_tokens
        _require(graphs == 0 or _is_int(graphs, 1024), "cuda_graph_tokens", graphs, "0 or an integer >= 1024")
