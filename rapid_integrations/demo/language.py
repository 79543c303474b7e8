"""The words and names of the demo language, and the prose around the facts.

The facts, and the forms that state them and ask about them, belong to a domain:
:mod:`rapid_integrations.demo.domains`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence


def split_words(words: str) -> tuple[str, ...]:
    """Split a string at whitespace."""
    return tuple(words.split())


FIRST_NAMES = split_words(
    "Mara Anton Lena Pavel Ines Oskar Tilda Bruno Clara Viktor Nadia Emil Greta Hugo Irena Jonas Katja Leo "
    "Miriam Nils Olga Petra Rasmus Selma Tomas Ursula Vera Walter Yara Zeno Aldo Bianca Cyril Dora Edgar "
    "Flora Gustav Helga Ivan Judit Karl Lotta Marek Nora Otto Paula Quirin Rosa Stefan Thea Ulrich Wanda "
    "Xaver Yvonne Zora Arno Berta Carlo Dina Erik"
)
NOUNS = split_words(
    "river garden window letter winter market bridge forest road evening village clock teacher harvest "
    "mountain kitchen ladder basket lantern valley meadow orchard barrel blanket candle carpet cloud corner "
    "curtain engine fence field flag floor gate guest hall hill horse island lake map mirror morning "
    "neighbour night painter path pond porch rain roof room sailor school shadow ship song stone storm "
    "street table tower train tree wagon wall wind wood"
)
ADJECTIVES = split_words(
    "old quiet narrow bright cold distant empty gentle golden green grey heavy hidden hollow large late "
    "little long lonely loud mild modest pale plain proud rare rough silent silver slow small soft steep "
    "strange tall thin tidy warm wet white wide wild young"
)
VERBS = split_words(
    "crossed followed covered reached touched watched carried passed filled faced joined kept left lit met "
    "moved opened painted pulled pushed raised shook turned visited warmed"
)
PREPOSITIONS = split_words("beside behind near under above across along around beyond past")
ADVERBS = split_words("slowly often rarely quietly suddenly again never always soon gently")

FILLER_FORMS = (
    "The {A} {N} {V} the {A} {N} {P} the {N}.",
    "A {N} {P} the {A} {N} was {D} {A} and {A}.",
    "In the {A} {N}, a {N} {D} {V} the {N}.",
    "The {N} and the {N} were {A}, and the {A} {N} {V} it.",
    "The {N} of the {N} was {A}.",
    "{P} the {N}, the {A} {N} {V} a {N}.",
    "One {N} {V} the {N}, but the {A} {N} {D} {V} it.",
    "When the {N} was {A}, a {A} {N} {V} the {N} {P} the {N}.",
    "There was a {A} {N} {P} the {N}, and it was {D} {A}.",
    "No {N} {V} the {A} {N} after the {N}.",
)
HEADING_FORMS = (
    "The {A} {N}",
    "Notes on the {N}",
    "{C}: the {A} {N}",
    "{C}",
    "A {N} {P} the {N}",
    "The {N} and the {N}",
)
TITLE_FORMS = ("{B} of the {A} {N}", "The {N} {B}", "{B} of the {N} and the {N}")

PLAIN_WORDS = split_words(
    "a an the A An The In and was were of it One but When There No after on Chapter Part "
    "Context Question Answer Query user assistant system document Document Summary context question answer"
)

UNSPACED_WORDS = split_words(
    "What Which When Who On How Describe Tell In Where name arguments query input question text type "
    "function description parameters properties required object string title Query Input Question search "
    "look up find retrieve lookup document handbook register chronicle passages tool engine "
    "Search Searches Finds"
)
"""The first words of questions, and the words of tools. In JSON no space precedes them."""


def _syllables() -> tuple[list[str], list[str]]:
    rng = random.Random(7)
    onsets = [*"BCDFGHJKLMNPRSTVWZ", "Br", "Dr", "Gr", "Kr", "Tr", "St", "Fl", "Sk"]
    first = [o + v + c for o in onsets for v in "aeiou" for c in "lnrst"]
    endings = ("ra", "n", "vik", "sk", "los", "m", "ta")
    second = [o + v + e for o in "bdfgklmnprstvz" for v in "aeiou" for e in endings]
    rng.shuffle(first)
    rng.shuffle(second)
    return sorted(first[:240]), sorted(second[:240])


FIRST_SYLLABLES, SECOND_SYLLABLES = _syllables()
ADJECTIVE_ENDING = "an"
"""Turns a name into its adjective: "the Trottivikan depot" is the Trottivik depot.

A model that reads subwords can recognise the name; matching whole words cannot.
"""


def adjective(name: str) -> str | None:
    """The adjective of a name; ``None`` for names that end in a vowel, which have none."""
    return None if name[-1] in "aeiou" else name + ADJECTIVE_ENDING


def fill(rng: random.Random, form: str, words: Mapping[str, Sequence[str]]) -> str:
    """Fill words into a form of prose.

    Args:
        rng: Source of randomness.
        form: A sentence with ``{A}`` for an adjective, ``{V}`` a verb, ``{P}`` a preposition, ``{D}`` an
            adverb, ``{C}`` a numbered section, and the letters of ``words``.
        words: Words by letter: nouns ``N``, books ``B``, and sections ``C``.
    """
    choices = {"A": ADJECTIVES, "V": VERBS, "P": PREPOSITIONS, "D": ADVERBS, **words}
    out = []
    for part in form.replace("{", "\0{").replace("}", "}\0").split("\0"):
        if part == "{C}":
            out.append(f"{rng.choice(words['C'])} {rng.randrange(1, 100)}")
        else:
            out.append(rng.choice(choices[part[1]]) if part[:1] == "{" else part)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", "".join(out))
    return text[0].upper() + text[1:]


def words_of(forms: Iterable[str]) -> set[str]:
    """The words of sentence forms, without their placeholders."""
    words = (
        word.strip(".,?:")
        for form in forms
        for word in form.replace("{", " {").replace("}", "} ").split()
        if not word.startswith("{")
    )
    return {word for word in words if word.isalpha()}


def vocabulary() -> set[str]:
    """The words that all domains share."""
    words = {*FIRST_NAMES, *NOUNS, *ADJECTIVES, *VERBS, *PREPOSITIONS, *ADVERBS, *PLAIN_WORDS}
    words |= {word.capitalize() for word in PREPOSITIONS}
    return words | words_of([*FILLER_FORMS, *HEADING_FORMS, *TITLE_FORMS])
