"""The module name by which stored LangChain chains refer to ``ChatRapid``."""

from rapid_integrations.langchain.chat_model import ChatRapid

__all__ = ["ChatRapid"]
