"""The form of a domain: its entities, their attributes, and how documents state and ask about facts.

A domain is a dialect of the demo language. It has subjects ("the Trottivik depot"), and linked entities that
subjects
name: a person ("Mara Banlos") or an object of another kind ("the Banlos rider"). Both have attributes.
:mod:`rapid_integrations.demo.domains` defines the four domains.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rapid_integrations.demo import language
from rapid_integrations.demo.language import words_of

NAME, YEAR, CODE, NUMBER, LINK = "name", "year", "code", "number", "link"
"""Kinds of values: an invented name, a year, six digits, four digits, or the name of a linked entity."""


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute of an entity.

    Attributes:
        value: One of the constants above, or the words to choose a value from.
        forms: Sentence forms that state it for an entity ``{E}`` and a value ``{V}``. Answers use the first.
        questions: Question forms about it.
    """

    value: str | tuple[str, ...]
    forms: tuple[str, str, str]
    questions: tuple[str, str]


@dataclass(frozen=True, slots=True)
class EntityKind:
    """A kind of entity.

    Attributes:
        nouns: The nouns that follow invented names. It is empty for persons, who have a first name instead.
        attributes: The attributes by name, in the order in which descriptions state them.
    """

    nouns: tuple[str, ...]
    attributes: Mapping[str, Attribute]

    @property
    def mention(self) -> str:
        """The form in which a sentence mentions an entity ``{E}``."""
        return "the {E}" if self.nouns else "{E}"

    @property
    def descriptions(self) -> tuple[str, str, str]:
        """Question forms about all attributes of an entity."""
        mention = self.mention
        return (
            f"Describe {mention}.",
            f"What do the records say about {mention}?",
            f"Tell me about {mention}.",
        )


@dataclass(frozen=True, slots=True)
class Domain:
    """A dialect of the demo language.

    Attributes:
        name: Its name, a key of ``DOMAINS``.
        subject: The kind of entity that documents are about. It has nouns.
        linked: The kind of entity that subjects name.
        link: The subjects' attribute whose value is a linked entity.
        books: Words for a document, used in titles.
        sections: Words for a part of a document, used in headings.
        nouns: Nouns of prose that states no fact.
        fillers: Sentence forms of such prose.
    """

    name: str
    subject: EntityKind
    linked: EntityKind
    link: str
    books: tuple[str, ...]
    sections: tuple[str, ...]
    nouns: tuple[str, ...] = language.NOUNS
    fillers: tuple[str, ...] = language.FILLER_FORMS

    def linked_questions(self, attribute: str) -> list[str]:
        """Question forms about an attribute of the linked entity of a subject ``{E}``."""
        mention = f"the {self.link} of the {{E}}"
        return [q.replace(self.linked.mention, mention) for q in self.linked.attributes[attribute].questions]

    def filler(self, rng: random.Random) -> str:
        """A sentence of prose that states no fact."""
        return self._fill(rng, self.fillers)

    def heading(self, rng: random.Random) -> str:
        """A section heading in Markdown."""
        return "## " + self._fill(rng, language.HEADING_FORMS)

    def title(self, rng: random.Random) -> str:
        """A document title, without the Markdown sign."""
        return self._fill(rng, language.TITLE_FORMS)

    def _fill(self, rng: random.Random, forms: Sequence[str]) -> str:
        words = {"N": self.nouns, "B": self.books, "C": self.sections}
        return language.fill(rng, rng.choice(forms), words)

    def words(self) -> set[str]:
        """All words specific to the domain's sentences, without names."""
        kinds = (self.subject, self.linked)
        attributes = [attribute for kind in kinds for attribute in kind.attributes.values()]
        forms = [*self.fillers, *(form for a in attributes for form in (*a.forms, *a.questions))]
        forms += [form for kind in kinds for form in kind.descriptions]
        words = {*self.books, *self.sections, *self.nouns, *self.subject.nouns, *self.linked.nouns}
        words |= {word for a in attributes if isinstance(a.value, tuple) for word in a.value}
        return words | words_of(forms)
