"""The options of a request and the limits of an engine, as frozen dataclasses that validate themselves.

:class:`GenerationOptions` holds every option of one request, in four groups.
:meth:`GenerationOptions.override` takes the flat keyword arguments of a call
(``temperature=…, transfer_strength=…``) and refuses unknown names. :class:`EngineLimits` bounds the memory
and the parallelism of an engine. The options of loading models are in
:mod:`rapid_integrations.loading_options`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any, Literal, get_args

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.structured.output_format import OutputFormat
from rapid_integrations.validation import check, is_fraction, is_int, is_number, is_positive, not_allowed

Acceptance = Literal["lossless", "augmented", "mixture", "paper"]
TailRule = Literal["none", "target", "drafter"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are sampled, for target and drafter alike, and where an answer ends.

    Attributes:
        temperature: >= 0. The logits are divided by it; 0 decodes greedily. Default 0.
        top_k: >= 1. Sample among the ``top_k`` most probable tokens; ``None`` (default) keeps all tokens.
        top_p: In (0, 1]. Sample among the smallest set of tokens whose total probability reaches it; ``None``
            (default) keeps all tokens.
        min_p: In [0, 1]. Drop tokens less probable than ``min_p`` times the most probable one; ``None``
            (default) drops none.
        repetition_penalty: > 0; values above 1 lower the probability of tokens that occur in the prompt or in
            the answer so far. Default 1, which changes nothing.
        seed: In [0, 2**63). The random draw at an output position depends on the seed and the position only,
            not on the drafts or on other requests in the batch. Plain decoding without a drafter uses draws
            of its own. ``None`` (default) uses a new seed for each request.
        max_new_tokens: >= 1. Maximum length of the answer, in tokens. Default 256.
        stop: Non-empty strings, or one string. The answer ends before the first occurrence of any of them.
            Default none.
        ignore_eos: Continue after an end-of-sequence token, for benchmarks. Default ``False``.
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
        stop: Any = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))
        check(
            self,
            temperature=(is_number(self.temperature, 0), "a number >= 0 (0 is greedy)"),
            top_k=(self.top_k is None or is_int(self.top_k, 1), "an integer >= 1 or None"),
            top_p=(self.top_p is None or (is_positive(self.top_p) and self.top_p <= 1), "in (0, 1] or None"),
            min_p=(self.min_p is None or is_fraction(self.min_p), "in [0, 1] or None"),
            repetition_penalty=(is_positive(self.repetition_penalty), "a number > 0 (1 is off)"),
            seed=(
                self.seed is None or (is_int(self.seed, 0) and self.seed < 2**63),
                "an integer in [0, 2**63) or None",
            ),
            max_new_tokens=(is_int(self.max_new_tokens, 1), "an integer >= 1"),
            stop=(all(isinstance(text, str) and text for text in self.stop), "non-empty strings"),
        )

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class SpeculationParams:
    """How the drafter proposes tokens, and how far it may change the output.

    Below, p is the target's distribution on the full context, q the drafter's on the retrieved context, and
    eta the transfer strength.

    Attributes:
        acceptance: The acceptance rule, which decides the distribution of the output. ``"lossless"``: exactly
            p. ``"augmented"`` (default): exactly the retrieval-augmented target distribution. ``"mixture"``:
            exactly ``mixture_weight · p + (1 - mixture_weight) · q``. ``"paper"``: the rule as published
            (arXiv:2502.20330 Alg. 1, Eq. 10), whose output follows none of these distributions.
        transfer_strength: eta >= 0 of Eq. 8: how strongly q shifts p. Ignored under ``"lossless"`` and
            ``"mixture"``. Default 10.
        num_draft_tokens: gamma >= 0, the tokens drafted per round. ``None`` (default) chooses it in each
            round from measured costs and acceptance; ``0`` decodes plainly with the target alone.
        max_draft_tokens: >= 1. Maximum gamma where it is chosen per round. Default 32.
        tail_rule: Which part of the transfer is undone, under ``"augmented"`` and ``"paper"``. ``"none"``
            (default); ``"target"``: tokens with less than a tenth of the largest augmented probability keep
            the target's weight (Eq. 9, renormalised); ``"drafter"``: only tokens with at least a tenth of the
            drafter's largest probability are shifted.
        adaptive_transfer: Under ``"augmented"``, lower eta where the target is certain and where the drafter
            has disagreed with it: ``eta_t = eta · (1 - max p_t) · A_t⁸``. A is a running mean of the overlap
            of p and q. It starts at the drafter's agreement with the target on the question
            (:mod:`rapid_integrations.engine.decoding.transfer`). ``False`` keeps eta fixed, as published;
            ``"paper"`` always does. Default ``True``.
        mixture_weight: In [0, 1]. The target's share under ``"mixture"``: 1 is the target alone, 0 the
            drafter alone. A draft token is accepted with probability ``1 - mixture_weight · TV(p, q)``, where
            TV is the total variation distance. Default 0.6.
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
        rules, tail_rules = get_args(Acceptance), get_args(TailRule)
        check(
            self,
            acceptance=(self.acceptance in rules, f"one of {', '.join(rules)}"),
            transfer_strength=(is_number(self.transfer_strength, 0), "a number >= 0"),
            num_draft_tokens=(
                self.num_draft_tokens is None or is_int(self.num_draft_tokens, 0),
                "an integer >= 0, or None to choose per round",
            ),
            max_draft_tokens=(is_int(self.max_draft_tokens, 1), "an integer >= 1"),
            tail_rule=(self.tail_rule in tail_rules, f"one of {', '.join(tail_rules)}"),
            adaptive_transfer=(isinstance(self.adaptive_transfer, bool), "True or False"),
            mixture_weight=(is_fraction(self.mixture_weight), "in [0, 1] (1 is the target alone)"),
        )

    @property
    def effective_strength(self) -> float:
        """The transfer strength that the acceptance rule applies: 0 under lossless and mixture."""
        return float(self.transfer_strength) if self.acceptance in ("augmented", "paper") else 0.0

    @property
    def adapts(self) -> bool:
        """Whether the transfer strength is lowered position by position."""
        # Under "paper" q is unknown at the bonus position, and the rule stays as published.
        return self.acceptance == "augmented" and self.adaptive_transfer and self.transfer_strength > 0

    @property
    def uses_question_agreement(self) -> bool:
        """Whether decoding depends on the drafter's agreement with the target on the question's words."""
        return self.adapts or self.num_draft_tokens is None

    @property
    def drafter_steers(self) -> bool:
        """Whether the drafter's distribution can change the output, beyond proposing tokens."""
        return self.mixture_weight < 1 if self.acceptance == "mixture" else self.effective_strength > 0

    @property
    def in_force(self) -> SpeculationParams:
        """The same parameters, with those that the other fields leave without effect set to their defaults.

        Two requests with equal parameters in force give the same answers.
        """
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
    """Which part of the context the drafter reads. As options of a call, the names begin with ``retrieval_``.

    All lengths are in tokens.

    Attributes:
        chunk_tokens: >= 1. Length of the chunks that the built-in index cuts the context into. Default 256.
        min_tokens: >= 1. Minimum of the computed retrieval budget. Default 768. (arXiv:2502.20330 §4.1 has
            4,096, for contexts of 120,000 tokens, where the divisor gives 5,000.)
        context_divisor: >= 1. The computed budget is ``max(min_tokens, context / context_divisor)``. Default
            24, as published.
        max_tokens: >= 1. A fixed budget in place of the computed one; ``None`` (default) computes it.
        min_score: Leave out chunks that score lower. ``None`` (default) is a cosine of 0.3 (as published) for
            the built-in dense retrieval, and no threshold otherwise.
        timeout_s: > 0, in seconds. A retriever that takes longer is abandoned for this request, and the
            drafter reads the start and the end of the context. Default 30.
    """

    chunk_tokens: int = 256
    min_tokens: int = 768
    context_divisor: float = 24.0
    max_tokens: int | None = None
    min_score: float | None = None
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        """Validate every field."""
        check(
            self,
            chunk_tokens=(is_int(self.chunk_tokens, 1), "an integer >= 1"),
            min_tokens=(is_int(self.min_tokens, 1), "an integer >= 1"),
            context_divisor=(is_number(self.context_divisor, 1), "a number >= 1"),
            max_tokens=(self.max_tokens is None or is_int(self.max_tokens, 1), "an integer >= 1 or None"),
            min_score=(self.min_score is None or is_number(self.min_score), "a number or None"),
            timeout_s=(is_positive(self.timeout_s), "a number of seconds > 0"),
        )

    def budget(self, context_tokens: int) -> int:
        """The maximum number of tokens to retrieve from a context of ``context_tokens`` tokens."""
        if self.max_tokens is not None:
            return self.max_tokens
        return max(self.min_tokens, math.ceil(context_tokens / self.context_divisor))


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """Every option of one request.

    Attributes:
        sampling: How tokens are sampled, and where the answer ends.
        speculation: How drafting and acceptance work.
        retrieval: Which part of the context the drafter reads.
        output_format: The format that the answer must have.
        timeout_s: > 0, in seconds from submission. A request that takes longer raises
            ``DeadlineExceededError``. ``None`` (default) sets no limit.
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    retrieval: RetrievalParams = field(default_factory=RetrievalParams)
    output_format: OutputFormat = field(default_factory=OutputFormat)
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        """Validate the time limit, and that an answer of a given format can end."""
        allowed = self.timeout_s is None or is_positive(self.timeout_s)
        check(self, timeout_s=(allowed, "a number of seconds > 0 or None"))
        if self.output_format and self.sampling.ignore_eos:
            raise ConfigurationError(
                "ignore_eos contradicts json_schema, regex and choices, whose answers end: leave one out."
            )

    @classmethod
    def names(cls) -> frozenset[str]:
        """Every flat name that :meth:`override` takes."""
        return frozenset({*_SAMPLING, *_SPECULATION, *_RETRIEVAL, *_FORMAT, "timeout_s"})

    def override(self, **changes: Any) -> GenerationOptions:
        """These options with flat ``changes``, e.g. ``override(temperature=0.7, retrieval_max_tokens=2048)``.

        Raises:
            ConfigurationError: A name is unknown or a value is not allowed.
        """
        if not changes:
            return self
        if unknown := changes.keys() - self.names():
            raise ConfigurationError(
                f"unknown option{'s' if len(unknown) > 1 else ''} {', '.join(sorted(unknown))}: "
                f"allowed are {', '.join(sorted(self.names()))}."
            )

        def of_group(flat_names: dict[str, str]) -> dict[str, Any]:
            return {flat_names[name]: value for name, value in changes.items() if name in flat_names}

        return GenerationOptions(
            sampling=dataclasses.replace(self.sampling, **of_group(_SAMPLING)),
            speculation=dataclasses.replace(self.speculation, **of_group(_SPECULATION)),
            retrieval=dataclasses.replace(self.retrieval, **of_group(_RETRIEVAL)),
            output_format=self.output_format.override(**of_group(_FORMAT)),
            timeout_s=changes.get("timeout_s", self.timeout_s),
        )

    def flat(self) -> dict[str, Any]:
        """The same options under the flat names that :meth:`override` takes."""
        groups = (
            (self.sampling, _SAMPLING),
            (self.speculation, _SPECULATION),
            (self.retrieval, _RETRIEVAL),
            (self.output_format, _FORMAT),
        )
        return {
            **{flat: getattr(group, name) for group, names in groups for flat, name in names.items()},
            "timeout_s": self.timeout_s,
        }


def _flat_names(group: type, prefix: str = "") -> dict[str, str]:
    """The fields of a group of options, by the flat names of a call."""
    return {f"{prefix}{f.name}": f.name for f in dataclasses.fields(group)}


_SAMPLING = _flat_names(SamplingParams)
_SPECULATION = _flat_names(SpeculationParams)
_RETRIEVAL = _flat_names(RetrievalParams, "retrieval_")  # chunk_tokens alone would be ambiguous in a call
_FORMAT = _flat_names(OutputFormat)


KV_DTYPES = ("float32", "bfloat16", "float16")
"""The number formats that keys and values can be stored in."""


def kv_dtype_name(given: Any) -> str | None:
    """The name of a number format for keys and values; ``None`` stays ``None``.

    Args:
        given: One of :data:`KV_DTYPES`, or the torch dtype of that name.

    Raises:
        ConfigurationError: ``given`` is neither.
    """
    if given is None:
        return None
    name = str(given).removeprefix("torch.")
    if name not in KV_DTYPES:
        raise not_allowed("kv_dtype", given, f"one of {', '.join(KV_DTYPES)}, or None: the model's own")
    return name


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How much memory and parallelism an engine may use.

    Attributes:
        max_active_requests: >= 1. Requests that are prefilled and decoded together; further ones wait in the
            queue. Default 8.
        max_queued_requests: >= 1. Requests that may wait; one more raises ``QueueFullError``. Default 1,024.
        prefill_chunk_tokens: >= 1. Prompt tokens per prefill pass; decoding continues between two passes.
            Default 2,048.
        prefix_cache_bytes: >= 0. Bytes of KV that are kept after a request for later requests on the same
            document, target and drafter together; 0 keeps none. Default 2 GiB.
        prefix_cache_dir: A folder (text or path) that keeps the KV of long prefixes for later processes. It
            is created if it does not exist. Anyone who can read the folder can read the documents. ``None``
            (default) keeps nothing on disk.
        prefix_cache_dir_bytes: >= 1. Bytes of all files in that folder, of all models; the files that were
            used least recently are deleted. Default 16 GiB.
        cuda_graph_tokens: 0, or >= 1,024. The drafter's short passes are replayed as CUDA graphs up to this
            context length, in tokens; 0 (default) uses no graphs. Only for drafters of the Llama, Mistral,
            Qwen 2 and Qwen 3 families in 16 bits on an NVIDIA device. The KV of eight contexts of this
            length is allocated with the engine. Never run on a GPU so far.
    """

    max_active_requests: int = 8
    max_queued_requests: int = 1024
    prefill_chunk_tokens: int = 2048
    prefix_cache_bytes: int = 2 * 1024**3
    prefix_cache_dir: str | None = None
    # Almost all of it holds 120k tokens of an 8B model with grouped-query attention in 16 bits.
    prefix_cache_dir_bytes: int = 16 * 1024**3
    cuda_graph_tokens: int = 0

    def __post_init__(self) -> None:
        """Validate every field, and normalise the folder to text."""
        folder: Any = self.prefix_cache_dir
        if isinstance(folder, PathLike):
            object.__setattr__(self, "prefix_cache_dir", fspath(folder))
        check(
            self,
            max_active_requests=(is_int(self.max_active_requests, 1), "an integer >= 1"),
            max_queued_requests=(is_int(self.max_queued_requests, 1), "an integer >= 1"),
            prefill_chunk_tokens=(is_int(self.prefill_chunk_tokens, 1), "an integer >= 1"),
            prefix_cache_bytes=(is_int(self.prefix_cache_bytes, 0), "an integer >= 0"),
            prefix_cache_dir=(
                folder is None or (isinstance(self.prefix_cache_dir, str) and self.prefix_cache_dir != ""),
                "a folder's path or None",
            ),
            prefix_cache_dir_bytes=(is_int(self.prefix_cache_dir_bytes, 1), "an integer >= 1"),
            cuda_graph_tokens=(
                self.cuda_graph_tokens == 0 or is_int(self.cuda_graph_tokens, 1024),
                "0 or an integer >= 1024",
            ),
        )
