"""The module name by which stored LangChain chains refer to the prompt templates and values."""

from rapid_integrations.langchain.prompts import (
    RapidChatPromptTemplate,
    RapidChatPromptValue,
    RapidPromptTemplate,
    RapidPromptValue,
)

__all__ = ["RapidChatPromptTemplate", "RapidChatPromptValue", "RapidPromptTemplate", "RapidPromptValue"]
