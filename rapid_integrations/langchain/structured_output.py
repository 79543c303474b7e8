"""Parsers for ``with_structured_output``: from text, or from the arguments of a tool call, to data."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from operator import itemgetter
from typing import Any

import pydantic
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers.openai_tools import (
    JsonOutputKeyToolsParser,
    JsonOutputToolsParser,
    PydanticToolsParser,
)
from langchain_core.runnables import Runnable, RunnableGenerator, RunnableMap, RunnablePassthrough
from langchain_core.utils.pydantic import is_basemodel_subclass

from rapid_integrations.structured.output_format import OutputFormat


def schema_and_parser(schema: dict[str, Any] | type) -> tuple[str, Callable[[str], Any]]:
    """A schema as JSON text, and a parser of answers.

    The parser returns an instance of a pydantic model, or else a dict. It raises LangChain's
    ``OutputParserException`` for text that does not match the schema.

    Args:
        schema: A pydantic model, a TypedDict, or a JSON schema.

    Raises:
        ConfigurationError: The schema is none of these.
    """
    is_model = isinstance(schema, type) and issubclass(schema, pydantic.BaseModel)
    described: Any = schema
    if isinstance(schema, type) and not is_model:
        described = pydantic.TypeAdapter(schema).json_schema()
    text = OutputFormat(json_schema=described).json_schema
    assert text is not None
    expected: Any = schema if is_model else Any
    adapter = pydantic.TypeAdapter(expected)

    def parse(answer: str) -> Any:
        # LangChain's own JSON parsers would complete an object that was cut off.
        try:
            return adapter.validate_json(answer)
        except pydantic.ValidationError as error:
            message = f"the answer does not match the schema, perhaps because it was cut off: {error}"
            raise OutputParserException(message, llm_output=answer) from error

    return text, parse


def tool_call_parser(schema: dict[str, Any] | type, tool_name: str) -> Runnable[Any, Any]:
    """A parser from a message to the arguments of its tool call.

    It returns an instance of a pydantic model, or else a dict. It raises LangChain's
    ``OutputParserException`` for a message without a call, and pydantic's ``ValidationError`` for arguments
    that do not match a pydantic model.

    Args:
        schema: A pydantic model, a TypedDict, or a JSON schema.
        tool_name: The tool's name in the call.
    """
    parser: JsonOutputToolsParser
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        parser = PydanticToolsParser(tools=[schema], first_tool_only=True)
    else:
        parser = JsonOutputKeyToolsParser(key_name=tool_name, first_tool_only=True)
    return RunnableGenerator(_require_tool_call, _arequire_tool_call) | parser


def with_raw(caller: Runnable[Any, Any], parser: Runnable[Any, Any]) -> Runnable[Any, dict[str, Any]]:
    """A runnable that returns the message, its data and the parsing error in a dict, and does not raise it.

    Args:
        caller: Returns the message (``"raw"``).
        parser: Returns the data (``"parsed"``), or raises (``"parsing_error"``).
    """
    parsed: Runnable[Any, Any] = RunnablePassthrough.assign(
        parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
    )
    failed: Runnable[Any, Any] = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=caller) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _check_tool_call(message: BaseMessage | None) -> None:
    if not getattr(message, "tool_calls", None):
        raise OutputParserException(
            f"the model was expected to answer with a tool call, but wrote {message!r}. Raise max_new_tokens "
            "if the answer was cut off."
        )


def _require_tool_call(messages: Iterator[BaseMessage]) -> Iterator[BaseMessage]:
    whole: Any = None
    for message in messages:
        whole = message if whole is None else whole + message
        yield message
    _check_tool_call(whole)


async def _arequire_tool_call(messages: AsyncIterator[BaseMessage]) -> AsyncIterator[BaseMessage]:
    whole: Any = None
    async for message in messages:
        whole = message if whole is None else whole + message
        yield message
    _check_tool_call(whole)
