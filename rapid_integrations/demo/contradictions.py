"""Passages that contradict a document, as a retriever finds them in a poisoned or outdated corpus."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rapid_integrations.demo.domain import LINK, Domain
from rapid_integrations.demo.world import Entity, Namer, Sentence, stated


def contradict(rng: random.Random, domain: Domain, sentences: Sequence[Sentence]) -> str:
    """Replace each value of these sentences by another value of the same attribute.

    If a linked entity is replaced, later sentences about it name the new entity.

    Args:
        rng: Source of randomness.
        domain: The document's domain.
        sentences: Sentences of the document that state facts.
    """
    namer = Namer(rng, domain)
    renamed: dict[Entity, str] = {}
    passage = []
    for sentence in sentences:
        assert sentence.fact is not None
        entity, attribute = sentence.fact
        kind = entity.kind.attributes[attribute]
        value = new_value = entity.attributes[attribute]
        while new_value == value:
            new_value = namer.value(kind)
        if kind.value == LINK and entity.linked is not None:
            renamed[entity.linked] = new_value
        form = next(form for form in kind.forms if stated(form, entity.name, value) == sentence.text)
        passage.append(stated(form, renamed.get(entity, entity.name), new_value))
    return " ".join(passage)
