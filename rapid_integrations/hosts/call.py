"""What the keyword arguments of a host's call mean, checked, with nothing ignored."""

from __future__ import annotations

import difflib
import uuid
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rapid_integrations.config import EngineLimits, GenerationOptions
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.hosts.prompt_text import value_text

if TYPE_CHECKING:
    from rapid_integrations.events import TextEvent

OPTION_NAMES = GenerationOptions.names()
SYNONYMS = {"max_tokens": "max_new_tokens", "timeout": "timeout_s"}
_CALL_ONLY = ("query", "context", "retriever", "on_event")


@dataclass(frozen=True, slots=True)
class Call:
    """What the keyword arguments of one call mean.

    Attributes:
        options: How to answer.
        retriever: Finds what the drafter reads.
        query: The question, where the call says it.
        context: The long document, where the call says it.
        on_event: Hears each event of the answer (in a batch, of all answers) as it comes, in the thread that
            reads them. A call that has one asks no cache: a kept answer has no events.
    """

    options: GenerationOptions
    retriever: Any
    query: str | None
    context: str | None
    on_event: Callable[[TextEvent], None] | None = None

    @classmethod
    def parse(
        cls,
        arguments: Mapping[str, Any],
        *,
        options: GenerationOptions,
        retriever: Any,
        stop: Any = None,
        elsewhere: Collection[str] = (),
    ) -> Call:
        """A host's keyword arguments over an LLM's own ``options`` and ``retriever``.

        ``stop`` is LangChain's argument of that name; ``None``, here or in ``arguments``, is the LLM's own.
        Arguments named in ``elsewhere`` are known, but the caller's affair.

        Raises:
            ConfigurationError: An argument is unknown, given twice, or out of range.
        """
        named = rename_synonyms(arguments)
        if named.get("stop", ()) is None:
            del named["stop"]
        if stop is not None:
            if "stop" in named:
                raise ConfigurationError("stop was given twice; give it once.")
            named["stop"] = stop
        refuse_unknown(named, {*OPTION_NAMES, *_CALL_ONLY, *elsewhere}, "a call")
        named = {name: value for name, value in named.items() if name not in elsewhere}
        query, context, own_retriever, on_event = (named.pop(name, None) for name in _CALL_ONLY)
        if on_event is not None and not callable(on_event):
            raise ConfigurationError(f"on_event={on_event!r} is not allowed: give a function of an event.")
        return cls(
            options=options.override(**named),
            retriever=retriever if own_retriever is None else own_retriever,
            query=None if query is None else value_text(query),
            context=None if context is None else value_text(context),
            on_event=on_event,
        )

    def emit(self, event: TextEvent) -> None:
        """Let ``on_event`` hear an event."""
        if self.on_event is not None:
            self.on_event(event)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the pipeline's methods."""
        return {"options": self.options, "retriever": self.retriever}

    def identity(self) -> list[Any]:
        """What an answer depends on, as plain data."""
        return [sorted(self.options.flat().items()), identity(self.retriever), self.query, self.context]


def rename_synonyms(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` under this package's own names."""
    named = dict(arguments)
    for synonym, name in SYNONYMS.items():
        if synonym in named:
            if name in named:
                raise ConfigurationError(f"{synonym} and {name} are the same option; give one of them.")
            named[name] = named.pop(synonym)
    return named


def refuse_unknown(arguments: Mapping[str, Any], allowed: set[str], where: str) -> None:
    """Raise for arguments that would otherwise be ignored."""
    if unknown := sorted(set(arguments) - allowed):
        named = []
        for name in unknown:
            similar = difflib.get_close_matches(name, allowed, 1)
            named.append(f"{name} (did you mean {similar[0]}?)" if similar else name)
        raise ConfigurationError(
            f"{where} does not take {', '.join(named)}: allowed are {', '.join(sorted(allowed))}."
        )


_identities: dict[int, tuple[weakref.ref[Any], str]] = {}


def identity(value: Any) -> Any:
    """``value`` itself if it is plain data, else a name that no other object in any process has.

    An object keeps its name as long as it lives; one that cannot be watched gets a new name each time, so
    that a cache misses rather than mistakes one for another.
    """
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): identity(item) for key, item in value.items()}
    if isinstance(value, EngineLimits):
        return repr(value)
    if (known := _identities.get(id(value))) and known[0]() is value:
        return known[1]
    name = f"{describe_type(value)} {uuid.uuid4().hex}"
    key = id(value)
    try:
        watched = weakref.ref(value, lambda _: _identities.pop(key, None))
    except TypeError:
        return name
    _identities[key] = (watched, name)
    return name


def describe_type(value: Any) -> str:
    """``value``'s type, for messages."""
    return f"a {type(value).__module__}.{type(value).__qualname__}"
