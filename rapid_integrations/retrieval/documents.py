"""Documents with their tokens and their index, computed once for many questions."""

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
"""Default number of documents that are kept."""


class Document:
    """A context, its tokens and its index. Thread-safe; tokens and index are computed once.

    Args:
        text: The context.
        tokenizer: The drafter's tokenizer.
        chunk_tokens: Upper limit on a chunk's tokens.
        build_index: Builds a retriever over chunks.
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
        self._token_lock, self._index_lock = threading.Lock(), threading.Lock()
        self._index: Retriever | None = None

    @cached_property
    def _token_starts(self) -> array[int]:
        return array("q", token_offsets(self.text, self._tokenizer))

    @property
    def token_starts(self) -> array[int]:
        """The start of each token in the text."""
        with self._token_lock:
            return self._token_starts

    @property
    def num_tokens(self) -> int:
        """The length in the drafter's tokens."""
        return len(self.token_starts)

    def index(self) -> Retriever:
        """The retriever over the document's chunks. A failed build is repeated by the next question."""
        with self._index_lock:
            if self._index is None:
                chunks = cut_into_chunks(self.text, self.token_starts, self._chunk_tokens)
                self._index = self._build_index(chunks)
            return self._index

    def head_and_tail(self, max_tokens: int) -> tuple[Chunk, ...]:
        """The document's start and end, with ``max_tokens`` tokens together."""
        return head_and_tail(self.text, self.token_starts, max_tokens)


class DocumentCache:
    """Keeps the most recently used documents.

    Args:
        tokenizer: The drafter's tokenizer.
        build_index: Builds a retriever over chunks.
        max_documents: The number of documents to keep.
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
        """The document with this text and chunk size; its tokens and index are computed on first use."""
        key = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), chunk_tokens)
        with self._lock:
            document = self._documents.pop(key, None)
            if document is None:
                document = Document(text, self._tokenizer, chunk_tokens, self._build_index)
            self._documents[key] = document
            while len(self._documents) > self._max_documents:
                self._documents.popitem(last=False)
            return document
