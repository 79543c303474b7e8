"""LangChain: the LLM, the chat model, prompt templates, the question-answering chain and a vector store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rapid_integrations.lazy_names import load_lazily

if TYPE_CHECKING:
    from rapid_integrations.langchain.chain import create_rapid_chain
    from rapid_integrations.langchain.chat_model import ChatRapid
    from rapid_integrations.langchain.llm import LangChainLLM
    from rapid_integrations.langchain.prompts import (
        RapidChatPromptTemplate,
        RapidChatPromptValue,
        RapidPromptTemplate,
        RapidPromptValue,
    )
    from rapid_integrations.langchain.vector_store import FaissVectorStore

__all__ = [
    "ChatRapid",
    "FaissVectorStore",
    "LangChainLLM",
    "RapidChatPromptTemplate",
    "RapidChatPromptValue",
    "RapidPromptTemplate",
    "RapidPromptValue",
    "create_rapid_chain",
]

__getattr__, __dir__ = load_lazily(
    __name__,
    {
        "chain": ("create_rapid_chain",),
        "chat_model": ("ChatRapid",),
        "llm": ("LangChainLLM",),
        "prompts": (
            "RapidChatPromptTemplate",
            "RapidChatPromptValue",
            "RapidPromptTemplate",
            "RapidPromptValue",
        ),
        "vector_store": ("FaissVectorStore",),
    },
)
