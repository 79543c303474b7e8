"""``create_rapid_chain``: question answering over whole documents, drafting from retrieved passages.

For each input the chain makes a :class:`~rapid_integrations.langchain.chain_run.ChainRun`, binds the LLM to
its question, its documents and the retriever, and calls the LLM with the formatted prompt.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import replace
from functools import partial
from typing import Any, cast

from langchain_core.documents import Document
from langchain_core.messages import HumanMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import BaseChatPromptTemplate, BasePromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig, RunnableGenerator
from langchain_core.runnables.utils import AddableDict, ConfigurableFieldSpec
from langchain_core.vectorstores import VectorStore

from rapid_integrations.errors import ConfigurationError, PromptError
from rapid_integrations.hosts.base import RapidBase, check_llm
from rapid_integrations.hosts.call import Call, describe_type
from rapid_integrations.hosts.prompt_text import QUERY_NAMES, find_variable, value_text
from rapid_integrations.hosts.sources import SourceRecorder
from rapid_integrations.langchain.chain_run import ChainRun
from rapid_integrations.langchain.prompts import RapidPromptTemplate
from rapid_integrations.langchain.wrappers import replace_llms
from rapid_integrations.retrieval import as_retriever
from rapid_integrations.retrieval.adapters import HostRetriever

Documents = str | Document | Sequence[str | Document]

# Keys of the input.
_QUESTION_NAMES = ("question", "input", *QUERY_NAMES)
_DOCUMENT_NAMES = ("documents", "context")
_HISTORY_NAME = "chat_history"

# Arguments of the LLM's calls that the chain sets.
_CHAIN_ARGUMENTS = ("query", "context", "retriever", "on_event")

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
        llm: Any,
        retriever: Any,
        documents: Documents | None,
        prompt: BasePromptTemplate[Any] | None,
    ) -> None:
        # LangChain's types do not include functions that take a config.
        super().__init__(cast("Any", self._stream_run), cast("Any", self._astream_run), name="rapid_chain")
        self._llm = llm
        self._retriever = retriever
        self._documents = documents
        self._prompt: BasePromptTemplate[Any] = prompt or RapidPromptTemplate.from_template(DEFAULT_PROMPT)

        def check(llm: Any, bound: Mapping[str, Any], is_fallback: bool) -> Runnable[Any, Any]:
            call = self._parse_bound(llm, bound, is_fallback)
            if call is not None and call.retriever is not None:
                as_retriever(call.retriever)
            checked: Runnable[Any, Any] = llm
            return checked

        # This checks the default alternatives. Others are checked when a config selects them.
        replace_llms(llm, None, check)

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """The configurable fields of the LLM."""
        specs: list[ConfigurableFieldSpec] = self._llm.config_specs
        return specs

    # Entry points. RunnableGenerator would implement invoke by a stream, which LangChain does not retry, and
    # which falls back only before its answer begins.

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """Answer one question."""
        return self._call_with_config(cast("Any", self._invoke_run), input, config, **kwargs)

    async def ainvoke(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Answer one question without blocking the event loop."""
        return await self._acall_with_config(cast("Any", self._ainvoke_run), input, config, **kwargs)

    def _invoke_run(self, value: Any, config: RunnableConfig) -> AddableDict:
        run = self._start_run(value)
        answer = self._bind_llms(run, config).invoke(self._format_prompt(run, config), config)
        return run.output(answer)

    async def _ainvoke_run(self, value: Any, config: RunnableConfig) -> AddableDict:
        run = self._start_run(value)
        answer = await self._bind_llms(run, config).ainvoke(self._format_prompt(run, config), config)
        return run.output(answer)

    def _stream_run(self, inputs: Iterator[Any], config: RunnableConfig) -> Iterator[AddableDict]:
        value: Any = None
        for part in inputs:
            value = part if value is None else value + part
        run = self._start_run(value)
        yield run.question_chunk()
        llm = self._bind_llms(run, config)
        with closing(cast("Any", llm.stream(self._format_prompt(run, config), config))) as pieces:
            for piece in pieces:
                yield from run.answer_chunks(piece)
        yield run.stats_chunk()

    async def _astream_run(
        self, inputs: AsyncIterator[Any], config: RunnableConfig
    ) -> AsyncIterator[AddableDict]:
        value: Any = None
        async for part in inputs:
            value = part if value is None else value + part
        run = self._start_run(value)
        yield run.question_chunk()
        llm = self._bind_llms(run, config)
        async with aclosing(cast("Any", llm.astream(self._format_prompt(run, config), config))) as pieces:
            async for piece in pieces:
                for chunk in run.answer_chunks(piece):
                    yield chunk
        yield run.stats_chunk()

    # Input

    def _start_run(self, value: Any) -> ChainRun:
        inputs = {"question": value} if isinstance(value, str) else value
        if not isinstance(inputs, Mapping):
            raise PromptError(
                f"the input is {describe_type(value)}: give a question, or a dict with a question and "
                "optionally documents."
            )
        question_name = find_variable(inputs, _QUESTION_NAMES)
        if question_name is None:
            raise PromptError(
                f"the input has {', '.join(map(str, inputs)) or 'no keys'}: the question is missing. Give it "
                "under the key question, input or query."
            )
        document_name = next((name for name in _DOCUMENT_NAMES if inputs.get(name) is not None), None)
        documents = self._documents if document_name is None else inputs[document_name]
        text = "" if documents is None else value_text(documents)
        if not text.strip():
            raise PromptError(
                "there is no document to read: give create_rapid_chain documents, or the input a dict with "
                "documents beside the question."
            )
        return ChainRun(
            inputs=dict(inputs),
            question_name=question_name,
            question=value_text(inputs[question_name]),
            documents=documents,
            text=text,
        )

    def _format_prompt(self, run: ChainRun, config: RunnableConfig) -> PromptValue | list[Any]:
        """The prompt value, or with a chat history its messages."""
        questions = dict.fromkeys(("question", "input", "query"), run.question)
        values = {**run.inputs, **questions, "context": run.text}
        if values.get(_HISTORY_NAME) is None:
            values.pop(_HISTORY_NAME, None)
        variables = (*self._prompt.input_variables, *self._prompt.optional_variables)
        if _HISTORY_NAME not in values or _HISTORY_NAME in variables:
            return self._prompt.invoke(values, config)
        if isinstance(self._prompt, BaseChatPromptTemplate):
            raise PromptError(
                f"the input has {_HISTORY_NAME}, but the chat prompt has no placeholder for it: add "
                f"MessagesPlaceholder('{_HISTORY_NAME}', optional=True) before its question."
            )
        history = values[_HISTORY_NAME]
        if isinstance(history, str) or not isinstance(history, Sequence | PromptValue):
            raise PromptError(
                f"{_HISTORY_NAME} is {describe_type(history)}: give a list of messages. For a text, give "
                f"create_rapid_chain a prompt with the variable {{{_HISTORY_NAME}}}."
            )
        messages = [*convert_to_messages(history), HumanMessage(run.question)]
        # The document stays in the first message, so that the cached prefix of the conversation is reused.
        first = next(i for i, message in enumerate(messages) if message.type == "human")
        questions = dict.fromkeys(questions, str(messages[first].text))
        messages[first] = HumanMessage(self._prompt.invoke({**values, **questions}, config).to_string())
        return messages

    # The LLM

    def _bind_llms(self, run: ChainRun, config: RunnableConfig) -> Runnable[Any, Any]:
        """The LLM (with its fallbacks), bound to the question, documents and retriever of this run.

        No output parser follows the LLM: closed before its end, a parser waits for the rest of the answer.
        """

        def bind(llm: Any, bound: Mapping[str, Any], is_fallback: bool) -> Runnable[Any, Any]:
            call = self._parse_bound(llm, bound, is_fallback)
            bound_llm = llm if call is None else self._bind_llm(llm, call, run, config)
            # Events of an LLM that failed do not belong to the answer of its fallback.
            return bound_llm.with_listeners(on_start=run.forget_events) if is_fallback else bound_llm

        return replace_llms(self._llm, config, bind, unbound=_CHAIN_ARGUMENTS)

    def _bind_llm(self, llm: Any, call: Call, run: ChainRun, config: RunnableConfig) -> Runnable[Any, Any]:
        retriever = None if call.retriever is None else as_retriever(call.retriever)
        recorder = None
        if isinstance(retriever, HostRetriever):
            search = retriever.call
            if isinstance(call.retriever, Runnable):  # with the config, its trace is part of the chain's
                search = partial(call.retriever.invoke, config=config)
            retriever = recorder = SourceRecorder(retriever.name, search)
        arguments = {} if retriever is None else {"retriever": retriever}
        on_event = partial(run.record_event, recorder=recorder, listener=call.on_event)
        binding: Runnable[Any, Any] = llm.bind(
            query=run.question, context=run.text, on_event=on_event, **arguments
        )
        return binding

    def _parse_bound(self, llm: Any, bound: Mapping[str, Any], is_fallback: bool) -> Call | None:
        """The call that ``bound`` arguments describe, with the chain's retriever.

        A fallback of another class has no such call: the result is ``None``.

        Raises:
            ConfigurationError: See :func:`create_rapid_chain`.
        """
        if is_fallback and not isinstance(llm, RapidBase):
            return None
        llm = check_llm(llm, RapidBase, "create_rapid_chain", "a RapidLLM or a ChatRapid")
        for name in ("query", "context"):
            if bound.get(name) is not None:
                raise ConfigurationError(
                    f"{name} is bound to the llm, but the chain sets it: give the documents to "
                    "create_rapid_chain, and the question to the chain."
                )
        call: Call = llm._parse_call(
            {name: value for name, value in bound.items() if not name.startswith("ls_")}
        )
        retriever = call.retriever if self._retriever is None else self._retriever
        if isinstance(retriever, VectorStore):
            retriever = retriever.as_retriever()
        return replace(call, retriever=retriever)
