"""Passages that say otherwise than a document: what a retriever finds in a poisoned or outdated corpus."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rapid_integrations.demo import language
from rapid_integrations.demo.world import Entity, Namer, Sentence, stated


def contradict(rng: random.Random, sentences: Sequence[Sentence]) -> str:
    """The sentences with every value exchanged for another of the same attribute.

    Where a manager is exchanged, what follows about the manager is said about the new one.

    Args:
        rng: Source of randomness.
        sentences: Sentences that state facts, as the document has them.
    """
    namer = Namer(rng, 0, near_duplicates=False)
    renamed: dict[Entity, str] = {}
    passage = []
    for sentence in sentences:
        assert sentence.fact is not None
        entity, attribute = sentence.fact
        value = other = entity.attributes[attribute]
        while other == value:
            other = namer.person().name if attribute == "manager" else namer.value(attribute)
        if attribute == "manager" and entity.manager is not None:
            renamed[entity.manager] = other
        forms = language.FORMS[attribute]
        form = next(form for form in forms if stated(form, entity.name, value) == sentence.text)
        passage.append(stated(form, renamed.get(entity, entity.name), other))
    return " ".join(passage)
