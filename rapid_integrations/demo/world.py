"""One document's little world: its entities, the sentences that state their facts, questions about them."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from rapid_integrations.demo import domains, language
from rapid_integrations.demo.domains import HANDBOOK, Attribute, Domain, EntityKind

KINDS = ("single", "describe", "two_hop", "inflected")
EVALUATION_MIX: Mapping[str, float] = {"single": 0.1, "describe": 0.55, "two_hop": 0.2, "inflected": 0.15}
TRAINING_MIX: Mapping[str, float] = {"single": 0.2, "describe": 0.45, "two_hop": 0.15, "inflected": 0.2}


_GIVEN_NAMES = tuple(language.FIRST_NAMES)  # a stem such as Tildan would not read as two syllables


@dataclass(eq=False)
class Entity:
    """Something a document is about; ``name`` is what sentences call it, ``stem`` its invented part."""

    name: str
    stem: str
    kind: EntityKind
    attributes: dict[str, str] = field(default_factory=dict)
    linked: Entity | None = None

    def statement(self, attribute: str, form: int = 0) -> str:
        """Return a sentence that states one attribute."""
        return stated(self.kind.attributes[attribute].forms[form], self.name, self.attributes[attribute])


def stated(form: str, name: str, value: str) -> str:
    """A sentence form with an entity's name and a value."""
    return form.replace("{E}", name).replace("{V}", value)


@dataclass(frozen=True, eq=False)
class Sentence:
    """A sentence or heading, and the fact it states, if any."""

    text: str
    fact: tuple[Entity, str] | None = None
    is_heading: bool = False


@dataclass(frozen=True)
class Question:
    """A question, its answer and the indices of the sentences that hold the answer."""

    kind: str
    question: str
    answer: str
    evidence: tuple[int, ...]


class Namer:
    """Draws names, each once; near-duplicates come from few syllables, as in a much longer document."""

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
        """Return a name not drawn before."""
        while True:
            name = self._rng.choice(self._first) + self._rng.choice(self._second)
            if name not in self._used and not name.startswith(_GIVEN_NAMES):
                self._used.add(name)
                return name

    def subject(self) -> Entity:
        """Return a subject without attributes."""
        stem = self.stem()
        return Entity(f"{stem} {self._rng.choice(self._nouns)}", stem, self._domain.subject)

    def linked(self) -> Entity:
        """Return an entity that a subject can name, without attributes."""
        stem, kind = self.stem(), self._domain.linked
        if kind.nouns:
            return Entity(f"{stem} {self._rng.choice(kind.nouns)}", stem, kind)
        return Entity(f"{self._rng.choice(self._given)} {stem}", stem, kind)

    def value(self, attribute: Attribute) -> str:
        """Return a value for an attribute."""
        if isinstance(attribute.value, tuple):
            return self._rng.choice(attribute.value)
        if attribute.value == domains.LINK:
            return self.linked().name
        if attribute.value == domains.CODE:
            return f"{self._rng.randrange(10**6):06d}"
        if attribute.value == domains.YEAR:
            return str(self._rng.randrange(1600, 2030))
        if attribute.value == domains.NAME:
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
        """Draw questions whose evidence is there.

        Args:
            rng: Source of randomness.
            num_questions: How many to draw; fewer come back when the document holds fewer.
            mix: Weight of each kind of question; a kind of weight 0 or left out is not asked.
            present: Indices of the sentences that the reader sees; None for all.
        """
        where = {
            s.fact: i for i, s in enumerate(self.sentences) if s.fact and (present is None or i in present)
        }
        pools = {kind: self._candidates(kind, where) for kind, weight in mix.items() if weight > 0}
        for pool in pools.values():
            rng.shuffle(pool)
        drawn: list[Question] = []
        while len(drawn) < num_questions and any(pools.values()):
            kinds = [kind for kind, pool in pools.items() if pool]
            kind = rng.choices(kinds, [mix[k] for k in kinds])[0]
            entity, attribute = pools[kind].pop()
            drawn.append(_phrase(rng, self.domain, kind, entity, attribute, where))
        return drawn

    def _candidates(self, kind: str, where: Mapping[tuple[Entity, str], int]) -> list[tuple[Entity, str]]:
        """List (entity, attribute) pairs one can ask about; the attribute "" asks for all of them."""
        found: list[tuple[Entity, str]] = []
        for entity in self.entities:
            known = [a for a in entity.attributes if (entity, a) in where]
            whole = len(known) >= 2 and len(known) == len(entity.attributes)
            if kind == "single":
                found += [(entity, a) for a in known]
            elif kind == "describe" and whole:
                found.append((entity, ""))
            elif kind == "two_hop" and entity.linked and (entity, self.domain.link) in where:
                found += [(entity, a) for a in entity.linked.attributes if (entity.linked, a) in where]
            elif kind == "inflected" and entity.kind.nouns and language.adjective(entity.stem):
                found += [(entity, a) for a in known] + [(entity, "")] * (2 * whole)
        return found


def _phrase(
    rng: random.Random,
    domain: Domain,
    kind: str,
    entity: Entity,
    attribute: str,
    where: Mapping[tuple[Entity, str], int],
) -> Question:
    name = entity.name
    if kind == "inflected":
        name = name.replace(entity.stem, language.adjective(entity.stem) or entity.stem)
    if kind == "two_hop" and entity.linked:
        asked = rng.choice(domain.linked_questions(attribute))
        answer = f"{entity.statement(domain.link)} {entity.linked.statement(attribute)}"
        facts = [(entity, domain.link), (entity.linked, attribute)]
    elif attribute:
        asked = rng.choice(entity.kind.attributes[attribute].questions)
        answer = entity.statement(attribute)
        facts = [(entity, attribute)]
    else:
        asked = rng.choice(entity.kind.descriptions)
        attributes = [a for a in entity.kind.attributes if a in entity.attributes]
        answer = " ".join(entity.statement(a) for a in attributes)
        facts = [(entity, a) for a in attributes]
    return Question(kind, asked.replace("{E}", name), answer, tuple(where[fact] for fact in facts))


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
        num_tokens: Length of the document, title and headings included.
        count_tokens: Length of a sentence in tokens.
        domain: What the document is about.
        filler_share: Share of the units (a paragraph's parts) that state no fact.
        near_duplicates: Use few syllables and first names, so that names resemble one another.
        title: Title to start with, as a heading.
        heading_every: About how many tokens a section has; 0 for no headings.
    """
    namer = Namer(rng, domain, num_tokens, near_duplicates=near_duplicates)
    headings = [Sentence(f"# {title}", is_heading=True)] if title else []
    if heading_every:
        headings += [
            Sentence(domain.heading(rng), is_heading=True) for _ in range(num_tokens // heading_every)
        ]
    left = num_tokens - sum(count_tokens(h.text) for h in headings)
    blocks: list[list[Sentence]] = []
    entities: list[Entity] = []
    waiting: list[Entity] = []  # linked entities about which nothing is told yet
    while True:
        draw = rng.random()
        if draw < filler_share:
            block = [Sentence(domain.filler(rng))]
        elif waiting and rng.random() < 0.35:
            block = _state(rng, namer, waiting.pop(rng.randrange(len(waiting))), (1, 2, 2, 3))
        else:
            block = _state(rng, namer, namer.subject(), (1, 2, 3, 3, 4))
        length = sum(count_tokens(s.text) for s in block)
        if length > left:
            break
        left -= length
        blocks.append(block)
        if block[0].fact:
            entity = block[0].fact[0]
            entities.append(entity)
            if entity.linked:
                waiting.append(entity.linked)
    for _ in range(40):  # fill the rest up
        text = domain.filler(rng)
        if (length := count_tokens(text)) <= left:
            blocks.append([Sentence(text)])
            left -= length
    units: list[list[Sentence]] = []
    for block in blocks:
        scatter = len(block) > 1 and rng.random() < 0.15
        units += [[s] for s in block] if scatter else [block]
    rng.shuffle(units)
    return Composition(domain, _with_headings(units, headings, bool(title)), entities)


def _with_headings(units: list[list[Sentence]], headings: list[Sentence], has_title: bool) -> list[Sentence]:
    """Spread the headings evenly, the title first."""
    at: dict[int, list[Sentence]] = {}
    sections = headings[1:] if has_title else headings
    if has_title:
        at[0] = [headings[0]]
    for i, section in enumerate(sections):
        at.setdefault(i * len(units) // max(1, len(sections)), []).append(section)
    out: list[Sentence] = []
    for i, unit in enumerate(units):
        out += at.get(i, []) + unit
    return out


def _state(rng: random.Random, namer: Namer, entity: Entity, counts: tuple[int, ...]) -> list[Sentence]:
    """Give an entity some of its kind's attributes, as many as one of ``counts``, and state them."""
    kinds = entity.kind.attributes
    chosen = rng.sample(list(kinds), rng.choice(counts))
    for attribute in sorted(chosen, key=list(kinds).index):
        if kinds[attribute].value == domains.LINK:
            entity.linked = namer.linked()
            entity.attributes[attribute] = entity.linked.name
        else:
            entity.attributes[attribute] = namer.value(kinds[attribute])
    attributes = list(entity.attributes)
    if rng.random() < 0.3:
        rng.shuffle(attributes)
    return [Sentence(entity.statement(a, rng.randrange(3)), (entity, a)) for a in attributes]
