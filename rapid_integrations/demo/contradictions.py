"""Passages that say otherwise than a document: what a retriever finds in a poisoned or outdated corpus."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rapid_integrations.demo.domains import LINK, Domain
from rapid_integrations.demo.world import Entity, Namer, Sentence, stated


def contradict(rng: random.Random, domain: Domain, sentences: Sequence[Sentence]) -> str:
    """The sentences with every value exchanged for another of the same attribute.

    Where a linked entity is exchanged, what follows about it is said about the new one.

    Args:
        rng: Source of randomness.
        domain: The document's.
        sentences: Sentences that state facts, as the document has them.
    """
    namer = Namer(rng, domain)
    renamed: dict[Entity, str] = {}
    passage = []
    for sentence in sentences:
        assert sentence.fact is not None
        entity, attribute = sentence.fact
        kind = entity.kind.attributes[attribute]
        value = other = entity.attributes[attribute]
        while other == value:
            other = namer.value(kind)
        if kind.value == LINK and entity.linked is not None:
            renamed[entity.linked] = other
        form = next(form for form in kind.forms if stated(form, entity.name, value) == sentence.text)
        passage.append(stated(form, renamed.get(entity, entity.name), other))
    return " ".join(passage)
