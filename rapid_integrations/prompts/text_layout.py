"""Find the long document and the question in a plain text without tags, by its layout.

The rule:

1. A cue at the end (``Answer:``) belongs to neither.
2. The question is the text after the last ``Question:`` or ``Query:`` label in the last 2,000 characters,
   unless an answer follows it (an FAQ). Otherwise it is the text after such a label in the first 1,000
   characters, up to a ``Context:`` label or the end of its paragraph. Without a label, it is the first or the
   last paragraph, whichever looks more like a question, and the last one if they are equal. A text of one
   paragraph is divided into lines, and a text of one line into sentences.
3. The body is the rest without its head. The head ends after a ``Context:`` label or a rule of dashes in the
   first 1,000 characters, or after a line that ends with a colon, or a paragraph that announces the body
   ("the following context"), in the first 500. A second rule of dashes like the one in the head ends the
   body.
4. The body is the document if it has at least 512 characters and at least half of the text. Otherwise the
   text has no document.

If the beginning of a document is mistaken for a head, it stays in both models' prompts, but it is not
retrieved from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MIN_BODY_CHARS = 512
_MIN_BODY_SHARE = 0.5
_MAX_HEAD_CHARS = 1000
_MAX_QUESTION_CHARS = 2000
_MAX_SENTENCE_CHARS = 400
_MAX_ANNOUNCEMENT_CHARS = 500
_MAX_CUE_CHARS = 60
_MIN_PARAGRAPH_CHARS = 100  # shorter paragraphs are not divided

_AT_LABEL = r"(?:^[ \t>#*]*|(?<=[.!?:;\"')\]>][ \t])|(?<=[.!?:;\"')\]>]))"
_QUESTION = re.compile(
    _AT_LABEL + r"(?:user(?:'s)? |the )?(?:question|query)\**[ \t]*:\**[ \t]*", re.IGNORECASE | re.MULTILINE
)
_SHORT_QUESTION = re.compile(r"^[ \t]*(?:Q|Task|Instruction|Request)[ \t]*:[ \t]*", re.MULTILINE)
_CONTEXT = re.compile(
    _AT_LABEL + r"(?:the )?(?:context|documents?|passages?|article|text)\**[ \t]*:\**[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
_CUE = re.compile(
    r"(?:^[ \t>#*]*|[ \t])(?:(?:helpful|final|your|the|short) )?"
    r"(?:answer|response|output|summary|assistant|ai|a)\**[ \t]*:\**\s*\Z",
    re.IGNORECASE | re.MULTILINE,
)
_ANSWERED = re.compile(_AT_LABEL + r"(?:answer|a)\**[ \t]*:\**[ \t]*\S", re.IGNORECASE | re.MULTILINE)
_DASHES = re.compile(r"^[ \t]*([-=*_~#])\1{4,}[ \t]*$|(?<=[.:] )([-=*_~])\2{4,}(?= )", re.MULTILINE)
_CLOSING_DASHES = re.compile(r"^[ \t]*([-=*_~#])\1{4,}[ \t]*$|(?<= )([-=*_~])\2{4,}(?= )", re.MULTILINE)
_FOLLOWING = re.compile(
    r"\bfollowing (?:\w+ ){0,2}?(?:context|documents?|passages?|article|text|excerpts?)[ \t]*:[ \t]*",
    re.IGNORECASE,
)
_ANNOUNCES = re.compile(r"\b(?:context|documents?|passages?|article|following|below)\b", re.IGNORECASE)
_INTERROGATIVE = re.compile(
    r"\s*(?:please\b|who|whom|whose|what|when|where|which|why|how|is|are|was|were|does|do|did|can|could|should|would|"
    r"has|have|had|will|in which|summari[sz]e|list|explain|describe|find|give|name|tell|compare|extract|"
    r"answer|according to|write|identify|translate)\b",
    re.IGNORECASE,
)
_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n\s*")
_LINE_BREAK = re.compile(r"\n")
_COLON_LINE = re.compile(r"(?<=:)[ \t]*\n")
_SENTENCE_BREAK = re.compile(r"(?<=[.!?])[ \t]+")

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """Character spans in a text; ``None`` if it has no document or no question."""

    body: Span | None
    question: Span | None


def find_layout(text: str, *, asks: bool = True) -> Layout:
    """Find the document and the question in a prompt by the rule in the module docstring.

    Args:
        text: The prompt, or one of its messages.
        asks: Whether a question is expected. If not, a paragraph must look like a question to be one.
    """
    question, rest = _find_question(text, min_score=0 if asks else 1)
    body = find_body(text, rest) if rest else None
    if body is None or body[1] - body[0] < _MIN_BODY_SHARE * len(text.strip()):
        return Layout(None, question)
    return Layout(body, question)


def find_body(text: str, span: Span) -> Span | None:
    """Find the document in a ``span`` without a question, which may begin with a head and end with a cue.

    Returns:
        The span of the document, or ``None`` if it has fewer than 512 characters.
    """
    start, end = trim(text, span)
    if cue := _CUE.search(text, max(start, end - _MAX_CUE_CHARS), end):
        end = cue.start()
    start = _end_of_head(text, start, end)
    if opening_rule := _DASHES.search(text, span[0], min(start + 1, len(text))):
        rules = _CLOSING_DASHES.finditer(text, max(start, end - _MAX_HEAD_CHARS), end)
        closing_rules = [rule for rule in rules if rule.group().strip() == opening_rule.group().strip()]
        if closing_rules:
            end = closing_rules[-1].start()
    start, end = trim(text, (start, end))
    return (start, end) if end - start >= MIN_BODY_CHARS else None


def find_body_beside(text: str, *, query_follows: bool) -> Span | None:
    """Find the document in the text between a query and the beginning or end of the prompt.

    The rest of the query's line, and its label, are not part of the document.

    Args:
        text: The text directly before or after the query.
        query_follows: Whether the query comes after ``text``.

    Returns:
        The span of the document, or ``None``.
    """
    if not query_follows:
        line_end = text.find("\n")
        return find_body(text, (line_end if 0 <= line_end <= _MIN_PARAGRAPH_CHARS else 0, len(text)))
    line = text.rfind("\n") + 1
    end = line if len(text) - line <= _MIN_PARAGRAPH_CHARS else len(text)
    labels = _labels(text, max(line, len(text) - _MAX_CUE_CHARS), len(text))
    return find_body(text, (0, labels[0].start() if labels and end == len(text) else end))


def announces_document(text: str) -> bool:
    """Whether the text has a head that announces a document."""
    return _end_of_head(text, 0, len(text)) > 0


def find_question_in(text: str, *, whole: bool = False) -> Span | None:
    """Find the question in a text without a document.

    The question is the text after a label; else a last sentence that looks like a question; else the whole
    text without its cue.

    Args:
        text: The text.
        whole: Whether the last sentence alone may not be the question.

    Returns:
        The span of the question, or ``None`` if the text is empty.
    """
    start, end = 0, len(text.rstrip())
    if cue := _CUE.search(text, max(start, end - _MAX_CUE_CHARS), end):
        end = cue.start()
    if labels := _labels(text, start, end):
        context_label = _CONTEXT.search(text, labels[-1].end(), end)
        question = trim(text, (labels[-1].end(), context_label.start() if context_label else end))
        if question[0] < question[1]:
            return question
    start, end = trim(text, (start, end))
    if not whole and (breaks := list(_SENTENCE_BREAK.finditer(text, start, end))):
        last = breaks[-1].end()
        if last - start > _MIN_PARAGRAPH_CHARS and _question_score(text[last:end], _MAX_SENTENCE_CHARS) > 0:
            return last, end
    return (start, end) if start < end else None


def _find_question(text: str, *, min_score: int) -> tuple[Span | None, Span | None]:
    """Find the question, and the text before or after it, which may contain the document.

    Args:
        text: The text.
        min_score: The :func:`_question_score` that a paragraph without a label must have to be the question.
    """
    start, end = trim(text, (0, len(text)))
    if cue := _CUE.search(text, max(start, end - _MAX_CUE_CHARS), end):
        end = trim(text, (start, cue.start()))[1]
    tail = _labels(text, max(start, end - _MAX_QUESTION_CHARS), end)
    if tail and (question := trim(text, (tail[-1].end(), end)))[0] < question[1]:
        inner = _CONTEXT.search(text, *question)
        holds_document = inner is not None and end - inner.end() >= MIN_BODY_CHARS
        if not holds_document and not _ANSWERED.search(text, *question):
            return question, (start, tail[-1].start())
    if head := _labels(text, start, min(end, start + _MAX_HEAD_CHARS)):
        question_start = head[0].end()
        for question_end in (_CONTEXT, _PARAGRAPH_BREAK, _LINE_BREAK):
            stop = question_end.search(text, question_start, min(end, question_start + _MAX_QUESTION_CHARS))
            if stop and not _ANSWERED.search(text, question_start, min(end, stop.end() + _MAX_CUE_CHARS)):
                return trim(text, (question_start, stop.start())), (stop.start(), end)
    for separator, max_chars in (
        (_PARAGRAPH_BREAK, _MAX_QUESTION_CHARS),
        (_LINE_BREAK, _MAX_QUESTION_CHARS),
        (_SENTENCE_BREAK, _MAX_SENTENCE_CHARS),
    ):
        breaks = list(separator.finditer(text, start, end))
        if not breaks:
            continue
        first, last = (start, breaks[0].start()), (breaks[-1].end(), end)
        if separator is _PARAGRAPH_BREAK:
            first, last = _first_line_if_question(text, first), _last_line_if_question(text, last)
        first_score = _question_score(text[slice(*first)], max_chars)
        last_score = _question_score(text[slice(*last)], max_chars)
        # A line or a sentence must look like a question; a paragraph need not.
        required = min_score if separator is _PARAGRAPH_BREAK else 1
        if last_score >= max(first_score, required):
            return last, (start, last[0])
        if first_score >= required:
            return first, (first[1], end)
    return None, None


def _first_line_if_question(text: str, paragraph: Span) -> Span:
    line = (paragraph[0], text.find("\n", *paragraph))
    if line[1] < 0 or paragraph[1] - line[1] <= _MIN_PARAGRAPH_CHARS:
        return paragraph
    return line if _question_score(text[slice(*line)], _MAX_QUESTION_CHARS) > 1 else paragraph


def _last_line_if_question(text: str, paragraph: Span) -> Span:
    line = (text.rfind("\n", *paragraph) + 1, paragraph[1])
    if line[0] - paragraph[0] <= _MIN_PARAGRAPH_CHARS:
        return paragraph
    return line if _question_score(text[slice(*line)], _MAX_QUESTION_CHARS) > 1 else paragraph


def _question_score(text: str, max_chars: int) -> int:
    """Rate how much a text looks like a question, from -1 (or longer than ``max_chars``) to 3."""
    if len(text) > max_chars:
        return -1
    asks = text.rstrip().endswith("?")
    return 2 * asks + bool(_INTERROGATIVE.match(text)) - (text.rstrip().endswith(":") and not asks)


def _labels(text: str, start: int, end: int) -> list[re.Match[str]]:
    labels = [*_QUESTION.finditer(text, start, end), *_SHORT_QUESTION.finditer(text, start, end)]
    return sorted(labels, key=lambda match: match.start())


def _end_of_head(text: str, start: int, end: int) -> int:
    """Return the offset after the head, or ``start`` if there is no head."""
    limit = min(end, start + _MAX_HEAD_CHARS)
    ends = [match.end() for pattern in (_DASHES, _CONTEXT) if (match := pattern.search(text, start, limit))]
    if ends:
        body = trim(text, (min(ends), end))[0]
        rule = _DASHES.match(text, body, end)
        return rule.end() if rule else body
    limit = min(end, start + _MAX_ANNOUNCEMENT_CHARS)
    for pattern in (_FOLLOWING, _COLON_LINE):
        if match := pattern.search(text, start, limit):
            return match.end()
    stop = _PARAGRAPH_BREAK.search(text, start, limit)
    return stop.end() if stop and _ANNOUNCES.search(text, start, stop.start()) else start


def trim(text: str, span: Span) -> Span:
    """Return ``span`` without the whitespace at its ends."""
    start, end = span
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end
