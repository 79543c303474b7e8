"""Settings: the retrieval quality and options that a run varies, each combination once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from rapid_integrations.config import GenerationOptions
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.methods.method import Method
from rapid_integrations.evaluation.methods.retrieval import RETRIEVERS, RetrieverName
from rapid_integrations.evaluation.tasks.retrieval_quality import RETRIEVAL_QUALITIES, RetrievalQuality

# A sweep over these would compare answers to different questions, or truncated answers.
_NOT_SWEPT = frozenset(
    {
        "json_schema",
        "regex",
        "choices",
        "stop",
        "ignore_eos",
        "max_new_tokens",
        "timeout_s",
        "retrieval_timeout_s",
    }
)
_RETRIEVER = "retriever"
_AUTOMATIC = ("num_draft_tokens", "retrieval_max_tokens")


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of a sweep.

    Attributes:
        retrieval: The quality of retrieval.
        options: The flat generation options that the sweep sets here.
        retriever: The retriever of natural retrieval; ``None`` is the pipeline's own.
    """

    retrieval: RetrievalQuality = "natural"
    options: Mapping[str, Any] = field(default_factory=dict)
    retriever: RetrieverName | None = None

    def __hash__(self) -> int:
        return hash((self.retrieval, self.retriever, frozenset(self.options.items())))

    @property
    def label(self) -> str:
        """A name for tables, such as ``"missing retrieval, transfer_strength=5"``."""
        retriever = [] if self.retriever is None else [("retriever", self.retriever)]
        return ", ".join([f"{self.retrieval} retrieval", *map("=".join, retriever + self._shown())])

    def applied_to(self, options: GenerationOptions) -> GenerationOptions:
        """Replace options by those of this setting.

        Raises:
            ConfigurationError: One is unknown or out of range.
        """
        return options.override(**self.options)

    def as_dict(self) -> dict[str, Any]:
        """The setting as JSON-compatible data for :meth:`from_dict`."""
        return {"retrieval": self.retrieval, "options": dict(self.options), "retriever": self.retriever}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Setting:
        """The setting from the data of :meth:`as_dict`."""
        return cls(data["retrieval"], dict(data["options"]), data["retriever"])

    def _shown(self) -> list[tuple[str, str]]:
        def shown(name: str, value: Any) -> str:
            if value is None:
                return "auto" if name in _AUTOMATIC else "none"
            return f"{value:g}" if type(value) is float else str(value)

        return [(name, shown(name, value)) for name, value in self.options.items()]


def make_settings(
    retrieval: RetrievalQuality | Sequence[RetrievalQuality], sweep: Mapping[str, Sequence[Any]]
) -> tuple[Setting, ...]:
    """Combine every retrieval quality with every combination of the swept values.

    Args:
        retrieval: One quality or several.
        sweep: For each flat generation option, or ``retriever`` (``"bm25"``, ``"dense"``), its values.

    Raises:
        ConfigurationError: A quality, an option or a value is not allowed or given twice, or there is none.
    """
    qualities = (retrieval,) if isinstance(retrieval, str) else tuple(retrieval)
    if not qualities or set(qualities) - set(RETRIEVAL_QUALITIES):
        raise ConfigurationError(
            f"retrieval={', '.join(map(str, qualities)) or '(none)'} is not allowed: name one or more of "
            f"{', '.join(RETRIEVAL_QUALITIES)}."
        )
    _check_once("retrieval", qualities)
    for name, values in sweep.items():
        _check_sweepable(name)
        if not values:
            raise ConfigurationError(f"the sweep of {name} has no values: give at least one.")
        _check_once(name, values)
        for value in values:
            _check_value(name, value)
    points = [dict(zip(sweep, values, strict=True)) for values in product(*sweep.values())]
    return tuple(
        Setting(quality, {n: v for n, v in point.items() if n != _RETRIEVER}, point.get(_RETRIEVER))
        for quality in qualities
        for point in points
    )


def sweepable() -> frozenset[str]:
    """The flat generation options that a sweep may vary, and ``retriever``."""
    return (GenerationOptions.names() - _NOT_SWEPT) | {_RETRIEVER}


def parse_sweeps(texts: Sequence[str], *, fixed: Collection[str] = ()) -> dict[str, tuple[Any, ...]]:
    """Parse sweeps from the command line, such as ``"transfer_strength=1,5"``.

    A value is read as a whole number, a number, ``true`` or ``false``, text, or ``auto`` or ``none``: the
    first of these that the option allows.

    Args:
        texts: One for each option.
        fixed: Options that already have a value.

    Raises:
        ConfigurationError: A sweep has another form, or its option cannot be swept, has a value already, is
            given twice or does not allow a value.
    """
    sweeps: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, equals, values = (part.strip() for part in text.partition("="))
        name = name.replace("-", "_")
        if not (name and equals and values):
            raise ConfigurationError(
                f"the sweep {text!r} is not allowed: write NAME=VALUE,VALUE,…, such as transfer_strength=1,5."
            )
        if name in fixed:
            raise ConfigurationError(
                f"{name} already has a value: leave out the value, or the sweep {text!r}."
            )
        if name in sweeps:
            raise ConfigurationError(f"{name} is swept twice: give all of its values at once.")
        _check_sweepable(name)
        sweeps[name] = tuple(_parsed(name, value.strip()) for value in values.split(","))
    return sweeps


def asked_in(
    methods: Sequence[Method], settings: Sequence[Setting], options: GenerationOptions
) -> dict[tuple[str, Setting], Setting]:
    """Find the settings that need no answers of their own.

    If the difference between a setting and an earlier one does not affect a method, the method is asked only
    in the earlier one.

    Args:
        methods: Methods with distinct names.
        settings: Distinct settings.
        options: The options that the settings change.

    Returns:
        For each method's name and setting, the setting in which the method is asked.
    """
    asked: dict[tuple[str, Setting], Setting] = {}
    for method in methods:
        distinct: list[tuple[Any, Setting]] = []
        for setting in settings:
            relevant = (
                method.in_force(setting.applied_to(options)),
                setting.retrieval if method.uses_retrieval else None,
                setting.retriever if method.uses_retrieval and setting.retrieval == "natural" else None,
            )
            equal = (earlier for values, earlier in distinct if values == relevant)
            asked[method.name, setting] = first = next(equal, setting)
            if first is setting:
                distinct.append((relevant, setting))
    return asked


def _check_sweepable(name: str) -> None:
    if name not in sweepable():
        raise ConfigurationError(f"{name!r} cannot be swept: allowed are {', '.join(sorted(sweepable()))}.")


def _parsed(name: str, text: str) -> Any:
    candidates: list[Any] = []
    for number in (int, float):
        try:
            candidates.append(number(text))
        except ValueError:
            continue
    candidates += {"true": [True], "false": [False]}.get(text.lower(), [])
    candidates.append(text)
    candidates += [None] if text.lower() in ("auto", "none") else []
    errors = []
    for value in candidates:
        try:
            _check_value(name, value)
        except ConfigurationError as error:
            errors.append(error)
        else:
            return value
    raise errors[0]


def _check_value(name: str, value: Any) -> None:
    if name != _RETRIEVER:
        GenerationOptions().override(**{name: value})
    elif value not in RETRIEVERS:
        raise ConfigurationError(f"retriever={value!r} is not allowed: it is one of {', '.join(RETRIEVERS)}.")


def _check_once(name: str, values: Sequence[Any]) -> None:
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ConfigurationError(f"{name} has {twice[0]!r} twice: give each value once.")
