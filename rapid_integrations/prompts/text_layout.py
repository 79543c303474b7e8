"""Where in a prompt that is only text the long document stands, and which part is the question.

The rule, for a prompt without tags:

1. A trailing cue (``Answer:``) is set aside.
2. The question is what the last ``Question:`` or ``Query:`` label in the last 2,000 characters introduces,
    unless an
   answer follows it (an FAQ); else what such a label near the start introduces, up to a ``Context:`` label or
   the end of its paragraph; else, of the last and the first paragraph (line, or sentence in a text of one
   line), the one that looks more like a question, the last one in doubt.
3. The body is the rest, less its own head: what comes before a ``Context:`` label or a rule of dashes in the
    first
   1,000 characters, or before a line that ends with a colon or a paragraph that announces the body ("the
   following context") in the first 500. A rule of dashes like the opening one ends the body.
4. The body is the document if it has at least 512 characters and is at least half of the text. If not, there
    is no
   document.

A head that was taken for one by mistake costs little: it is still in both models' prompts, only not retrieved
from.
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
_MIN_PARAGRAPH_CHARS = 100  # a shorter one is not split further

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
    """Character spans in a text; ``None`` where there is no document or no question."""

    body: Span | None
    question: Span | None


def find_layout(text: str, *, asks: bool = True) -> Layout:
    """Find document and question in a prompt; see the module's docstring for the rule.

    Args:
        text: The prompt, or one message of it.
        asks: A question is expected. If not, only what looks like one is taken for one.
    """
    question, rest = _find_question(text, least_likeness=0 if asks else 1)
    body = find_body(text, rest) if rest else None
    if body is None or body[1] - body[0] < _MIN_BODY_SHARE * len(text.strip()):
        return Layout(None, question)
    return Layout(body, question)


def find_body(text: str, span: Span) -> Span | None:
    """The document within ``span``, which holds no question: less its head, its cue and rules of dashes.

    Returns:
        ``None`` where it has fewer than 512 characters.
    """
    start, end = trim(text, span)
    if cue := _CUE.search(text, max(start, end - _MAX_CUE_CHARS), end):
        end = cue.start()
    start = _end_of_head(text, start, end)
    if opening := _DASHES.search(text, span[0], min(start + 1, len(text))):
        rules = _CLOSING_DASHES.finditer(text, max(start, end - _MAX_HEAD_CHARS), end)
        closing = [rule for rule in rules if rule.group().strip() == opening.group().strip()]
        if closing:
            end = closing[-1].start()
    start, end = trim(text, (start, end))
    return (start, end) if end - start >= MIN_BODY_CHARS else None


def find_body_beside(text: str, *, query_follows: bool) -> Span | None:
    """The document in the text right before a query (``query_follows``) or right after one.

    The rest of the query's own line, and its label, are not part of it.
    """
    if not query_follows:
        line_end = text.find("\n")
        return find_body(text, (line_end if 0 <= line_end <= _MIN_PARAGRAPH_CHARS else 0, len(text)))
    line = text.rfind("\n") + 1
    end = line if len(text) - line <= _MIN_PARAGRAPH_CHARS else len(text)
    labels = _labels(text, max(line, len(text) - _MAX_CUE_CHARS), len(text))
    return find_body(text, (0, labels[0].start() if labels and end == len(text) else end))


def announces_document(text: str) -> bool:
    """Whether the text's head says that a document follows, as a system message with a context does."""
    return _end_of_head(text, 0, len(text)) > 0


def find_question_in(text: str, *, whole: bool = False) -> Span | None:
    """The question in a text that holds no document.

    What a label introduces; else, unless the ``whole`` text is wanted, a last sentence that asks after a
    paragraph that does not; else the text less its cue.
    """
    start, end = 0, len(text.rstrip())
    if cue := _CUE.search(text, max(start, end - _MAX_CUE_CHARS), end):
        end = cue.start()
    if labels := _labels(text, start, end):
        until = _CONTEXT.search(text, labels[-1].end(), end)
        found = trim(text, (labels[-1].end(), until.start() if until else end))
        if found[0] < found[1]:
            return found
    start, end = trim(text, (start, end))
    if not whole and (breaks := list(_SENTENCE_BREAK.finditer(text, start, end))):
        last = breaks[-1].end()
        if last - start > _MIN_PARAGRAPH_CHARS and _likeness(text[last:end], _MAX_SENTENCE_CHARS) > 0:
            return last, end
    return (start, end) if start < end else None


def _find_question(text: str, *, least_likeness: int) -> tuple[Span | None, Span | None]:
    """Return the question's span and that of the text before it, or after it, that may hold the document."""
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
        asked = head[0].end()
        for mark in (_CONTEXT, _PARAGRAPH_BREAK, _LINE_BREAK):
            stop = mark.search(text, asked, min(end, asked + _MAX_QUESTION_CHARS))
            if stop and not _ANSWERED.search(text, asked, min(end, stop.end() + _MAX_CUE_CHARS)):
                return trim(text, (asked, stop.start())), (stop.start(), end)
    for breaks, longest in (
        (_PARAGRAPH_BREAK, _MAX_QUESTION_CHARS),
        (_LINE_BREAK, _MAX_QUESTION_CHARS),
        (_SENTENCE_BREAK, _MAX_SENTENCE_CHARS),
    ):
        found = list(breaks.finditer(text, start, end))
        if not found:
            continue
        first, last = (start, found[0].start()), (found[-1].end(), end)
        if breaks is _PARAGRAPH_BREAK:
            first, last = _first_line_if_question(text, first), _last_line_if_question(text, last)
        first_score = _likeness(text[slice(*first)], longest)
        last_score = _likeness(text[slice(*last)], longest)
        # Only a paragraph of its own is taken for a question without looking like one.
        least = least_likeness if breaks is _PARAGRAPH_BREAK else 1
        if last_score >= max(first_score, least):
            return last, (start, last[0])
        if first_score >= least:
            return first, (first[1], end)
    return None, None


def _first_line_if_question(text: str, paragraph: Span) -> Span:
    line = (paragraph[0], text.find("\n", *paragraph))
    long = paragraph[1] - line[1] > _MIN_PARAGRAPH_CHARS
    return (
        line
        if line[1] >= 0 and long and _likeness(text[slice(*line)], _MAX_QUESTION_CHARS) > 1
        else paragraph
    )


def _last_line_if_question(text: str, paragraph: Span) -> Span:
    line = (text.rfind("\n", *paragraph) + 1, paragraph[1])
    long = line[0] - paragraph[0] > _MIN_PARAGRAPH_CHARS
    return line if long and _likeness(text[slice(*line)], _MAX_QUESTION_CHARS) > 1 else paragraph


def _likeness(text: str, longest: int) -> int:
    """How much a paragraph looks like a question; -1 for one that is too long."""
    if len(text) > longest:
        return -1
    asks = text.rstrip().endswith("?")
    return 2 * asks + bool(_INTERROGATIVE.match(text)) - (text.rstrip().endswith(":") and not asks)


def _labels(text: str, start: int, end: int) -> list[re.Match[str]]:
    found = [*_QUESTION.finditer(text, start, end), *_SHORT_QUESTION.finditer(text, start, end)]
    return sorted(found, key=lambda match: match.start())


def _end_of_head(text: str, start: int, end: int) -> int:
    """Where the body starts that a head announces; ``start`` where there is no head."""
    near = min(end, start + _MAX_HEAD_CHARS)
    marks = [match.end() for pattern in (_DASHES, _CONTEXT) if (match := pattern.search(text, start, near))]
    if marks:
        body = trim(text, (min(marks), end))[0]
        rule = _DASHES.match(text, body, end)
        return rule.end() if rule else body
    near = min(end, start + _MAX_ANNOUNCEMENT_CHARS)
    for pattern in (_FOLLOWING, _COLON_LINE):
        if found := pattern.search(text, start, near):
            marks.append(found.end())
    stop = _PARAGRAPH_BREAK.search(text, start, near)
    if stop and _ANNOUNCES.search(text, start, stop.start()):
        marks.append(stop.end())
    return marks[0] if marks else start


def trim(text: str, span: Span) -> Span:
    """``span`` without the whitespace at its ends."""
    start, end = span
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end
