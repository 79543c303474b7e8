"""Training examples: token ids, positions with gaps, and labels that decide a token's weight in the loss."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rapid_integrations.demo import language, prompts
from rapid_integrations.demo.domain import Domain
from rapid_integrations.demo.domains import HANDBOOK
from rapid_integrations.demo.tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    MAX_LENGTH,
    PAD,
    SPECIAL_TOKENS,
    SYSTEM,
    USER,
    build_vocabulary,
    sentence_encoder,
)
from rapid_integrations.demo.world import TRAINING_MIX, Composition, Question, compose

IGNORED, ANSWER, QUESTION, REPEATED, CALL = 0, 1, 2, 3, 4
"""Labels of tokens: no loss, answer, question, repeated ending of a name, tool call."""

_VOCABULARY = build_vocabulary()
SPECIAL_IDS = {token: _VOCABULARY[token] for token in SPECIAL_TOKENS}
_PAD, _BOS, _EOS = SPECIAL_IDS[PAD], SPECIAL_IDS[BOS], SPECIAL_IDS[EOS]
_TAILS = frozenset(_VOCABULARY["##" + s] for s in language.SECOND_SYLLABLES)
_BARE = frozenset(i for piece, i in _VOCABULARY.items() if not piece.startswith("▁")) - set(
    SPECIAL_IDS.values()
)


@dataclass(frozen=True)
class Example:
    """One padded example: token ids, their positions and their labels."""

    ids: list[int]
    positions: list[int]
    labels: list[int]


class Row:
    """Collects the tokens of an example, and the indices at which positions may be skipped."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.gaps: list[int] = []

    def add(self, ids: Sequence[int], label: int = IGNORED, *, gap: bool = False) -> None:
        """Append tokens with one label; with ``gap``, positions may be skipped before them."""
        if gap and self.ids:
            self.gaps.append(len(self.ids))
        self.ids += ids
        self.labels += [label] * len(ids)

    def finish(self, rng: random.Random, length: int, max_position: int) -> Example:
        """Label repeated name endings, choose the positions, and pad to ``length`` tokens."""
        self._mark_repeated()
        extra = [0] * len(self.ids)
        if self.gaps and max_position > length and rng.random() < 0.75:
            total = int(math.exp(rng.uniform(math.log(16), math.log(max_position - length))))
            shares = [rng.random() for _ in range(rng.choice((1, 2, 4, 8, 16)))]
            for share in shares:
                extra[rng.choice(self.gaps)] += int(total * share / sum(shares))
        positions, position = [], -1
        for skipped in extra:
            position += 1 + skipped
            positions.append(position)
        padding = length - len(self.ids)
        positions += range(position + 1, position + 1 + padding)
        return Example(self.ids + [_PAD] * padding, positions, self.labels + [IGNORED] * padding)

    def _mark_repeated(self) -> None:
        seen: set[tuple[int, int]] = set()
        for i in range(1, len(self.ids)):
            if self.ids[i] in _TAILS:
                pair = (self.ids[i - 1], self.ids[i])
                if pair in seen and self.labels[i] == IGNORED:
                    self.labels[i] = REPEATED
                seen.add(pair)


def repetition_example(rng: random.Random, length: int, max_position: int = 0) -> Example:
    """Segments of random tokens, then the same segments in another order, which are to be predicted."""
    row = Row()
    row.add([_BOS])
    segments, left = [], (length - 1) // 2
    while left > 0:
        size = min(rng.randint(4, 12), left)
        segments.append([rng.randrange(len(SPECIAL_TOKENS), len(_VOCABULARY)) for _ in range(size)])
        left -= size
    for segment in segments:
        row.add(segment, gap=True)
    rng.shuffle(segments)
    for segment in segments:
        row.add(segment[:1], gap=True)
        row.add(segment[1:], ANSWER)
    return row.finish(rng, length, max_position)


def question_example(
    rng: random.Random,
    length: int,
    num_questions: int,
    *,
    max_position: int = MAX_LENGTH,
    near_duplicates: float = 0.7,
    filler_share: float = 0.3,
    mix: Mapping[str, float] = TRAINING_MIX,
    domain: Domain = HANDBOOK,
) -> Example:
    """A conversation about one document, whose answers are to be predicted.

    Args:
        rng: Source of randomness.
        length: The length of the example in tokens, padding included.
        num_questions: The number of questions; those that do not fit are dropped.
        max_position: The maximum position that skipping between sentences may reach.
        near_duplicates: The share of documents with similar names.
        filler_share: The share of the document that states no facts.
        mix: The weights of the kinds of questions.
        domain: The document's domain.
    """
    encode = sentence_encoder()
    template, system = _layout(rng, allow_long=length >= 512)
    frame = len(encode(template)) + (len(encode(system)) if system else 0)
    budget = max(64, length - frame - 8 - num_questions * 31)
    is_excerpt = rng.random() < 0.4
    composition = compose(
        rng,
        int(budget * rng.choice((1.2, 2, 4, 8, 24, 24) if length <= 1024 else (1.2, 2, 4, 8)))
        if is_excerpt
        else budget,
        encode.count,
        domain=domain,
        filler_share=filler_share,
        near_duplicates=rng.random() < near_duplicates,
        heading_every=rng.choice((0, 0, 120, 300)) if length >= 256 else 0,
    )
    if is_excerpt:
        entities = composition.entities
        about = rng.sample(entities, min(len(entities), rng.choice((0, 1, 2, 3))))
        pieces = excerpt(rng, composition, budget, about=[entity.name for entity in about])
    else:
        pieces = _whole(composition)
    present = {i for i, _, whole in pieces if whole}
    questions = composition.ask(rng, num_questions, mix, present)
    row = Row()
    row.add([_BOS])
    if not questions:  # the excerpt has no complete facts: use repetition instead
        return repetition_example(rng, length, max_position)
    chat = rng.random() < 0.95
    if system and chat:
        row.add([SPECIAL_IDS[SYSTEM], *encode(system), _EOS])
    if chat:
        row.add([SPECIAL_IDS[USER]])
    _add_prompt(row, template, [ids for _, ids, _ in pieces], encode(questions[0].question))
    _add_turns(rng, row, questions, length, chat=chat)
    return row.finish(rng, length, max_position)


def _layout(rng: random.Random, *, allow_long: bool) -> tuple[str, str | None]:
    templates = {**prompts.PROMPT_TEMPLATES, **(prompts.LONG_PROMPT_TEMPLATES if allow_long else {})}
    systems = {**prompts.SYSTEM_MESSAGES, **(prompts.LONG_SYSTEM_MESSAGES if allow_long else {})}
    template = rng.choices(list(templates), list(templates.values()))[0]
    system = rng.choices(list(systems), list(systems.values()))[0] if rng.random() < 0.2 else None
    return template, system


def _whole(composition: Composition) -> list[tuple[int, list[int], bool]]:
    encode = sentence_encoder()
    return [(i, encode(s.text), True) for i, s in enumerate(composition.sentences)]


def excerpt(
    rng: random.Random,
    composition: Composition,
    budget: int,
    *,
    about: Collection[str] = (),
    needed: Collection[int] = (),
) -> list[tuple[int, list[int], bool]]:
    """Split the document into chunks at any token and keep some of them, as retrieval does.

    Args:
        rng: Source of randomness.
        composition: The document.
        budget: The maximum number of tokens to keep.
        about: Names whose words rank the chunks, as BM25 does. By default the order is random.
        needed: Indices of sentences whose chunks are kept first.

    Returns:
        For each sentence of which tokens are kept: its index, those tokens, and whether they are all of it.
    """
    pieces = _whole(composition)
    size = min(budget, rng.choice((48, 96, 96, 96, 160, 320)))
    offset = rng.randrange(size)
    num_chunks = (sum(len(ids) for _, ids, _ in pieces) + offset) // size + 1
    order = rng.sample(range(num_chunks), num_chunks)
    words = {word for name in about for word in name.split()}
    matches, is_needed, position = [0] * num_chunks, [False] * num_chunks, offset
    for i, ids, _ in pieces:
        matches[position // size] += len(words.intersection(composition.sentences[i].text.split()))
        if i in needed:
            for chunk in range(position // size, (position + len(ids) - 1) // size + 1):
                is_needed[chunk] = True
        position += len(ids)
    order.sort(key=lambda chunk: (not is_needed[chunk], -matches[chunk]))
    kept = set(order[: budget // size])
    out, position = [], offset
    for i, ids, _ in pieces:
        part = [token for k, token in enumerate(ids, position) if k // size in kept]
        whole = len(part) == len(ids)
        while part and not whole and part[0] in _BARE:  # a text that starts there has other tokens
            part = part[1:]
        if part:
            out.append((i, part, whole))
        position += len(ids)
    return out


def _add_prompt(row: Row, template: str, context: list[list[int]], question: list[int]) -> None:
    encode = sentence_encoder()
    for word in template.split():
        if word == "{context}":
            for ids in context:
                row.add(ids, gap=True)
        elif word == "{question}":
            row.add(question, QUESTION, gap=True)
        else:
            row.add(encode(word))


def _add_turns(rng: random.Random, row: Row, questions: list[Question], length: int, *, chat: bool) -> None:
    encode = sentence_encoder()
    follow_up = rng.choice(prompts.FOLLOW_UP_TEMPLATES) if chat else prompts.FOLLOW_UP_TEMPLATES[0]
    for number, question in enumerate(questions):
        question_ids = [] if number == 0 else encode(follow_up.replace("{question}", question.question))
        answer = [*encode(question.answer), _EOS]
        if len(row.ids) + len(question_ids) + len(answer) + 3 > length:
            continue
        if number > 0:
            row.add([SPECIAL_IDS[USER]] if chat else [], gap=True)
            row.add(question_ids, QUESTION)
        if chat:
            row.add([_EOS, SPECIAL_IDS[ASSISTANT]])
        row.add(answer, ANSWER)
