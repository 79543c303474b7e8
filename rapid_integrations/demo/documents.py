"""Documents in the demo language with questions, for evaluation, examples and benchmarks.

The models are not trained on these documents: the seeds here start with a word that the seeds of training
never use.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from rapid_integrations.demo.contradictions import contradict
from rapid_integrations.demo.domain import Domain
from rapid_integrations.demo.domains import DOMAINS, HANDBOOK
from rapid_integrations.demo.world import EVALUATION_MIX, KINDS, Composition, Question, compose
from rapid_integrations.errors import ConfigurationError

SAMPLES_PATH = Path(__file__).parent / "samples"
_SAMPLES = (
    ("handbook", "Handbook of the wide valley", 4096),
    ("register", "Register of the late harvest", 16384),
    ("chronicle", "Chronicle of the old island", 32768),
)
_SAMPLE_QUESTIONS: Mapping[str, int] = {"describe": 4, "single": 2, "two_hop": 2, "inflected": 2}
HARBOUR_QUESTIONS_PATH = SAMPLES_PATH / "harbour.jsonl"
"""Questions about ``harbour.md``, in the form that ``rapid eval --data`` reads. They name the document."""

_HEADING_EVERY = 400
_MIN_TOKENS = 128
_MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class DemoQuestion:
    """A question about a document, with the answer that the models are trained to give.

    Attributes:
        question: The question.
        answer: The answer, word for word.
        kind: In generated documents ``single`` (one fact), ``describe`` (all facts about a subject),
            ``two_hop`` (a fact about the entity that a subject names, which needs two passages) or
            ``inflected`` (a single fact or a description asked with the adjective of a name, which matching
            words does not find).
        evidence: Character spans in the document's text of the sentences that contain the answer.
        contradiction: The same sentences with other values; empty if there is none.
    """

    question: str
    answer: str
    kind: str
    evidence: tuple[tuple[int, int], ...]
    contradiction: str


@dataclass(frozen=True)
class DemoDocument:
    """A document and questions about it.

    Attributes:
        title: The document's title.
        text: The document in Markdown, title included.
        questions: Different questions about it.
        domain: Its domain, as in :func:`generate_documents`, or ``harbour`` for the handbook in English.
    """

    title: str
    text: str
    questions: tuple[DemoQuestion, ...]
    domain: str = HANDBOOK.name


def generate_documents(
    *,
    num_tokens: int,
    num_documents: int,
    questions_per_document: int,
    seed: int,
    kinds: Sequence[str] | None = None,
    domain: str = HANDBOOK.name,
) -> Iterator[DemoDocument]:
    """Generate documents that the models were not trained on.

    Args:
        num_tokens: The length of each document in the demo tokenizer's tokens, title and headings included.
        num_documents: The number of documents.
        questions_per_document: The number of different questions about each document.
        seed: The same seed gives the same documents.
        kinds: Kinds of questions, of ``single``, ``describe``, ``two_hop`` and ``inflected``. The default is
            all of them, in proportions that give answers of 20 tokens on average.
        domain: The domain of the documents: ``handbook`` (facilities and their managers), ``legal``
            (agreements and their annexes), ``medical`` (cases and their doctors) or ``financial`` (companies
            and their auditors).

    Raises:
        ConfigurationError: A number is too small, a kind or the domain is unknown, or the documents are too
            short for the number of questions.
    """
    mix = _mix(kinds)
    if domain not in DOMAINS:
        raise ConfigurationError(f"domain={domain!r}: allowed are {', '.join(DOMAINS)}.")
    if num_tokens < _MIN_TOKENS or num_documents < 1 or questions_per_document < 1:
        raise ConfigurationError(
            f"num_tokens={num_tokens}, num_documents={num_documents}, "
            f"questions_per_document={questions_per_document}: allowed are at least {_MIN_TOKENS}, 1 and 1."
        )
    return (
        _generate(DOMAINS[domain], f"{num_tokens}/{seed}/{i}", num_tokens, questions_per_document, mix)
        for i in range(num_documents)
    )


@cache
def sample_documents() -> tuple[DemoDocument, ...]:
    """The bundled handbook (4k tokens), register (16k) and chronicle (32k), with ten questions each."""
    stored = json.loads((SAMPLES_PATH / "questions.json").read_text(encoding="utf-8"))
    documents = []
    for name, title, _ in _SAMPLES:
        questions = tuple(
            DemoQuestion(**{**q, "evidence": tuple((a, b) for a, b in q["evidence"])}) for q in stored[name]
        )
        text = (SAMPLES_PATH / f"{name}.md").read_text(encoding="utf-8").removesuffix("\n")
        documents.append(DemoDocument(title, text, questions))
    return tuple(documents)


@cache
def harbour_handbook() -> DemoDocument:
    """The handbook of a fictional harbour authority in plain English, with twelve questions.

    It was written for models that know English; the bundled pair cannot read it. It has about 6,000 tokens.
    An answer is a part of the evidence, which is one sentence. The kinds are ``name``, ``number``, ``date``
    and ``paraphrase``: a paraphrase shares no key word with its evidence. There are no contradictions.
    """
    text = (SAMPLES_PATH / "harbour.md").read_text(encoding="utf-8")
    lines = HARBOUR_QUESTIONS_PATH.read_text(encoding="utf-8").splitlines()
    questions = tuple(
        DemoQuestion(q["question"], q["answers"][0], q["kind"], tuple((a, b) for a, b in q["evidence"]), "")
        for q in map(json.loads, lines)
    )
    return DemoDocument(text.partition("\n")[0].removeprefix("# "), text, questions, "harbour")


def write_samples(folder: Path) -> None:
    """Generate the sample documents and write them to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {}
    for name, title, num_tokens in _SAMPLES:
        rng = held_out_rng(f"sample/{name}")
        composition = _compose(rng, HANDBOOK, num_tokens, title)
        questions = [
            q for kind, n in _SAMPLE_QUESTIONS.items() for q in _ask(rng, composition, n, {kind: 1.0})
        ]
        document = _render(rng, composition, title, questions)
        (folder / f"{name}.md").write_text(document.text + "\n", encoding="utf-8")
        stored[name] = [asdict(q) for q in document.questions]
    (folder / "questions.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def held_out_rng(name: str) -> random.Random:
    """A random generator whose seed training never uses."""
    return random.Random(f"held-out/{name}")


def _mix(kinds: Sequence[str] | None) -> Mapping[str, float]:
    if kinds is None:
        return EVALUATION_MIX
    if not kinds or set(kinds) - set(KINDS):
        raise ConfigurationError(
            f"kinds={list(kinds)}: choose one or more of {', '.join(KINDS)}, or None for all."
        )
    return {kind: EVALUATION_MIX[kind] for kind in KINDS if kind in kinds}


def _generate(
    domain: Domain, name: str, num_tokens: int, num_questions: int, mix: Mapping[str, float]
) -> DemoDocument:
    rng = held_out_rng(name if domain is HANDBOOK else f"{domain.name}/{name}")
    for _ in range(_MAX_ATTEMPTS):
        title = domain.title(rng)
        composition = _compose(rng, domain, num_tokens, title)
        questions = _ask(rng, composition, num_questions, mix)
        if len(questions) == num_questions:
            return _render(rng, composition, title, questions)
    raise ConfigurationError(
        f"questions_per_document={num_questions}: documents of num_tokens={num_tokens} do not have so many "
        f"questions of the kinds {', '.join(mix)}. Ask fewer questions or generate longer documents."
    )


def _compose(rng: random.Random, domain: Domain, num_tokens: int, title: str) -> Composition:
    from rapid_integrations.demo.tokenizer import sentence_encoder

    return compose(
        rng,
        num_tokens,
        sentence_encoder().count,
        domain=domain,
        title=title,
        heading_every=_HEADING_EVERY,
    )


def _ask(
    rng: random.Random, composition: Composition, number: int, mix: Mapping[str, float]
) -> list[Question]:
    drawn = composition.ask(rng, 2 * number + 8, mix)
    return list({question.question: question for question in drawn}.values())[:number]


def _render(
    rng: random.Random, composition: Composition, title: str, questions: Sequence[Question]
) -> DemoDocument:
    """Arrange the sentences in paragraphs, and locate the questions' evidence in the text."""
    text, spans, sentences_in_paragraph = "", [], 0
    after_heading = True
    for sentence in composition.sentences:
        new_paragraph = (
            sentence.is_heading or after_heading or (sentences_in_paragraph >= 4 and rng.random() < 0.4)
        )
        separator = ("\n\n" if new_paragraph else " ") if text else ""
        start = len(text) + len(separator)
        text += separator + sentence.text
        spans.append((start, len(text)))
        sentences_in_paragraph = 1 if new_paragraph else sentences_in_paragraph + 1
        after_heading = sentence.is_heading
    demo_questions = tuple(
        DemoQuestion(
            q.question,
            q.answer,
            q.kind,
            tuple(spans[i] for i in q.evidence),
            # A separate generator, so that contradictions do not change documents and questions.
            contradict(
                held_out_rng(f"contradiction/{q.question}"),
                composition.domain,
                [composition.sentences[i] for i in q.evidence],
            ),
        )
        for q in questions
    )
    return DemoDocument(title, text, demo_questions, composition.domain.name)
