"""Cutting a document into chunks of limited length, at paragraphs, sentences or words."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.retrieval.base import Chunk

# Patterns of text that ends before a cut, in order of preference, each with the share of a chunk that must
# precede the cut.
_BOUNDARIES = (
    (re.compile(r"\n[ \t]*\n\s*"), 0.5),
    (re.compile(r"\n\s*"), 0.5),
    (re.compile(r"[.!?…。！？][\"'”’)\]]*\s+|[。！？]"), 0.5),
    (re.compile(r"\s+"), 0.0),
)


def cut_into_chunks(text: str, token_starts: Sequence[int], max_tokens: int) -> tuple[Chunk, ...]:
    """Cut a document into chunks.

    A chunk ends after the last paragraph, else line, else sentence that ends in the second half of the text
    that fits, else after the last word, else between two tokens. Whitespace belongs to the chunk before it.

    Args:
        text: The document.
        token_starts: The start of each token in the text, from ``token_offsets``; non-decreasing.
        max_tokens: Upper limit on a chunk's tokens, as counted in the whole document.

    Returns:
        Slices of ``text`` whose concatenation is the text; ``position`` is the chunk's index.

    Raises:
        ConfigurationError: ``max_tokens`` is below 1.
    """
    if max_tokens < 1:
        raise ConfigurationError(f"max_tokens={max_tokens} is not allowed: a chunk has at least 1 token.")
    chunks: list[Chunk] = []
    start, token = 0, 0
    while start < len(text):
        if token + max_tokens >= len(token_starts):
            end = len(text)
        else:
            # A character with more tokens than a chunk is not divided.
            end = _best_cut(text, start, max(token_starts[token + max_tokens], start + 1))
        chunks.append(Chunk(text[start:end], position=len(chunks)))
        start = end
        token = bisect_left(token_starts, start)
    return tuple(chunks)


def _best_cut(text: str, start: int, limit: int) -> int:
    for boundary, share in _BOUNDARIES:
        min_end = start + int((limit - start) * share)
        ends = [
            match.end()
            for match in boundary.finditer(text, start, limit)
            if match.end() > max(min_end, start)
        ]
        if ends:
            return ends[-1]
    return limit


def head_and_tail(text: str, token_starts: Sequence[int], max_tokens: int) -> tuple[Chunk, ...]:
    """The document's start and end, with ``max_tokens`` tokens together; the whole document if it fits.

    ``position`` is the character offset.
    """
    if len(token_starts) <= max_tokens:
        return (Chunk(text, position=0),) if text.strip() else ()
    tail = max_tokens // 2
    head_end = token_starts[max_tokens - tail]
    tail_start = token_starts[len(token_starts) - tail] if tail else len(text)
    pieces = (Chunk(text[:head_end], position=0), Chunk(text[tail_start:], position=tail_start))
    return tuple(piece for piece in pieces if piece.text.strip())
