"""A LangChain chain that reads whole documents and drafts from what a retriever finds in them."""

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
from rapid_integrations.retrieval.hosts import HostRetriever

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
    """A chain whose target reads whole documents and whose drafter reads what a retriever finds.

    It takes a question, or a dict with it as ``question``, ``input`` or ``query``. In a dict, ``documents``
    (or ``context``) are read instead of the chain's own, ``chat_history`` holds the messages so far, and
    whatever else the prompt needs may stand beside them. Documents or a history of ``None`` are as if they
    were not there. It gives a dict:

    * the question, under the name it came by (``question`` for a lone string);
    * ``context``: the LangChain documents that the drafter read, in document order. Where the retriever
      failed or found nothing, they are pieces of the documents' start and end;
    * ``answer``: the text;
    * ``stats``: :meth:`~rapid_integrations.RapidStats.as_dict`, where ``retrieval_fallback`` says whether and
      why the drafter did not read what the retriever found.

    Where a fallback answers that is neither a ``RapidLLM`` nor a ``ChatRapid``, it reads the documents in the
    prompt; there is no drafter then, and ``context`` is empty, ``stats`` ``None``.

    A stream of it gives the question, the sources, pieces of the answer and the statistics as dicts that add
    up to the same. A second question about the same documents starts from what the target has already read::

        chain = create_rapid_chain(RapidLLM.demo(), store.as_retriever(), documents=text)
        print(chain.invoke("Which passcode opens the Trottivik depot?")["answer"])

    Args:
        llm: A :class:`~rapid_integrations.RapidLLM` or :class:`~rapid_integrations.ChatRapid`, also with
            bound arguments, a retry, fallbacks or configurable fields around it. As LangChain has it, a
            retry is for calls that do not stream, and a stream falls back until its answer begins. An
            ``on_event`` that is bound hears every event.
        retriever: A LangChain retriever, vector store or runnable from a question to documents, or anything
            else that :class:`~rapid_integrations.RapidLLM` takes. It is asked in a thread of its own, by its
            synchronous method, for ``retrieval_timeout_s`` at most. ``None`` is the one bound to the LLM or
            its own, or else a search of the documents.
        documents: What the target reads, in this order, joined by blank lines.
        prompt: A template with ``context`` and ``question``. With ``chat_history`` in the input, a text
            template makes the conversation's first message, and a chat template has a placeholder for it.

    Raises:
        ConfigurationError: ``llm`` is none of the two, has an argument bound to it that it does not take or
            that the chain gives (``query``, ``context``), or ``retriever`` is nothing that retrieves.
        PromptError: (from the chain) The input has no question or no document, or a conversation that is
            none or that the prompt has no place for.
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
        # LangChain's types know nothing of functions that take a config.
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

        replace_llms(runnable, None, check)  # what a config may choose instead is checked where it does

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """What of the LLM is configurable."""
        specs: list[ConfigurableFieldSpec] = self._runnable.config_specs
        return specs

    # Not by way of a stream, as a RunnableGenerator would: LangChain retries none, and a stream falls back
    # until its answer begins only.

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
                f"the input is {describe_type(value)}: needed is a question, or a dict with a question and, "
                "if you like, documents."
            )
        name = find_variable(given, ("question", "input", *QUERY_NAMES))
        if name is None:
            raise PromptError(
                f"the input has {', '.join(map(str, given)) or 'nothing'}: the question is missing, which "
                "goes by the name question, input or query."
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
        """The prompt's value; with a conversation before the question, its messages."""
        names = dict.fromkeys(("question", "input", "query"), asked.question)
        values = {**asked.given, **names, "context": asked.text}
        if values.get(HISTORY_NAME) is None:
            values.pop(HISTORY_NAME, None)
        variables = (*self._prompt.input_variables, *self._prompt.optional_variables)
        if HISTORY_NAME not in values or HISTORY_NAME in variables:
            return self._prompt.invoke(values, config)
        if isinstance(self._prompt, BaseChatPromptTemplate):
            raise PromptError(
                f"the input has {HISTORY_NAME} and the chat prompt no place for it: add "
                f"MessagesPlaceholder('{HISTORY_NAME}', optional=True) before its question."
            )
        history = values[HISTORY_NAME]
        if isinstance(history, str) or not isinstance(history, Sequence | PromptValue):
            raise PromptError(
                f"{HISTORY_NAME} is {describe_type(history)}: needed is a list of messages. For a text, give "
                f"create_rapid_chain a prompt with a place for {{{HISTORY_NAME}}}."
            )
        messages = [*convert_to_messages(history), HumanMessage(asked.question)]
        # The document stays in the first message, so that what was read of the conversation is not read anew.
        first = next(i for i, message in enumerate(messages) if message.type == "human")
        names = dict.fromkeys(names, str(messages[first].text))
        messages[first] = HumanMessage(self._prompt.invoke({**values, **names}, config).to_string())
        return messages

    def _answering(self, asked: _Asked, config: RunnableConfig) -> Runnable[Any, Any]:
        """From the prompt to pieces of text. No parser follows: closed early, it would wait for the rest."""

        def place(llm: Any, bound: Mapping[str, Any], fallback: bool) -> Runnable[Any, Any]:
            call = self._call(llm, bound, fallback)
            answering = llm if call is None else self._bind(llm, call, asked, config)
            # What an LLM heard that then failed is nothing that its fallback read.
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
        """What an LLM's call means before its question is known; ``None`` for a fallback of another kind."""
        if fallback and not isinstance(llm, RapidBase):
            return None
        llm = check_llm(llm, RapidBase, "create_rapid_chain", "a RapidLLM or a ChatRapid")
        for name in ("query", "context"):
            if bound.get(name) is not None:
                raise ConfigurationError(
                    f"{name} is bound to the llm, but the chain says what it is: give create_rapid_chain "
                    "documents, and the chain the question."
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
    """One question, and what is learnt while it is answered."""

    name: str
    question: str
    documents: Any
    text: str
    given: dict[str, Any]
    recorder: SourceRecorder | None = None
    retrieved: RetrievedContext | None = None
    completion: Completion | None = None
    told: bool = False

    def hear(
        self,
        event: TextEvent,
        *,
        recorder: SourceRecorder | None,
        listener: Callable[[TextEvent], None] | None,
    ) -> None:
        """Keep what the drafter reads and what the answer cost."""
        if isinstance(event, RetrievedContext):
            self.retrieved, self.recorder = event, recorder
        elif isinstance(event, Completion):
            self.completion = event
        if listener is not None:
            listener(event)

    def forget(self, run: Run) -> None:
        """Begin anew: another LLM is asked."""
        self.retrieved = self.recorder = self.completion = None

    def whole(self, text: Any) -> AddableDict:
        """Everything, the answer in one piece."""
        whole = AddableDict({self.name: self.question})
        for chunk in (*self.chunks(text), self.end()):
            whole = AddableDict(whole + chunk)
        return whole

    def chunks(self, text: Any) -> list[AddableDict]:
        """A piece of the answer, and before the first one the sources."""
        piece = AddableDict({"answer": str(getattr(text, "text", text))})  # of a message, its text
        if self.told:
            return [piece]
        self.told = True
        chunks = self.retrieved.chunks if self.retrieved is not None else ()
        return [AddableDict({"context": [self._source(chunk) for chunk in chunks]}), piece]

    def end(self) -> AddableDict:
        """The statistics, where it was one of ours that answered."""
        return AddableDict({"stats": self.completion and self.completion.stats.as_dict()})

    def _source(self, chunk: RetrievedChunk) -> Document:
        """The document that the retriever found, or the piece of the whole documents."""
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
        return Document(chunk.text)  # it runs across the border of two documents
