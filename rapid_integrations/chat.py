"""The module path of ``ChatRapid`` in stored LangChain chains. Part of the stored format: do not rename."""

from rapid_integrations.langchain.chat_model import ChatRapid

__all__ = ["ChatRapid"]
