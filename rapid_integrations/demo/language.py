"""The demo language: its words, names, sentence forms and questions.

A tiny English in which facilities ("the Trottivik depot") have a passcode, an opening year, a manager, a
street and a fee, and managers have a town, a badge and a hobby. A statement keeps the attribute word and the
entity within about four tokens of the value, because models of this size otherwise find the right entity and
the wrong attribute.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence


def _split(words: str) -> list[str]:
    return words.split()


FACILITIES = _split(
    "depot library harbour mill clinic museum station chapel archive bakery garage vineyard quarry theatre "
    "lighthouse foundry"
)
FIRST_NAMES = _split(
    "Mara Anton Lena Pavel Ines Oskar Tilda Bruno Clara Viktor Nadia Emil Greta Hugo Irena Jonas Katja Leo "
    "Miriam Nils Olga Petra Rasmus Selma Tomas Ursula Vera Walter Yara Zeno Aldo Bianca Cyril Dora Edgar "
    "Flora Gustav Helga Ivan Judit Karl Lotta Marek Nora Otto Paula Quirin Rosa Stefan Thea Ulrich Wanda "
    "Xaver Yvonne Zora Arno Berta Carlo Dina Erik"
)
HOBBIES = _split(
    "chess rowing pottery fencing gardening sailing painting knitting astronomy archery baking cycling "
    "juggling origami skating poetry"
)
NOUNS = _split(
    "river garden window letter winter market bridge forest road evening village clock teacher harvest "
    "mountain kitchen ladder basket lantern valley meadow orchard barrel blanket candle carpet cloud corner "
    "curtain engine fence field flag floor gate guest hall hill horse island lake map mirror morning "
    "neighbour night painter path pond porch rain roof room sailor school shadow ship song stone storm "
    "street table tower train tree wagon wall wind wood"
)
ADJECTIVES = _split(
    "old quiet narrow bright cold distant empty gentle golden green grey heavy hidden hollow large late "
    "little long lonely loud mild modest pale plain proud rare rough silent silver slow small soft steep "
    "strange tall thin tidy warm wet white wide wild young"
)
VERBS = _split(
    "crossed followed covered reached touched watched carried passed filled faced joined kept left lit met "
    "moved opened painted pulled pushed raised shook turned visited warmed"
)
PREPOSITIONS = _split("beside behind near under above across along around beyond past")
ADVERBS = _split("slowly often rarely quietly suddenly again never always soon gently")
BOOKS = _split("Handbook Register Chronicle Notes Survey Account Guide Records")

FACILITY_FORMS: Mapping[str, Sequence[str]] = {
    "passcode": ("The {E} passcode is {V}.", "The {E} passcode reads {V}.", "Enter the {E} passcode {V}."),
    "year": ("The {E} opened in {V}.", "The {E} began in {V}.", "Records say the {E} opened in {V}."),
    "manager": ("The {E} manager is {V}.", "The {E} is managed by {V}.", "The {E} is run by {V}."),
    "street": (
        "The {E} stands on {V} Street.",
        "The {E} is on {V} Street.",
        "Visitors find the {E} on {V} Street.",
    ),
    "fee": ("The {E} fee is {V} crowns.", "The {E} costs {V} crowns.", "The {E} fee reached {V} crowns."),
}
"""Sentence forms of an attribute; answers use the first."""
PERSON_FORMS: Mapping[str, Sequence[str]] = {
    "town": ("{E} lives in {V}.", "{E} stays in {V}.", "{E} has a home in {V}."),
    "badge": ("{E} wears badge {V}.", "{E} has badge {V}.", "{E} was given badge {V}."),
    "hobby": ("{E} enjoys {V}.", "{E} loves {V}.", "After work, {E} enjoys {V}."),
}
FORMS: Mapping[str, Sequence[str]] = {**FACILITY_FORMS, **PERSON_FORMS}

QUESTIONS: Mapping[str, Sequence[str]] = {
    "passcode": ("What is the passcode of the {E}?", "Which passcode opens the {E}?"),
    "year": ("In which year was the {E} opened?", "When was the {E} opened?"),
    "manager": ("Who is the manager of the {E}?", "Who manages the {E}?"),
    "street": ("On which street does the {E} stand?", "Where is the {E}?"),
    "fee": ("What is the fee of the {E}?", "How many crowns does the {E} cost?"),
    "town": ("In which town does {E} live?", "Where does {E} live?"),
    "badge": ("What is the badge number of {E}?", "Which badge does {E} wear?"),
    "hobby": ("What is the hobby of {E}?", "What does {E} enjoy?"),
}
DESCRIBE_FACILITY = ("Describe the {E}.", "What do the records say about the {E}?", "Tell me about the {E}.")
DESCRIBE_PERSON = ("Describe {E}.", "What do the records say about {E}?", "Tell me about {E}.")
TWO_HOP_QUESTIONS: Mapping[str, Sequence[str]] = {
    "town": ("In which town does the manager of the {E} live?", "Where does the manager of the {E} live?"),
    "badge": (
        "What is the badge number of the manager of the {E}?",
        "Which badge does the manager of the {E} wear?",
    ),
    "hobby": ("What is the hobby of the manager of the {E}?", "What does the manager of the {E} enjoy?"),
}
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

PLAIN_WORDS = _split(
    "a an the A An The In and was were of it One but When There No after on Chapter Part "
    "Context Question Answer Query user assistant system document Document Summary context question answer"
)

UNSPACED_WORDS = _split(
    "What Which When Who On How Describe Tell In Where name arguments query input question text type "
    "function description parameters properties required object string title Query Input Question search "
    "look up find retrieve lookup document handbook register chronicle passages tool engine "
    "Search Searches Finds"
)
"""First words of questions, and words of tools: in JSON no space precedes them."""


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
"""Turns a name into its adjective: "the Trottivikan depot" is the Trottivik depot, if one reads subwords."""


def adjective(name: str) -> str | None:
    """Return the adjectival form of a name, or None for names that end in a vowel, which have none."""
    return None if name[-1] in "aeiou" else name + ADJECTIVE_ENDING


def _fill(rng: random.Random, form: str) -> str:
    words = {"A": ADJECTIVES, "N": NOUNS, "V": VERBS, "P": PREPOSITIONS, "D": ADVERBS, "B": BOOKS}
    out = []
    for part in form.replace("{", "\0{").replace("}", "}\0").split("\0"):
        if part == "{C}":
            out.append(f"{rng.choice(('Chapter', 'Part'))} {rng.randrange(1, 100)}")
        else:
            out.append(rng.choice(words[part[1]]) if part[:1] == "{" else part)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", "".join(out))
    return text[0].upper() + text[1:]


def filler(rng: random.Random) -> str:
    """Return a sentence of prose that states no fact."""
    return _fill(rng, rng.choice(FILLER_FORMS))


def heading(rng: random.Random) -> str:
    """Return a section heading in Markdown."""
    return "## " + _fill(rng, rng.choice(HEADING_FORMS))


def title(rng: random.Random) -> str:
    """Return a document title, without the Markdown sign."""
    return _fill(rng, rng.choice(TITLE_FORMS))


def vocabulary() -> list[str]:
    """Return every word the language's sentences can hold, in a fixed order."""
    words = {
        *FACILITIES,
        *FIRST_NAMES,
        *HOBBIES,
        *NOUNS,
        *ADJECTIVES,
        *VERBS,
        *PREPOSITIONS,
        *ADVERBS,
        *BOOKS,
    }
    words |= {word.capitalize() for word in PREPOSITIONS}
    words |= set(PLAIN_WORDS)
    groups = [*FORMS.values(), *QUESTIONS.values(), *TWO_HOP_QUESTIONS.values()]
    groups += [DESCRIBE_FACILITY, DESCRIBE_PERSON, FILLER_FORMS, HEADING_FORMS, TITLE_FORMS]
    for form in (form for group in groups for form in group):
        for word in form.replace("{", " {").replace("}", "} ").split():
            if not word.startswith("{"):
                words.add(word.strip(".,?:"))
    return sorted(word for word in words if word.isalpha())
