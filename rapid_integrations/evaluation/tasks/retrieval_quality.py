"""The qualities of retrieval that a task can be asked with."""

from __future__ import annotations

from typing import Literal, get_args

RetrievalQuality = Literal["natural", "gold", "missing", "unrelated", "adversarial"]
"""Which passages the drafter, or the target of ``rag``, reads.

- ``natural``: the passages that a retriever finds;
- ``gold``: the passages with the evidence first;
- ``missing``: none with evidence;
- ``unrelated``: passages of another document;
- ``adversarial``: a passage that contradicts the evidence, and none with evidence.
"""

RETRIEVAL_QUALITIES: tuple[str, ...] = get_args(RetrievalQuality)
