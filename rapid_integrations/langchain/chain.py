"""``create_rapid_chain``: question answering over whole documents, drafting from retrieved passages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from langchain_core.documents import Document
from langchain_core.messages import HumanMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import BaseChatPromptTemplate, BasePromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig, RunnableGenerator
from langchain_core.runnables.utils import AddableDict, ConfigurableFieldSpec
from langchain_core.tracers.schemas import Run
from langchain_core.vectorstores import VectorStore

from rapid_integrations.engine.stats import RetrievedChunk
from rapid_integrations.errors import ConfigurationError, PromptError
from rapid_integrations.events import Completion, TextEvent
from rapid_integrations.hosts.base import RapidBase, check_llm
from rapid_integrations.hosts.call import Call, describe_type
from rapid_integrations.hosts.prompt_text import QUERY_NAMES, find_variable, value_text
from rapid_integrations.hosts.sources import SourceRecorder
from rapid_integrations.langchain.prompts import RapidPromptTemplate
from rapid_integrations.langchain.wrappers import replace_llms
from rapid_integrations.retrieval import RetrievedContext, as_retriever
from rapid_integrations.retrieval.adapters import HostRetriever

Documents = str | Document | Sequence[str | Document]

DOCUMENT_NAMES = ("documents", "context")
_OWN_ARGUMENTS = ("query", "context", "retriever", "on_event")
HISTORY_NAME = "chat_history"
DEFAULT_PROMPT = "Context:\n{context}\n\nQuestion: {question}\nAnswer:"


def create_rapid_chain(
    llm: Any,
    retriever: Any = None,
    *,
    documents: Documents | None = None,
    prompt: BasePromptTemplate[Any] | None = None,
) -> Runnable[Any, dict[str, Any]]:
    """A chain in which the target reads whole documents and the drafter reads retrieved passages.

    The input is a question, or a dict that has it as ``question``, ``input`` or ``query``. In a dict,
    ``documents`` (or ``context``) replace the chain's own documents, ``chat_history`` holds the messages so
    far, and further keys are variables of the prompt. ``None`` for documents or history is the same as no
    key. The output is a dict:

    * the question, under the key it came with (``question`` for a plain string);
    * ``context``: the LangChain documents that the drafter read, in document order. If the retriever failed
      or found nothing, they are pieces of the documents' start and end;
    * ``answer``: the text;
    * ``stats``: :meth:`~rapid_integrations.RapidStats.as_dict`; ``retrieval_fallback`` says whether and why
      the drafter did not read retrieved passages.

    If a fallback answers that is neither a ``RapidLLM`` nor a ``ChatRapid``, it gets the documents in the
    prompt. There is no drafter then: ``context`` is empty and ``stats`` is ``None``.

    A stream yields the question, the sources, pieces of the answer and the statistics as dicts whose sum is
    the same output. A second question about the same documents reuses the target's cache::

        chain = create_rapid_chain(RapidLLM.demo(), store.as_retriever(), documents=text)
        print(chain.invoke("Which passcode opens the Trottivik depot?")["answer"])

    Args:
        llm: A :class:`~rapid_integrations.RapidLLM` or :class:`~rapid_integrations.ChatRapid`, possibly
            wrapped by bound arguments, a retry, fallbacks or configurable fields. LangChain's rules apply: a
            retry does not cover streams, and a stream falls back only before its answer begins. A bound
            ``on_event`` receives every event.
        retriever: A LangChain retriever, vector store or runnable from a question to documents, or any other
            retriever that :class:`~rapid_integrations.RapidLLM` takes. Its synchronous method is called in a
            separate thread, for at most ``retrieval_timeout_s``. ``None`` uses the LLM's retriever (bound or
            its own), or else a search of the documents.
        documents: The documents that the target reads, in this order, joined by blank lines.
        prompt: A template with ``context`` and ``question``. With ``chat_history`` in the input, a text
            template formats the conversation's first message, and a chat template needs a placeholder for it.

    Raises:
        ConfigurationError: ``llm`` is neither of the two classes, or has a bound argument that it does not
            take or that the chain sets (``query``, ``context``), or ``retriever`` is not a retriever.
        PromptError: Raised by the chain: the input has no question or no document, or a ``chat_history`` that
            is not a list of messages or that the prompt has no placeholder for.
    """
    return _DocumentChain(llm, retriever, documents, prompt)


class _DocumentChain(RunnableGenerator[Any, dict[str, Any]]):
    def __init__(
        self,
        runnable: Any,
        retriever: Any,
        documents: Documents | None,
        prompt: BasePromptTemplate[Any] | None,
    ) -> None:
        # LangChain's types do not include functions that take a config.
        super().__init__(cast("Any", self._pieces), cast("Any", self._apieces), name="rapid_chain")
        self._runnable = runnable
        self._retriever = retriever
        self._documents = documents
        self._prompt: BasePromptTemplate[Any] = prompt or RapidPromptTemplate.from_template(DEFAULT_PROMPT)

        def check(llm: Any, bound: Mapping[str, Any], fallback: bool) -> Runnable[Any, Any]:
            call = self._call(llm, bound, fallback)
            if call is not None and call.retriever is not None:
                as_retriever(call.retriever)
            checked: Runnable[Any, Any] = llm
            return checked

        replace_llms(runnable, None, check)  # alternatives that a config selects are checked when it does

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """The configurable fields of the LLM."""
        specs: list[ConfigurableFieldSpec] = self._runnable.config_specs
        return specs

    # RunnableGenerator would implement invoke by a stream, which LangChain does not retry, and which falls
    # back only before its answer begins.

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """Answer one question."""
        return self._call_with_config(cast("Any", self._answer), input, config, **kwargs)

    async def ainvoke(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Answer one question without blocking the event loop."""
        return await self._acall_with_config(cast("Any", self._aanswer), input, config, **kwargs)

    def _answer(self, value: Any, config: RunnableConfig) -> AddableDict:
        asked = self._ask(value)
        text = self._answering(asked, config).invoke(self._format(asked, config), config)
        return asked.whole(text)

    async def _aanswer(self, value: Any, config: RunnableConfig) -> AddableDict:
        asked = self._ask(value)
        text = await self._answering(asked, config).ainvoke(self._format(asked, config), config)
        return asked.whole(text)

    def _pieces(self, inputs: Iterator[Any], config: RunnableConfig) -> Iterator[AddableDict]:
        value: Any = None
        for part in inputs:
            value = part if value is None else value + part
        asked = self._ask(value)
        yield AddableDict({asked.name: asked.question})
        answering = self._answering(asked, config)
        with closing(cast("Any", answering.stream(self._format(asked, config), config))) as texts:
            for text in texts:
                yield from asked.chunks(text)
        yield asked.end()

    async def _apieces(
        self, inputs: AsyncIterator[Any], config: RunnableConfig
    ) -> AsyncIterator[AddableDict]:
        value: Any = None
        async for part in inputs:
            value = part if value is None else value + part
        asked = self._ask(value)
        yield AddableDict({asked.name: asked.question})
        answering = self._answering(asked, config)
        async with aclosing(cast("Any", answering.astream(self._format(asked, config), config))) as texts:
            async for text in texts:
                for chunk in asked.chunks(text):
                    yield chunk
        yield asked.end()

    def _ask(self, value: Any) -> _Asked:
        given = {"question": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping):
            raise PromptError(
                f"the input is {describe_type(value)}: give a question, or a dict with a question and "
                "optionally documents."
            )
        name = find_variable(given, ("question", "input", *QUERY_NAMES))
        if name is None:
            raise PromptError(
                f"the input has {', '.join(map(str, given)) or 'no keys'}: the question is missing. Give it "
                "under the key question, input or query."
            )
        own = next((name for name in DOCUMENT_NAMES if given.get(name) is not None), None)
        documents = self._documents if own is None else given[own]
        text = "" if documents is None else value_text(documents)
        if not text.strip():
            raise PromptError(
                "there is no document to read: give create_rapid_chain documents, or the input a dict with "
                "documents beside the question."
            )
        return _Asked(name, value_text(given[name]), documents, text, dict(given))

    def _format(self, asked: _Asked, config: RunnableConfig) -> PromptValue | list[Any]:
        """The prompt value, or with a chat history its messages."""
        names = dict.fromkeys(("question", "input", "query"), asked.question)
        values = {**asked.given, **names, "context": asked.text}
        if values.get(HISTORY_NAME) is None:
            values.pop(HISTORY_NAME, None)
        variables = (*self._prompt.input_variables, *self._prompt.optional_variables)
        if HISTORY_NAME not in values or HISTORY_NAME in variables:
            return self._prompt.invoke(values, config)
        if isinstance(self._prompt, BaseChatPromptTemplate):
            raise PromptError(
                f"the input has {HISTORY_NAME}, but the chat prompt has no placeholder for it: add "
                f"MessagesPlaceholder('{HISTORY_NAME}', optional=True) before its question."
            )
        history = values[HISTORY_NAME]
        if isinstance(history, str) or not isinstance(history, Sequence | PromptValue):
            raise PromptError(
                f"{HISTORY_NAME} is {describe_type(history)}: give a list of messages. For a text, give "
                f"create_rapid_chain a prompt with the variable {{{HISTORY_NAME}}}."
            )
        messages = [*convert_to_messages(history), HumanMessage(asked.question)]
        # The document stays in the first message, so that the cached prefix of the conversation is reused.
        first = next(i for i, message in enumerate(messages) if message.type == "human")
        names = dict.fromkeys(names, str(messages[first].text))
        messages[first] = HumanMessage(self._prompt.invoke({**values, **names}, config).to_string())
        return messages

    def _answering(self, asked: _Asked, config: RunnableConfig) -> Runnable[Any, Any]:
        """The LLM, bound to this question. An output parser, closed early, would wait for the rest."""

        def place(llm: Any, bound: Mapping[str, Any], fallback: bool) -> Runnable[Any, Any]:
            call = self._call(llm, bound, fallback)
            answering = llm if call is None else self._bind(llm, call, asked, config)
            # Events of an LLM that failed do not belong to the answer of its fallback.
            return answering.with_listeners(on_start=asked.forget) if fallback else answering

        return replace_llms(self._runnable, config, place, unbound=_OWN_ARGUMENTS)

    def _bind(self, llm: Any, call: Call, asked: _Asked, config: RunnableConfig) -> Runnable[Any, Any]:
        reader = None if call.retriever is None else as_retriever(call.retriever)
        recorder = None
        if isinstance(reader, HostRetriever):
            search = reader.call
            if isinstance(call.retriever, Runnable):  # traced below the chain
                search = partial(call.retriever.invoke, config=config)
            reader = recorder = SourceRecorder(reader.name, search)
        hear = partial(asked.hear, recorder=recorder, listener=call.on_event)
        found = {} if reader is None else {"retriever": reader}
        binding: Runnable[Any, Any] = llm.bind(
            query=asked.question, context=asked.text, on_event=hear, **found
        )
        return binding

    def _call(self, llm: Any, bound: Mapping[str, Any], fallback: bool) -> Call | None:
        """The call of an LLM, without its question; ``None`` for a fallback of another class."""
        if fallback and not isinstance(llm, RapidBase):
            return None
        llm = check_llm(llm, RapidBase, "create_rapid_chain", "a RapidLLM or a ChatRapid")
        for name in ("query", "context"):
            if bound.get(name) is not None:
                raise ConfigurationError(
                    f"{name} is bound to the llm, but the chain sets it: give the documents to "
                    "create_rapid_chain, and the question to the chain."
                )
        call: Call = llm._parse_call(
            {name: item for name, item in bound.items() if not name.startswith("ls_")}
        )
        retriever = call.retriever if self._retriever is None else self._retriever
        if isinstance(retriever, VectorStore):
            retriever = retriever.as_retriever()
        return replace(call, retriever=retriever)


@dataclass
class _Asked:
    """A question, and the events of its answer."""

    name: str
    question: str
    documents: Any
    text: str
    given: dict[str, Any]
    recorder: SourceRecorder | None = None
    retrieved: RetrievedContext | None = None
    completion: Completion | None = None
    sources_emitted: bool = False

    def hear(
        self,
        event: TextEvent,
        *,
        recorder: SourceRecorder | None,
        listener: Callable[[TextEvent], None] | None,
    ) -> None:
        """Keep the drafter's context and the completion, and pass the event on."""
        if isinstance(event, RetrievedContext):
            self.retrieved, self.recorder = event, recorder
        elif isinstance(event, Completion):
            self.completion = event
        if listener is not None:
            listener(event)

    def forget(self, run: Run) -> None:
        """Drop all events: another LLM answers."""
        self.retrieved = self.recorder = self.completion = None

    def whole(self, text: Any) -> AddableDict:
        """The whole output, with the answer in one piece."""
        whole = AddableDict({self.name: self.question})
        for chunk in (*self.chunks(text), self.end()):
            whole = AddableDict(whole + chunk)
        return whole

    def chunks(self, text: Any) -> list[AddableDict]:
        """A piece of the answer, with the sources before the first one."""
        piece = AddableDict({"answer": str(getattr(text, "text", text))})  # a message has its text there
        if self.sources_emitted:
            return [piece]
        self.sources_emitted = True
        chunks = self.retrieved.chunks if self.retrieved is not None else ()
        return [AddableDict({"context": [self._source(chunk) for chunk in chunks]}), piece]

    def end(self) -> AddableDict:
        """The statistics; ``None`` if a fallback of another class answered."""
        return AddableDict({"stats": self.completion and self.completion.stats.as_dict()})

    def _source(self, chunk: RetrievedChunk) -> Document:
        """The retrieved document, or a document for a piece of the whole documents."""
        item = None if self.recorder is None else self.recorder.item(chunk)
        if isinstance(item, Document):
            return item
        if item is not None:
            metadata = getattr(getattr(item, "node", item), "metadata", None)
            return Document(chunk.text, metadata=dict(metadata or {}))
        whole = self.documents if isinstance(self.documents, (list, tuple)) else [self.documents]
        for document in whole:
            if (at := value_text(document).find(chunk.text)) >= 0:
                metadata = getattr(document, "metadata", None)
                return Document(chunk.text, metadata={**(metadata or {}), "start_index": at})
        return Document(chunk.text)  # the chunk spans two documents
