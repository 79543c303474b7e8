"""Ways to call LangChain models, example tools, and a retriever that records its questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from operator import add
from typing import Any

from helpers.asynchronous import collect
from helpers.fake_pipeline import PEOPLE, PROMPT
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.messages import AIMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from rapid_integrations import ChatRapid, RapidLLM

MODEL_CLASSES = (RapidLLM, ChatRapid)
ENTRIES = ("invoke", "stream", "batch", "ainvoke", "astream", "abatch", "astream_events")

PEOPLE_DOCUMENTS = [Document(text, metadata={"line": line}) for line, text in enumerate(PEOPLE)]


def text_of(value: Any) -> str:
    """The text of a string, a message or a chunk."""
    return str(getattr(value, "text", value))


def total(chunks: Iterable[Any]) -> Any:
    """The sum of a stream's chunks."""
    return reduce(add, chunks)


async def ask(model: Any, entry: str, prompt: Any = PROMPT) -> str:
    """The text that one of LangChain's entry points answers."""
    match entry:
        case "invoke":
            return text_of(model.invoke(prompt))
        case "stream":
            return "".join(map(text_of, model.stream(prompt)))
        case "batch":
            return text_of(*model.batch([prompt]))
        case "ainvoke":
            return text_of(await model.ainvoke(prompt))
        case "astream":
            return "".join(map(text_of, await collect(model.astream(prompt))))
        case "abatch":
            return text_of(*await model.abatch([prompt]))
    events = await collect(model.astream_events(prompt, version="v2"))
    kinds = ("on_llm_stream", "on_chat_model_stream")
    return "".join(text_of(event["data"]["chunk"]) for event in events if event["event"] in kinds)


def contents(message: AIMessage) -> list[Any]:
    """Everything in a message except ids and errors, which streamed messages do not share."""
    return [
        message.content,
        [(call["name"], call["args"]) for call in message.tool_calls],
        [(call["name"], call["args"]) for call in message.invalid_tool_calls],
        message.additional_kwargs,
        message.usage_metadata,
        message.response_metadata["finish_reason"],
    ]


@tool
def search(query: str) -> str:
    """Search the archive."""
    return f"found {query}"


@tool
def count() -> int:
    """Count the ships."""
    return 7


class Person(BaseModel):
    """A person of the archive."""

    name: str = Field(description="the full name")
    age: int


class RecordingRetriever(BaseRetriever):
    """Returns what ``find`` returns, and records the questions."""

    find: Callable[[], list[Document]]
    questions: list[str] = Field(default_factory=list)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        self.questions.append(query)
        return self.find()


class Ship(TypedDict):
    """A ship."""

    name: str
