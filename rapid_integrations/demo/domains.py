"""The four domains: handbook, legal, medical and financial documents.

Most of the training uses the handbook, where facilities have managers. Legal agreements refer to annexes,
medical cases have doctors, and companies have auditors.

A statement keeps the attribute's word and the entity within about four tokens of the value. Otherwise models
of this size find the right entity and the wrong attribute.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from rapid_integrations.demo import language
from rapid_integrations.demo.domain import CODE, LINK, NAME, NUMBER, YEAR, Attribute, Domain, EntityKind
from rapid_integrations.demo.language import split_words


def _attributes(**attributes: Attribute) -> Mapping[str, Attribute]:
    return MappingProxyType(attributes)


HANDBOOK = Domain(
    name="handbook",
    subject=EntityKind(
        split_words(
            "depot library harbour mill clinic museum station chapel archive bakery garage vineyard quarry "
            "theatre lighthouse foundry"
        ),
        _attributes(
            passcode=Attribute(
                CODE,
                ("The {E} passcode is {V}.", "The {E} passcode reads {V}.", "Enter the {E} passcode {V}."),
                ("What is the passcode of the {E}?", "Which passcode opens the {E}?"),
            ),
            year=Attribute(
                YEAR,
                ("The {E} opened in {V}.", "The {E} began in {V}.", "Records say the {E} opened in {V}."),
                ("In which year was the {E} opened?", "When was the {E} opened?"),
            ),
            manager=Attribute(
                LINK,
                ("The {E} manager is {V}.", "The {E} is managed by {V}.", "The {E} is run by {V}."),
                ("Who is the manager of the {E}?", "Who manages the {E}?"),
            ),
            street=Attribute(
                NAME,
                (
                    "The {E} stands on {V} Street.",
                    "The {E} is on {V} Street.",
                    "Visitors find the {E} on {V} Street.",
                ),
                ("On which street does the {E} stand?", "Where is the {E}?"),
            ),
            fee=Attribute(
                NUMBER,
                (
                    "The {E} fee is {V} crowns.",
                    "The {E} costs {V} crowns.",
                    "The {E} fee reached {V} crowns.",
                ),
                ("What is the fee of the {E}?", "How many crowns does the {E} cost?"),
            ),
        ),
    ),
    linked=EntityKind(
        (),
        _attributes(
            town=Attribute(
                NAME,
                ("{E} lives in {V}.", "{E} stays in {V}.", "{E} has a home in {V}."),
                ("In which town does {E} live?", "Where does {E} live?"),
            ),
            badge=Attribute(
                NUMBER,
                ("{E} wears badge {V}.", "{E} has badge {V}.", "{E} was given badge {V}."),
                ("What is the badge number of {E}?", "Which badge does {E} wear?"),
            ),
            hobby=Attribute(
                split_words(
                    "chess rowing pottery fencing gardening sailing painting knitting astronomy archery "
                    "baking cycling juggling origami skating poetry"
                ),
                ("{E} enjoys {V}.", "{E} loves {V}.", "After work, {E} enjoys {V}."),
                ("What is the hobby of {E}?", "What does {E} enjoy?"),
            ),
        ),
    ),
    link="manager",
    books=split_words("Handbook Register Chronicle Notes Survey Account Guide Records"),
    sections=split_words("Chapter Part"),
)

LEGAL = Domain(
    name="legal",
    subject=EntityKind(
        split_words(
            "lease licence loan pledge covenant warranty easement charter tenancy franchise mortgage "
            "guarantee partnership merger settlement concession"
        ),
        _attributes(
            reference=Attribute(
                CODE,
                ("The {E} reference is {V}.", "The {E} reference reads {V}.", "File the {E} reference {V}."),
                ("What is the reference of the {E}?", "Which reference has the {E}?"),
            ),
            year=Attribute(
                YEAR,
                (
                    "The {E} was signed in {V}.",
                    "The {E} binds since {V}.",
                    "Deeds say the {E} was signed in {V}.",
                ),
                ("In which year was the {E} signed?", "When was the {E} signed?"),
            ),
            annex=Attribute(
                LINK,
                (
                    "The {E} annex is the {V}.",
                    "The {E} refers to the {V}.",
                    "The {E} is subject to the {V}.",
                ),
                ("What is the annex of the {E}?", "Which annex does the {E} refer to?"),
            ),
            law=Attribute(
                NAME,
                ("The {E} is under {V} Law.", "The {E} follows {V} Law.", "Courts judge the {E} by {V} Law."),
                ("What is the law of the {E}?", "Which law does the {E} follow?"),
            ),
            penalty=Attribute(
                NUMBER,
                (
                    "The {E} penalty is {V} crowns.",
                    "The {E} carries {V} crowns.",
                    "The {E} penalty reached {V} crowns.",
                ),
                ("What is the penalty of the {E}?", "How many crowns does the {E} carry?"),
            ),
        ),
    ),
    linked=EntityKind(
        split_words("schedule exhibit appendix addendum rider protocol"),
        _attributes(
            territory=Attribute(
                NAME,
                ("The {E} applies in {V}.", "The {E} holds in {V}.", "The {E} has its territory in {V}."),
                ("In which territory does the {E} apply?", "Where does the {E} apply?"),
            ),
            section=Attribute(
                NUMBER,
                ("The {E} has section {V}.", "The {E} adds section {V}.", "The {E} was given section {V}."),
                ("What is the section number of the {E}?", "Which section does the {E} have?"),
            ),
            goods=Attribute(
                split_words(
                    "cargo timber grain patents cattle software furniture machinery textiles coal steel wine "
                    "paper jewellery tools fuel"
                ),
                ("The {E} covers {V}.", "The {E} defines {V}.", "By its terms, the {E} covers {V}."),
                ("What are the goods of the {E}?", "What does the {E} cover?"),
            ),
        ),
    ),
    link="annex",
    books=split_words("Agreement Contract Deed Code Treaty"),
    sections=split_words("Article Clause"),
    nouns=(
        *language.NOUNS[:40],
        *split_words("party tenant owner judge witness notice payment deadline duty court"),
    ),
    fillers=(
        *language.FILLER_FORMS[:6],
        "Each {N} shall keep the {A} {N} {P} the {N}.",
        "The {N} of the {N} is void when the {N} is {A}.",
        "No {N} may pass the {A} {N} to a {N}.",
        "A {N} shall {D} follow the {A} {N}.",
    ),
)

MEDICAL = Domain(
    name="medical",
    subject=EntityKind(
        split_words(
            "fracture asthma migraine ulcer anaemia eczema pneumonia arthritis bronchitis hernia tonsillitis "
            "sciatica diabetes burn sprain cataract"
        ),
        _attributes(
            chart=Attribute(
                CODE,
                ("The {E} chart is {V}.", "The {E} chart reads {V}.", "See the {E} chart {V}."),
                ("What is the chart of the {E}?", "Which chart belongs to the {E}?"),
            ),
            year=Attribute(
                YEAR,
                (
                    "The {E} was admitted in {V}.",
                    "The {E} appeared in {V}.",
                    "Charts say the {E} appeared in {V}.",
                ),
                ("In which year was the {E} admitted?", "When was the {E} admitted?"),
            ),
            doctor=Attribute(
                LINK,
                ("The {E} doctor is {V}.", "The {E} is treated by {V}.", "The {E} is seen by {V}."),
                ("Who is the doctor of the {E}?", "Who treats the {E}?"),
            ),
            ward=Attribute(
                NAME,
                ("The {E} lies on ward {V}.", "The {E} is on ward {V}.", "Nurses find the {E} on ward {V}."),
                ("On which ward does the {E} lie?", "Where is the {E}?"),
            ),
            dose=Attribute(
                NUMBER,
                ("The {E} dose is {V} units.", "The {E} needs {V} units.", "The {E} dose reached {V} units."),
                ("What is the dose of the {E}?", "How many units does the {E} need?"),
            ),
        ),
    ),
    linked=EntityKind(
        (),
        _attributes(
            practice=Attribute(
                NAME,
                ("{E} practises in {V}.", "{E} heals in {V}.", "{E} has a practice in {V}."),
                ("In which town does {E} practise?", "Where does {E} practise?"),
            ),
            pager=Attribute(
                NUMBER,
                ("{E} carries pager {V}.", "{E} has pager {V}.", "{E} was given pager {V}."),
                ("What is the pager number of {E}?", "Which pager does {E} carry?"),
            ),
            specialty=Attribute(
                split_words(
                    "surgery radiology cardiology neurology dermatology geriatrics pathology urology "
                    "oncology pediatrics psychiatry hematology immunology orthopedics nutrition anesthesia"
                ),
                ("{E} studied {V}.", "{E} teaches {V}.", "For years, {E} studied {V}."),
                ("What is the specialty of {E}?", "What did {E} study?"),
            ),
        ),
    ),
    link="doctor",
    books=split_words("Casebook Journal Files Charts Findings"),
    sections=split_words("Visit Round"),
    nouns=(
        *language.NOUNS[:40],
        *split_words("nurse bed fever bandage patient pulse remedy diet cough surgeon"),
    ),
    fillers=(
        *language.FILLER_FORMS[:6],
        "The {N} showed a {A} {N} and a {A} {N}.",
        "A {A} {N} was noted {P} the {N}.",
        "The {N} rested {D} while the {N} was {A}.",
        "After the {N}, the {A} {N} was {D} {A}.",
    ),
)

FINANCIAL = Domain(
    name="financial",
    subject=EntityKind(
        split_words(
            "holding fund trust insurer brewery shipyard refinery airline broker lender publisher retailer "
            "carmaker grocer hotelier telecom"
        ),
        _attributes(
            account=Attribute(
                CODE,
                ("The {E} account is {V}.", "The {E} account reads {V}.", "Credit the {E} account {V}."),
                ("What is the account of the {E}?", "Which account belongs to the {E}?"),
            ),
            year=Attribute(
                YEAR,
                (
                    "The {E} was founded in {V}.",
                    "The {E} started in {V}.",
                    "Filings say the {E} started in {V}.",
                ),
                ("In which year was the {E} founded?", "When was the {E} founded?"),
            ),
            auditor=Attribute(
                LINK,
                ("The {E} auditor is {V}.", "The {E} is audited by {V}.", "The {E} is checked by {V}."),
                ("Who is the auditor of the {E}?", "Who audits the {E}?"),
            ),
            exchange=Attribute(
                NAME,
                (
                    "The {E} trades on {V} Exchange.",
                    "The {E} is on {V} Exchange.",
                    "Brokers find the {E} on {V} Exchange.",
                ),
                ("On which exchange does the {E} trade?", "Where does the {E} trade?"),
            ),
            dividend=Attribute(
                NUMBER,
                (
                    "The {E} dividend is {V} crowns.",
                    "The {E} pays {V} crowns.",
                    "The {E} dividend reached {V} crowns.",
                ),
                ("What is the dividend of the {E}?", "How many crowns does the {E} pay?"),
            ),
        ),
    ),
    linked=EntityKind(
        (),
        _attributes(
            office=Attribute(
                NAME,
                ("{E} works in {V}.", "{E} sits in {V}.", "{E} has an office in {V}."),
                ("In which town does {E} work?", "Where does {E} work?"),
            ),
            seal=Attribute(
                NUMBER,
                ("{E} holds seal {V}.", "{E} has seal {V}.", "{E} was given seal {V}."),
                ("What is the seal number of {E}?", "Which seal does {E} hold?"),
            ),
            sector=Attribute(
                split_words(
                    "energy banking mining farming shipping housing retail media logistics tourism chemicals "
                    "aviation railways forestry fishing biotech"
                ),
                ("{E} knows {V}.", "{E} rates {V}.", "At work, {E} rates {V}."),
                ("What is the sector of {E}?", "What does {E} know?"),
            ),
        ),
    ),
    link="auditor",
    books=split_words("Report Filing Statement Prospectus Budget"),
    sections=split_words("Item Note"),
    nouns=(*language.NOUNS[:40], *split_words("market profit loss debt share board bond price asset buyer")),
    fillers=(
        *language.FILLER_FORMS[:6],
        "The {N} rose {D} while the {N} was {A}.",
        "A {A} {N} fell {P} the {N}.",
        "The {N} of the {N} lost a {A} {N}.",
        "Since the {N}, the {A} {N} was {D} {A}.",
    ),
)

DOMAINS: Mapping[str, Domain] = MappingProxyType({d.name: d for d in (HANDBOOK, LEGAL, MEDICAL, FINANCIAL)})
"""The domains by name, the handbook first."""
