"""Filler sentences, and words that do not occur in them."""

from __future__ import annotations

import random

_PLACES = (
    "harbour", "meadow", "station", "orchard", "library", "market", "valley", "bridge", "garden",
    "museum", "island", "village", "castle", "forest", "theatre", "kitchen", "workshop", "quarry",
    "lighthouse", "monastery",
)  # fmt: skip
_PEOPLE = (
    "baker", "teacher", "sailor", "painter", "farmer", "doctor", "miller", "lawyer", "singer",
    "gardener", "captain", "weaver", "printer", "tailor", "shepherd", "engineer", "student", "merchant",
    "carpenter", "librarian",
)  # fmt: skip
_THINGS = (
    "lantern", "ladder", "basket", "mirror", "kettle", "blanket", "hammer", "barrel", "candle",
    "compass", "drawer", "feather", "pillow", "ribbon", "saddle", "trumpet", "violin", "wagon",
    "whistle", "window", "anchor", "bottle", "button", "carpet", "engine", "helmet", "jacket", "pencil",
    "pocket", "rudder", "shovel", "statue",
)  # fmt: skip
_QUALITIES = (
    "amber", "broken", "calm", "dusty", "early", "faded", "gentle", "heavy", "idle", "jolly", "keen",
    "lively", "mellow", "narrow", "old", "pale", "quiet", "rusty", "silent", "tidy", "uneven", "vivid",
    "warm", "yellow", "ancient", "bright", "clever", "dark", "empty", "frozen", "golden", "hollow",
)  # fmt: skip
_VERBS = (
    "carried", "repaired", "painted", "borrowed", "forgot", "measured", "cleaned", "sold", "found",
    "described", "noticed", "mended", "lifted", "packed", "counted", "moved",
)  # fmt: skip
_TIMES = (
    "in the morning", "after the rain", "before supper", "on a windy day", "late in the autumn",
    "during the fair", "at first light", "when the bells rang", "towards the evening",
    "without any hurry",
)  # fmt: skip
_SHAPES = (
    "The {quality} {person} {verb} the {thing} near the {place} {time}.",
    "Nobody in the {place} remembered who {verb} the {quality} {thing} {time}.",
    "{Time}, the {person} from the {place} {verb} the {quality} {thing}.",
    "It was said that the {thing} of the {person} looked {quality} beside the {place}.",
    "Behind the {place} stood the {quality} {thing} that the {person} {verb} {time}.",
    "The {person} and the {other} spoke about the {quality} {thing}, and then they left the {place}.",
)


def filler_sentences(rng: random.Random, count: int) -> list[str]:
    """Generate unrelated English sentences.

    Args:
        rng: The random generator; equal states give equal sentences.
        count: Number of sentences.
    """
    sentences = []
    for _ in range(count):
        time = rng.choice(_TIMES)
        person, other = rng.sample(_PEOPLE, 2)
        sentences.append(
            rng.choice(_SHAPES).format(
                quality=rng.choice(_QUALITIES),
                person=person,
                other=other,
                verb=rng.choice(_VERBS),
                thing=rng.choice(_THINGS),
                place=rng.choice(_PLACES),
                time=time,
                Time=time[0].upper() + time[1:],
            )
        )
    return sentences


def compound_words(joint: str) -> list[str]:
    """All compounds of a word and a noun from the filler's vocabulary, such as ``amber-harbour``.

    None of them occurs in :func:`filler_sentences`.

    Args:
        joint: The text between the two words.
    """
    nouns = (*_PLACES, *_PEOPLE, *_THINGS)
    return [
        f"{first}{joint}{last}" for first in (*_QUALITIES, *_VERBS, *nouns) for last in nouns if first != last
    ]
