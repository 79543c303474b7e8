"""The module path of the prompts in stored LangChain chains. Part of the stored format: do not rename."""

from rapid_integrations.langchain.prompts import (
    RapidChatPromptTemplate,
    RapidChatPromptValue,
    RapidPromptTemplate,
    RapidPromptValue,
)

__all__ = ["RapidChatPromptTemplate", "RapidChatPromptValue", "RapidPromptTemplate", "RapidPromptValue"]
