"""Documents that have been read: their tokens counted, their chunks indexed, once for many questions."""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from rapid_integrations.retrieval.base import Chunk, Retriever
from rapid_integrations.retrieval.chunking import cut_into_chunks, head_and_tail
from rapid_integrations.tokenization.encoding import token_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_DOCUMENTS = 8


class Document:
    """A context, its tokens and its index. Usable from several threads; what is costly is done once.

    Args:
        text: The context.
        tokenizer: The drafter's.
        chunk_tokens: The most tokens a chunk may have.
        build_index: From chunks to what ranks them.
    """

    def __init__(
        self,
        text: str,
        tokenizer: PreTrainedTokenizerBase,
        chunk_tokens: int,
        build_index: Callable[[Sequence[Chunk]], Retriever],
    ) -> None:
        self.text = text
        self._tokenizer = tokenizer
        self._chunk_tokens = chunk_tokens
        self._build_index = build_index
        self._reading, self._indexing = threading.Lock(), threading.Lock()
        self._index: Retriever | None = None

    @cached_property
    def _read(self) -> array[int]:
        return array("q", token_offsets(self.text, self._tokenizer))

    @property
    def token_starts(self) -> array[int]:
        """Where each token begins in the text."""
        with self._reading:
            return self._read

    @property
    def num_tokens(self) -> int:
        """Length in the drafter's tokens."""
        return len(self.token_starts)

    def index(self) -> Retriever:
        """What ranks the document's chunks; a build that fails is tried again by the next question."""
        with self._indexing:
            if self._index is None:
                chunks = cut_into_chunks(self.text, self.token_starts, self._chunk_tokens)
                self._index = self._build_index(chunks)
            return self._index

    def head_and_tail(self, max_tokens: int) -> tuple[Chunk, ...]:
        """The document's start and end, ``max_tokens`` tokens together."""
        return head_and_tail(self.text, self.token_starts, max_tokens)


class DocumentCache:
    """Keeps the documents last asked about, the least recently used going first.

    Args:
        tokenizer: The drafter's.
        build_index: From chunks to what ranks them.
        max_documents: How many to keep.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        build_index: Callable[[Sequence[Chunk]], Retriever],
        max_documents: int = MAX_DOCUMENTS,
    ) -> None:
        self._tokenizer = tokenizer
        self._build_index = build_index
        self._max_documents = max_documents
        self._documents: OrderedDict[tuple[bytes, int], Document] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, text: str, chunk_tokens: int) -> Document:
        """The document of that text and chunk size; read and indexed when first needed."""
        key = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), chunk_tokens)
        with self._lock:
            document = self._documents.pop(key, None)
            if document is None:
                document = Document(text, self._tokenizer, chunk_tokens, self._build_index)
            self._documents[key] = document
            while len(self._documents) > self._max_documents:
                self._documents.popitem(last=False)
            return document
