"""Composes a document: its entities, the sentences that state their facts, and questions about them."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from rapid_integrations.demo import language
from rapid_integrations.demo.domain import CODE, LINK, NAME, YEAR, Attribute, Domain, EntityKind
from rapid_integrations.demo.domains import HANDBOOK

KINDS = ("single", "describe", "two_hop", "inflected")
EVALUATION_MIX: Mapping[str, float] = {"single": 0.1, "describe": 0.55, "two_hop": 0.2, "inflected": 0.15}
TRAINING_MIX: Mapping[str, float] = {"single": 0.2, "describe": 0.45, "two_hop": 0.15, "inflected": 0.2}

# The tokenizer would not split a stem such as "Tildan", which starts with a first name, into two syllables.
_GIVEN_NAMES = tuple(language.FIRST_NAMES)


@dataclass(eq=False)
class Entity:
    """An entity of a document.

    Attributes:
        name: Its name in sentences.
        stem: The invented part of the name.
        kind: Its kind.
        attributes: The values of the attributes that the document states.
        linked: The entity that it names, if any.
    """

    name: str
    stem: str
    kind: EntityKind
    attributes: dict[str, str] = field(default_factory=dict)
    linked: Entity | None = None

    def statement(self, attribute: str, form: int = 0) -> str:
        """A sentence that states one attribute."""
        return stated(self.kind.attributes[attribute].forms[form], self.name, self.attributes[attribute])


def stated(form: str, name: str, value: str) -> str:
    """Fill an entity's name and a value into a sentence form."""
    return form.replace("{E}", name).replace("{V}", value)


@dataclass(frozen=True, eq=False)
class Sentence:
    """A sentence or heading, and the fact it states, if any."""

    text: str
    fact: tuple[Entity, str] | None = None
    is_heading: bool = False


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the indices of the sentences that contain the answer."""

    kind: str
    question: str
    answer: str
    evidence: tuple[int, ...]


class Namer:
    """Draws names and values; no name is drawn twice.

    Near-duplicates use few syllables, so that names resemble one another as in a much longer document.
    """

    def __init__(
        self, rng: random.Random, domain: Domain, num_tokens: int = 0, *, near_duplicates: bool = False
    ) -> None:
        self._rng = rng
        self._domain = domain
        self._used: set[str] = set()
        self._first, self._second = language.FIRST_SYLLABLES, language.SECOND_SYLLABLES
        self._given, self._nouns = language.FIRST_NAMES, domain.subject.nouns
        if near_duplicates:
            needed = max(16, num_tokens // 3)
            num_first = min(240, max(rng.randint(4, 60), -(-needed // 200)))
            num_second = min(240, max(4, -(-needed // num_first)))
            if rng.random() < 0.5:
                num_first, num_second = num_second, num_first
            self._first = rng.sample(self._first, num_first)
            self._second = rng.sample(self._second, num_second)
            self._given = tuple(rng.sample(self._given, rng.randint(2, 30)))
            self._nouns = tuple(rng.sample(self._nouns, rng.randint(1, len(self._nouns))))

    def stem(self) -> str:
        """A name that was not drawn before."""
        while True:
            name = self._rng.choice(self._first) + self._rng.choice(self._second)
            if name not in self._used and not name.startswith(_GIVEN_NAMES):
                self._used.add(name)
                return name

    def subject(self) -> Entity:
        """A subject without attributes."""
        stem = self.stem()
        return Entity(f"{stem} {self._rng.choice(self._nouns)}", stem, self._domain.subject)

    def linked(self) -> Entity:
        """An entity that a subject can name, without attributes."""
        stem, kind = self.stem(), self._domain.linked
        if kind.nouns:
            return Entity(f"{stem} {self._rng.choice(kind.nouns)}", stem, kind)
        return Entity(f"{self._rng.choice(self._given)} {stem}", stem, kind)

    def value(self, attribute: Attribute) -> str:
        """A value for an attribute."""
        if isinstance(attribute.value, tuple):
            return self._rng.choice(attribute.value)
        if attribute.value == LINK:
            return self.linked().name
        if attribute.value == CODE:
            return f"{self._rng.randrange(10**6):06d}"
        if attribute.value == YEAR:
            return str(self._rng.randrange(1600, 2030))
        if attribute.value == NAME:
            return self.stem()
        return f"{self._rng.randrange(10**4):04d}"


@dataclass(frozen=True, eq=False)
class Composition:
    """The sentences of one document in order, and the entities they are about."""

    domain: Domain
    sentences: list[Sentence]
    entities: list[Entity]

    def ask(
        self,
        rng: random.Random,
        num_questions: int,
        mix: Mapping[str, float],
        present: Collection[int] | None = None,
    ) -> list[Question]:
        """Draw questions whose evidence the document contains.

        Args:
            rng: Source of randomness.
            num_questions: The number of questions; fewer are returned if the document supports fewer.
            mix: The weight of each kind of question. A kind that is absent or has weight 0 is not asked.
            present: Indices of the sentences that the reader sees; ``None`` for all.
        """
        fact_positions = {
            s.fact: i for i, s in enumerate(self.sentences) if s.fact and (present is None or i in present)
        }
        pools = {kind: self._candidates(kind, fact_positions) for kind, weight in mix.items() if weight > 0}
        for pool in pools.values():
            rng.shuffle(pool)
        drawn: list[Question] = []
        while len(drawn) < num_questions and any(pools.values()):
            kinds = [kind for kind, pool in pools.items() if pool]
            kind = rng.choices(kinds, [mix[k] for k in kinds])[0]
            entity, attribute = pools[kind].pop()
            drawn.append(_phrase(rng, self.domain, kind, entity, attribute, fact_positions))
        return drawn

    def _candidates(
        self, kind: str, fact_positions: Mapping[tuple[Entity, str], int]
    ) -> list[tuple[Entity, str]]:
        """The (entity, attribute) pairs that can be asked about; the attribute "" asks for a description."""
        candidates: list[tuple[Entity, str]] = []
        for entity in self.entities:
            stated_names = [a for a in entity.attributes if (entity, a) in fact_positions]
            complete = len(stated_names) >= 2 and len(stated_names) == len(entity.attributes)
            if kind == "single":
                candidates += [(entity, a) for a in stated_names]
            elif kind == "describe" and complete:
                candidates.append((entity, ""))
            elif kind == "two_hop" and entity.linked and (entity, self.domain.link) in fact_positions:
                candidates += [
                    (entity, a) for a in entity.linked.attributes if (entity.linked, a) in fact_positions
                ]
            elif kind == "inflected" and entity.kind.nouns and language.adjective(entity.stem):
                candidates += [(entity, a) for a in stated_names] + [(entity, "")] * (2 * complete)
        return candidates


def _phrase(
    rng: random.Random,
    domain: Domain,
    kind: str,
    entity: Entity,
    attribute: str,
    fact_positions: Mapping[tuple[Entity, str], int],
) -> Question:
    name = entity.name
    if kind == "inflected":
        name = name.replace(entity.stem, language.adjective(entity.stem) or entity.stem)
    if kind == "two_hop" and entity.linked:
        form = rng.choice(domain.linked_questions(attribute))
        answer = f"{entity.statement(domain.link)} {entity.linked.statement(attribute)}"
        facts = [(entity, domain.link), (entity.linked, attribute)]
    elif attribute:
        form = rng.choice(entity.kind.attributes[attribute].questions)
        answer = entity.statement(attribute)
        facts = [(entity, attribute)]
    else:
        form = rng.choice(entity.kind.descriptions)
        attributes = [a for a in entity.kind.attributes if a in entity.attributes]
        answer = " ".join(entity.statement(a) for a in attributes)
        facts = [(entity, a) for a in attributes]
    return Question(kind, form.replace("{E}", name), answer, tuple(fact_positions[fact] for fact in facts))


def compose(
    rng: random.Random,
    num_tokens: int,
    count_tokens: Callable[[str], int],
    *,
    domain: Domain = HANDBOOK,
    filler_share: float = 0.35,
    near_duplicates: bool = False,
    title: str | None = None,
    heading_every: int = 0,
) -> Composition:
    """Write a document of ``num_tokens`` tokens, to within the length of a short sentence.

    Args:
        rng: Source of randomness.
        num_tokens: The length of the document in tokens, title and headings included.
        count_tokens: Counts the tokens of a sentence.
        domain: The document's domain.
        filler_share: The share of the units (parts of a paragraph) that state no fact.
        near_duplicates: Whether names use few syllables and first names, so that they resemble one another.
        title: The title, a heading at the start; ``None`` for no title.
        heading_every: The approximate number of tokens per section; 0 for no headings.
    """
    namer = Namer(rng, domain, num_tokens, near_duplicates=near_duplicates)
    headings = [Sentence(f"# {title}", is_heading=True)] if title else []
    if heading_every:
        headings += [
            Sentence(domain.heading(rng), is_heading=True) for _ in range(num_tokens // heading_every)
        ]
    tokens_left = num_tokens - sum(count_tokens(h.text) for h in headings)
    blocks: list[list[Sentence]] = []
    entities: list[Entity] = []
    pending: list[Entity] = []  # linked entities without a stated fact
    while True:
        draw = rng.random()
        if draw < filler_share:
            block = [Sentence(domain.filler(rng))]
        elif pending and rng.random() < 0.35:
            block = _state(rng, namer, pending.pop(rng.randrange(len(pending))), (1, 2, 2, 3))
        else:
            block = _state(rng, namer, namer.subject(), (1, 2, 3, 3, 4))
        length = sum(count_tokens(s.text) for s in block)
        if length > tokens_left:
            break
        tokens_left -= length
        blocks.append(block)
        if block[0].fact:
            entity = block[0].fact[0]
            entities.append(entity)
            if entity.linked:
                pending.append(entity.linked)
    for _ in range(40):  # fill the remaining tokens
        text = domain.filler(rng)
        if (length := count_tokens(text)) <= tokens_left:
            blocks.append([Sentence(text)])
            tokens_left -= length
    units: list[list[Sentence]] = []
    for block in blocks:
        scatter = len(block) > 1 and rng.random() < 0.15
        units += [[s] for s in block] if scatter else [block]
    rng.shuffle(units)
    return Composition(domain, _with_headings(units, headings, bool(title)), entities)


def _with_headings(units: list[list[Sentence]], headings: list[Sentence], has_title: bool) -> list[Sentence]:
    """Insert the headings at equal distances, the title first."""
    headings_before: dict[int, list[Sentence]] = {}
    sections = headings[1:] if has_title else headings
    if has_title:
        headings_before[0] = [headings[0]]
    for i, section in enumerate(sections):
        headings_before.setdefault(i * len(units) // max(1, len(sections)), []).append(section)
    out: list[Sentence] = []
    for i, unit in enumerate(units):
        out += headings_before.get(i, []) + unit
    return out


def _state(rng: random.Random, namer: Namer, entity: Entity, counts: tuple[int, ...]) -> list[Sentence]:
    """Give an entity attributes of its kind, their number drawn from ``counts``, and state them."""
    kinds = entity.kind.attributes
    chosen = rng.sample(list(kinds), rng.choice(counts))
    for attribute in sorted(chosen, key=list(kinds).index):
        if kinds[attribute].value == LINK:
            entity.linked = namer.linked()
            entity.attributes[attribute] = entity.linked.name
        else:
            entity.attributes[attribute] = namer.value(kinds[attribute])
    attributes = list(entity.attributes)
    if rng.random() < 0.3:
        rng.shuffle(attributes)
    return [Sentence(entity.statement(a, rng.randrange(3)), (entity, a)) for a in attributes]
