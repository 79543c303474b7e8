"""``RapidQueryEngine``: a LlamaIndex query engine over whole documents, drafting from retrieved nodes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from typing import Any, Self

from llama_index.core import Settings
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import CompletionResponse
from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.indices.base import BaseIndex
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle, TextNode
from llama_index.core.types import TokenAsyncGen, TokenGen

from rapid_integrations.errors import ConfigurationError, DocumentError, RetrievalError
from rapid_integrations.events import TextEvent
from rapid_integrations.hosts.base import check_llm
from rapid_integrations.hosts.call import describe_type
from rapid_integrations.hosts.prompt_text import value_text
from rapid_integrations.hosts.sources import SourceRecorder
from rapid_integrations.llama_index.documents import stored_documents
from rapid_integrations.llama_index.llm import LlamaIndexLLM
from rapid_integrations.retrieval import RetrievedContext

Documents = str | BaseNode | Sequence[str | BaseNode] | Mapping[str, str]


class RapidQueryEngine(BaseQueryEngine):
    """Answers over whole documents: the target reads all of them, the drafter reads retrieved nodes.

    The documents come before the question in the prompt, so a second question about them reuses the target's
    cache (``reused_prefix_tokens`` in the statistics). A response's ``source_nodes`` are the nodes that the
    drafter read, in document order. If retrieval failed or found nothing, they are pieces of the documents'
    start and end, and ``retrieval_fallback`` in the statistics gives the reason. ``metadata["rapid"]`` holds
    the statistics. A streaming response has its source nodes at once, and the statistics when it has ended::

        engine = RapidQueryEngine.from_index(VectorStoreIndex.from_documents(documents), RapidLLM.demo())
        response = engine.query("Which passcode opens the Trottivik depot?")

    Args:
        retriever: Finds the nodes that the drafter reads. It is called in a separate thread, with the LLM's
            ``retrieval_timeout_s``.
        documents: The documents that the target reads: texts, LlamaIndex documents or nodes, in this order,
            or texts by id.
        llm: A :class:`~rapid_integrations.RapidLLM`; ``None`` is LlamaIndex's ``Settings.llm``.
        node_postprocessors: Filter or rerank the retrieved nodes.
        max_documents: Upper limit on the documents that the target reads: those of the nodes that the
            retriever ranks first, matched by document id. Retrieval then runs first, and its failure fails
            the query. ``None`` reads all documents, whatever is found.
        text_qa_template: The prompt, with ``context_str`` and ``query_str``; LlamaIndex's default if
            ``None``.
        streaming: Whether ``query`` and ``aquery`` return the answer piece by piece, from its first token on.
        callback_manager: Receives LlamaIndex's query events; LlamaIndex's default if ``None``.

    Raises:
        ConfigurationError: The LLM is not a RapidLLM, the retriever is not a LlamaIndex retriever, or
            ``max_documents`` is not positive.
        DocumentError: The documents have no text, or two documents have the same id.
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        documents: Documents,
        llm: Any = None,
        *,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        max_documents: int | None = None,
        text_qa_template: BasePromptTemplate | None = None,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if not isinstance(retriever, BaseRetriever):
            raise ConfigurationError(
                f"retriever is {describe_type(retriever)}: RapidQueryEngine needs a LlamaIndex BaseRetriever,"
                " such as index.as_retriever()."
            )
        if max_documents is not None and max_documents < 1:
            raise ConfigurationError(
                f"max_documents={max_documents} is not allowed: give at least 1, or None for all."
            )
        super().__init__(callback_manager or Settings.callback_manager)
        self._llm = _rapid_llm(llm)
        self._retriever = retriever
        self._documents = _by_id(documents)
        if not "".join(self._documents.values()).strip():
            raise DocumentError("the documents hold no text: give at least one that does.")
        self._max_documents = max_documents
        self._postprocessors = list(node_postprocessors)
        for postprocessor in self._postprocessors:
            postprocessor.callback_manager = self.callback_manager
        self._text_qa_template = text_qa_template or DEFAULT_TEXT_QA_PROMPT_SEL
        self._streaming = streaming

    @classmethod
    def from_retriever(
        cls, retriever: BaseRetriever, documents: Documents, llm: Any = None, **options: Any
    ) -> Self:
        """An engine over documents and a retriever; see the class for the arguments."""
        return cls(retriever, documents, llm, **options)

    @classmethod
    def from_index(
        cls,
        index: BaseIndex[Any],
        llm: Any = None,
        *,
        ref_doc_ids: Collection[str] | None = None,
        retriever_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """An engine over an index and the whole documents in it, as they are now.

        The documents are assembled from the nodes in the index's docstore. Whitespace that a splitter dropped
        between nodes becomes a blank line. Text that repeats for longer than a node (a page of dots) cannot
        be located: such a document comes back shorter, or raises an error. Pass its text to
        :meth:`from_retriever` instead.

        Args:
            index: The index that retrieves.
            llm: As in the class.
            ref_doc_ids: The ids of the documents to read; ``None`` for all. The retriever still searches the
                whole index.
            retriever_kwargs: Arguments of ``index.as_retriever``, such as ``similarity_top_k``.
            **options: As in the class.

        Raises:
            DocumentError: The documents cannot be assembled from the docstore.
        """
        documents = stored_documents(index.docstore, ref_doc_ids)
        return cls(index.as_retriever(**(retriever_kwargs or {})), documents, llm, **options)

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """The retrieved nodes, after the postprocessors."""
        nodes = self._retriever.retrieve(query_bundle)
        for postprocessor in self._postprocessors:
            nodes = postprocessor.postprocess_nodes(nodes, query_bundle=query_bundle)
        return nodes

    async def aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """``retrieve`` without blocking the event loop, if the retriever does not block it."""
        nodes = await self._retriever.aretrieve(query_bundle)
        for postprocessor in self._postprocessors:
            nodes = await postprocessor.apostprocess_nodes(nodes, query_bundle=query_bundle)
        return nodes

    def _get_prompts(self) -> dict[str, Any]:
        return {"text_qa_template": self._text_qa_template}

    def _get_prompt_modules(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: dict[str, Any]) -> None:
        self._text_qa_template = prompts.get("text_qa_template", self._text_qa_template)

    def _choose(self, retrieved: Sequence[NodeWithScore]) -> list[str]:
        """The ids of the documents to read: those of the best nodes, in the documents' own order."""
        ranked = dict.fromkeys(map(_document_id, retrieved))
        best = [name for name in ranked if name in self._documents][: self._max_documents]
        if not best:
            raise RetrievalError(
                f"{type(self._retriever).__name__} found no node of the {len(self._documents)} documents, so "
                "there is none to read. Without max_documents, all documents are read."
            )
        return [name for name in self._documents if name in best]

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        payload: dict[str, Any] = {EventPayload.QUERY_STR: query_bundle.query_str}
        with self.callback_manager.event(CBEventType.QUERY, payload=payload) as query_event:
            retrieved = None if self._max_documents is None else self.retrieve(query_bundle)
            query = _Query(self, query_bundle, retrieved)
            prompt = query.prompt()
            response: RESPONSE_TYPE
            if self._streaming:
                responses = self._llm.stream_complete(prompt)
                # After the first token, errors and the source nodes are known.
                first = next(responses)
                texts = _texts(first, responses, query)
                response = StreamingResponse(texts, query.source_nodes, query.metadata)
            else:
                answer = self._llm.complete(prompt)
                query.end(answer)
                response = Response(answer.text, query.source_nodes, query.metadata)
            query_event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        payload: dict[str, Any] = {EventPayload.QUERY_STR: query_bundle.query_str}
        with self.callback_manager.event(CBEventType.QUERY, payload=payload) as query_event:
            retrieved = None if self._max_documents is None else await self.aretrieve(query_bundle)
            query = _Query(self, query_bundle, retrieved)
            prompt = query.prompt()
            response: RESPONSE_TYPE
            if self._streaming:
                responses = await self._llm.astream_complete(prompt)
                first = await anext(responses)
                texts = _atexts(first, responses, query)
                response = AsyncStreamingResponse(texts, query.source_nodes, query.metadata)
            else:
                answer = await self._llm.acomplete(prompt)
                query.end(answer)
                response = Response(answer.text, query.source_nodes, query.metadata)
            query_event.on_end(payload={EventPayload.RESPONSE: response})
        return response


@dataclass
class _Query:
    """A query in progress: its prompt, its sources and its statistics.

    Attributes:
        engine: The engine that was asked.
        bundle: The question.
        retrieved: Nodes that were retrieved to choose the documents (``max_documents``); ``None`` if the
            target reads all documents, and retrieval runs during the LLM call.
        source_nodes: The nodes that the drafter reads.
        metadata: The metadata of the response.
    """

    engine: RapidQueryEngine
    bundle: QueryBundle
    retrieved: list[NodeWithScore] | None
    source_nodes: list[NodeWithScore] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        engine, retrieved = self.engine, self.retrieved
        self._ids = list(engine._documents) if retrieved is None else engine._choose(retrieved)

        def search(query: str) -> list[NodeWithScore]:
            if retrieved is None:
                return engine.retrieve(self.bundle)
            return [node for node in retrieved if _document_id(node) in self._ids]

        self._recorder = SourceRecorder(type(engine._retriever).__name__, search)

    def prompt(self) -> str:
        """The prompt, with documents and question kept apart, and with the arguments of its call."""
        text = value_text([self.engine._documents[name] for name in self._ids])
        template = self.engine._text_qa_template
        prompt = self.engine._llm._get_prompt(template, context_str=text, query_str=self.bundle.query_str)
        prompt.arguments = {"retriever": self._recorder, "on_event": self._on_event}
        return prompt

    def _on_event(self, event: TextEvent) -> None:
        """Keep the nodes that the drafter reads."""
        if isinstance(event, RetrievedContext):
            for chunk in event.chunks:
                node = self._recorder.item(chunk)
                self.source_nodes.append(node or NodeWithScore(node=TextNode(text=chunk.text)))
            self.metadata.update({node.node.node_id: node.node.metadata for node in self.source_nodes})

    def end(self, response: CompletionResponse) -> None:
        """Keep the statistics."""
        self.metadata["rapid"] = response.additional_kwargs["rapid"]


def _texts(first: CompletionResponse, responses: Any, query: _Query) -> TokenGen:
    with closing(responses):
        last = first
        yield first.delta or ""
        for last in responses:
            yield last.delta or ""
        query.end(last)


async def _atexts(first: CompletionResponse, responses: Any, query: _Query) -> TokenAsyncGen:
    async with aclosing(responses):
        last = first
        yield first.delta or ""
        async for last in responses:
            yield last.delta or ""
        query.end(last)


def _document_id(node: NodeWithScore) -> str:
    return node.node.ref_doc_id or node.node.node_id


def _by_id(documents: Documents) -> dict[str, str]:
    if isinstance(documents, Mapping):
        return dict(documents)
    given = [documents] if isinstance(documents, (str, BaseNode)) else documents
    by_id: dict[str, str] = {}
    for number, document in enumerate(given):
        name = document.node_id if isinstance(document, BaseNode) else str(number)
        if name in by_id:
            raise DocumentError(
                f"two of the documents have the id {name!r} (a text's id is its index): give each "
                "a different id."
            )
        by_id[name] = value_text(document)
    return by_id


def _rapid_llm(llm: Any) -> LlamaIndexLLM:
    if llm is None:
        try:
            llm = Settings.llm
        except (ImportError, ValueError) as error:  # LlamaIndex's default is a service that is not set up
            raise ConfigurationError(
                "there is no LLM: give RapidQueryEngine a RapidLLM as llm, or set Settings.llm."
            ) from error
    return check_llm(llm, LlamaIndexLLM, "RapidQueryEngine")
