"""Prompt templates that mark the query and the long document in their prompts.

LangChain passes a prompt value from a template to a model. The text LLM gets its ``to_string()``, a
:class:`~rapid_integrations.hosts.prompt_text.PromptText` here; the chat model reads its fields.
"""

from __future__ import annotations

from typing import Any

from langchain_core.load.serializable import Serializable
from langchain_core.prompt_values import ChatPromptValue, PromptValue, StringPromptValue
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from typing_extensions import override

from rapid_integrations.hosts.prompt_text import (
    CONTEXT_NAMES,
    PromptText,
    find_segments,
    find_variable,
    value_text,
)
from rapid_integrations.langchain.messages import message_pairs


class _StoredName(Serializable):
    """Gives stored prompts a name that does not depend on where the class is defined."""

    @classmethod
    @override
    def get_lc_namespace(cls) -> list[str]:
        """The module that LangChain's loader imports the class from."""
        return ["rapid_integrations", "langchain_prompts"]


class _Segments(_StoredName):
    """The fields of both prompt values.

    Attributes:
        query: The question in the prompt.
        context: The long document in the prompt.
    """

    query: str | None = None
    context: str | None = None


class RapidPromptValue(_Segments, StringPromptValue):
    """A text prompt whose ``to_string()`` is a :class:`PromptText` with its ``query`` and ``context``."""

    @override
    def to_string(self) -> str:
        """The text, with its query and context attached."""
        return PromptText(self.text, query=self.query, context=self.context)


class RapidChatPromptValue(_Segments, ChatPromptValue):
    """The same for a chat prompt; the :class:`PromptText` also keeps the messages."""

    @override
    def to_string(self) -> str:
        """The text, with its messages, query and context attached."""
        messages = message_pairs(self.messages)
        return PromptText(super().to_string(), messages=messages, query=self.query, context=self.context)


class RapidPromptTemplate(_StoredName, PromptTemplate):
    """A ``PromptTemplate`` that marks query and document for :class:`~rapid_integrations.RapidLLM`.

    The query is the variable ``query``, ``query_str``, ``question`` or ``input``; the context is ``context``,
    ``context_str``, ``context_msg`` or ``documents``. A list of documents is joined by blank lines.
    """

    @override
    def format_prompt(self, **kwargs: Any) -> PromptValue:
        """The formatted prompt, with its query and context kept apart."""
        variables = self._merge_partial_and_user_variables(**kwargs)
        text = super().format_prompt(**_context_as_text(variables)).to_string()
        return RapidPromptValue(text=text, **find_segments(variables))

    @override
    async def aformat_prompt(self, **kwargs: Any) -> PromptValue:
        """:meth:`format_prompt`; formatting does not wait for anything."""
        return self.format_prompt(**kwargs)


class RapidChatPromptTemplate(_StoredName, ChatPromptTemplate):
    """The same as :class:`RapidPromptTemplate` for chat prompts; messages keep their roles."""

    @override
    def format_prompt(self, **kwargs: Any) -> RapidChatPromptValue:
        """The formatted messages, with their query and context kept apart."""
        variables = self._merge_partial_and_user_variables(**kwargs)
        messages = super().format_prompt(**_context_as_text(variables)).to_messages()
        return RapidChatPromptValue(messages=messages, **find_segments(variables))

    @override
    async def aformat_prompt(self, **kwargs: Any) -> RapidChatPromptValue:
        """:meth:`format_prompt`; formatting does not wait for anything."""
        return self.format_prompt(**kwargs)


def _context_as_text(variables: dict[str, Any]) -> dict[str, Any]:
    # Without this, a list of documents would be formatted by repr().
    name = find_variable(variables, CONTEXT_NAMES)
    return {**variables, name: value_text(variables[name])} if name else variables
