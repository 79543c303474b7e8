"""LlamaIndex's templates, formatted to text that still knows its messages."""

from __future__ import annotations

from typing import Any, Self

from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import BasePromptTemplate
from pydantic import SerializeAsAny

from rapid_integrations.hosts.prompt_text import PromptText
from rapid_integrations.llama_index.messages import host_message, keep_completion, keep_messages


class KeptPrompt(BasePromptTemplate):
    """A template for a program that completes text, which would make one text of a chat template's messages.

    What such a program adds of its output's schema goes here, not into the template, which others may use,
    and is no part of the question.

    Attributes:
        template: Whose text or messages these are.
    """

    template: SerializeAsAny[BasePromptTemplate]

    @classmethod
    def of(cls, template: BasePromptTemplate) -> Self:
        """The template with no output parser of its own, as the program has one."""
        return cls(
            template=template.model_copy(update={"output_parser": None}),
            metadata=template.metadata,
            template_vars=template.template_vars,
            kwargs={},
            output_parser=None,
        )

    def partial_format(self, **kwargs: Any) -> KeptPrompt:
        """This template with some of its variables set."""
        return self.model_copy(update={"template": self.template.partial_format(**kwargs)})

    def format(self, llm: BaseLLM | None = None, **kwargs: Any) -> PromptText:
        """The prompt, its question as it was before the output parser added to it."""
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
        """The prompt's messages."""
        return self._parsed(self.template.format_messages(llm=llm, **kwargs))

    def get_template(self, llm: BaseLLM | None = None) -> str:
        """The template's text."""
        return self.template.get_template(llm=llm)

    def _parsed(self, messages: list[ChatMessage]) -> list[ChatMessage]:
        return messages if self.output_parser is None else self.output_parser.format_messages(messages)
