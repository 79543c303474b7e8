"""LlamaIndex's templates, formatted to text that keeps its messages."""

from __future__ import annotations

from typing import Any, Self

from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import BasePromptTemplate
from pydantic import SerializeAsAny

from rapid_integrations.hosts.prompt_text import PromptText
from rapid_integrations.llama_index.messages import host_message, keep_completion, keep_messages


class KeptPrompt(BasePromptTemplate):
    """Wraps a template for a program that completes text, so that a chat template's messages are kept.

    Such a program adds its output's schema to the template. Here the schema is added to the wrapper: the
    template, which may be shared, does not change, and the schema does not become part of the question.

    Attributes:
        template: The wrapped template.
    """

    template: SerializeAsAny[BasePromptTemplate]

    @classmethod
    def of(cls, template: BasePromptTemplate) -> Self:
        """Wrap a template, without its output parser: the program has one."""
        return cls(
            template=template.model_copy(update={"output_parser": None}),
            metadata=template.metadata,
            template_vars=template.template_vars,
            kwargs={},
            output_parser=None,
        )

    def partial_format(self, **kwargs: Any) -> KeptPrompt:
        """The template with some variables set."""
        return self.model_copy(update={"template": self.template.partial_format(**kwargs)})

    def format(self, llm: BaseLLM | None = None, **kwargs: Any) -> PromptText:
        """The formatted prompt. Its query does not include the output parser's additions."""
        text = keep_completion(
            self.template.format(
                llm=llm, messages_to_prompt=keep_messages, completion_to_prompt=keep_completion, **kwargs
            )
        )
        query = text.parts().query
        if text.messages is None:
            added = text if self.output_parser is None else self.output_parser.format(text)
            return PromptText(added, query=query)
        kept = keep_messages(self._parsed(list(map(host_message, text.messages))))
        return PromptText(kept, messages=kept.messages, query=query)

    def format_messages(self, llm: BaseLLM | None = None, **kwargs: Any) -> list[ChatMessage]:
        """The formatted messages."""
        return self._parsed(self.template.format_messages(llm=llm, **kwargs))

    def get_template(self, llm: BaseLLM | None = None) -> str:
        """The template's text."""
        return self.template.get_template(llm=llm)

    def _parsed(self, messages: list[ChatMessage]) -> list[ChatMessage]:
        return messages if self.output_parser is None else self.output_parser.format_messages(messages)
