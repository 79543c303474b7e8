"""One call of an LLM: its keyword arguments, checked and parsed. Unknown arguments raise."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rapid_integrations.config import EngineLimits, GenerationOptions
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.hosts.prompt_text import value_text
from rapid_integrations.validation import refuse_unknown

if TYPE_CHECKING:
    from rapid_integrations.events import TextEvent

OPTION_NAMES = GenerationOptions.names()
SYNONYMS = {"max_tokens": "max_new_tokens", "timeout": "timeout_s"}
"""Names that other LLM classes of the frameworks use for the same option."""

# The arguments of a call that are no generation options: the fields of Call apart from ``options``.
_CALL_ARGUMENTS = ("retriever", "query", "context", "on_event")


@dataclass(frozen=True, slots=True)
class Call:
    """The parsed arguments of one call.

    Attributes:
        options: The generation options.
        retriever: Finds the drafter's context; ``None`` searches the prompt's own context.
        query: The question, if the call gives it.
        context: The long document, if the call gives it.
        on_event: Receives each event of the answer (in a batch, of all answers), in the thread that reads
            the events. A call with it bypasses caches, because a cached answer has no events.
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
        ignored: Collection[str] = (),
    ) -> Call:
        """Parse the keyword arguments of a call.

        Args:
            arguments: The keyword arguments, under this package's names or a synonym.
            options: The LLM's options, used where a call gives none.
            retriever: The LLM's retriever, used where a call gives none.
            stop: Stop strings that the framework passes apart. ``None``, here or in ``arguments``, leaves
                those of ``options``.
            ignored: Names of arguments that the caller reads itself.

        Raises:
            ConfigurationError: An argument is unknown, given twice, or not allowed.
        """
        named = rename_synonyms(arguments)
        if named.get("stop", ()) is None:
            del named["stop"]
        if stop is not None:
            if "stop" in named:
                raise ConfigurationError("stop was given twice; give it once.")
            named["stop"] = stop
        refuse_unknown(named, {*OPTION_NAMES, *_CALL_ARGUMENTS, *ignored}, "a call")
        named = {name: value for name, value in named.items() if name not in ignored}
        call_retriever, query, context, on_event = (named.pop(name, None) for name in _CALL_ARGUMENTS)
        if on_event is not None and not callable(on_event):
            raise ConfigurationError(f"on_event={on_event!r} is not allowed: give a function of an event.")
        return cls(
            options=options.override(**named),
            retriever=retriever if call_retriever is None else call_retriever,
            query=None if query is None else value_text(query),
            context=None if context is None else value_text(context),
            on_event=on_event,
        )

    def emit(self, event: TextEvent) -> None:
        """Pass an event to ``on_event``, if there is one."""
        if self.on_event is not None:
            self.on_event(event)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the pipeline's methods."""
        return {"options": self.options, "retriever": self.retriever}

    def identity(self) -> list[Any]:
        """Everything in the call that an answer depends on, as plain data."""
        return [sorted(self.options.flat().items()), identity(self.retriever), self.query, self.context]


def rename_synonyms(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` under this package's own names.

    Raises:
        ConfigurationError: An option is given under both of its names.
    """
    named = dict(arguments)
    for synonym, name in SYNONYMS.items():
        if synonym in named:
            if name in named:
                raise ConfigurationError(f"{synonym} and {name} are the same option; give one of them.")
            named[name] = named.pop(synonym)
    return named


_identities: dict[int, tuple[weakref.ref[Any], str]] = {}


def identity(value: Any) -> Any:
    """``value`` itself if it is plain data, else a name that no other object in any process has.

    An object keeps its name as long as it lives. An object without weak references gets a new name each time:
    a cache then misses, but never confuses two objects.
    """
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): identity(item) for key, item in value.items()}
    if isinstance(value, EngineLimits):
        return repr(value)
    key = id(value)
    if (entry := _identities.get(key)) and entry[0]() is value:
        return entry[1]
    name = f"{describe_type(value)} {uuid.uuid4().hex}"
    try:
        reference = weakref.ref(value, lambda _: _identities.pop(key, None))
    except TypeError:
        return name
    _identities[key] = (reference, name)
    return name


def describe_type(value: Any) -> str:
    """The type of ``value``, for messages."""
    return f"a {type(value).__module__}.{type(value).__qualname__}"
