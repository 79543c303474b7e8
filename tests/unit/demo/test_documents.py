import re
import subprocess
import sys

import pytest

from rapid_integrations.demo import DemoDocument, generate_documents, sample_documents
from rapid_integrations.demo.documents import held_out_rng, write_samples
from rapid_integrations.demo.domains import DOMAINS
from rapid_integrations.demo.tokenizer import build_tokenizer, sentence_encoder
from rapid_integrations.errors import ConfigurationError

KINDS = ("single", "describe", "two_hop", "inflected")


def generate(
    num_tokens: int, *, seed: int = 0, kinds: tuple[str, ...] | None = None, domain: str = "handbook"
) -> list[DemoDocument]:
    return list(
        generate_documents(
            num_tokens=num_tokens,
            num_documents=4,
            questions_per_document=5,
            seed=seed,
            kinds=kinds,
            domain=domain,
        )
    )


def check_evidence(document: DemoDocument) -> None:
    for question in document.questions:
        evidence = [document.text[a:b] for a, b in question.evidence]
        facts = re.findall(r"[^.]+\.", question.answer)
        assert len(evidence) == len(facts)
        for sentence, fact in zip(evidence, facts, strict=True):
            assert sentence.endswith(".")
            assert "\n" not in sentence
            names_and_values = re.findall(r"[A-Z][a-z]{3,}(?: [A-Z][a-z]+)?|\d+", fact.replace("The ", ""))
            assert names_and_values
            assert all(part in sentence for part in names_and_values), (sentence, fact)


@pytest.mark.parametrize("num_tokens", [256, 512, 2048, 16384])
def test_documents_have_the_length_asked_for(num_tokens: int) -> None:
    for document in generate(num_tokens):
        assert sentence_encoder().count(document.text) == pytest.approx(num_tokens, rel=0.03)


def test_documents_have_a_title_headings_and_paragraphs() -> None:
    document = generate(2048)[0]
    assert document.text.startswith(f"# {document.title}\n\n")
    assert document.text.count("\n\n## ") == 2048 // 400
    assert "\n\n\n" not in document.text


def test_the_same_seed_gives_the_same_documents() -> None:
    assert generate(600, seed=3) == generate(600, seed=3)
    assert generate(600, seed=3) != generate(600, seed=4)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, domain: str) -> None:
    for document in generate(1024, kinds=(kind,), domain=domain):
        assert document.domain == domain
        assert len({q.question for q in document.questions}) == 5
        for question in document.questions:
            assert question.kind == kind
            assert len(question.evidence) >= (2 if kind in ("describe", "two_hop") else 1)
            if kind == "inflected":
                inflected = re.findall(r"([A-Z]\w+)an [a-z]", question.question)
                assert inflected
                assert inflected[0] in question.answer
                assert inflected[0] + "an" not in document.text
        check_evidence(document)


def test_answers_are_long_enough_to_draft() -> None:
    documents = generate(2048) + generate(4096)
    lengths = [sentence_encoder().count(q.answer) for d in documents for q in d.questions]
    assert sum(lengths) / len(lengths) >= 18
    documents = list(generate_documents(num_tokens=4096, num_documents=20, questions_per_document=20, seed=1))
    lengths = [sentence_encoder().count(q.answer) for d in documents for q in d.questions]
    assert sum(lengths) / len(lengths) >= 20


def test_two_hop_evidence_is_in_two_places() -> None:
    for document in generate(2048, kinds=("two_hop",)):
        for question in document.questions:
            (_, first_end), (second_start, _) = sorted(question.evidence)
            assert first_end < second_start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 10}, "num_tokens=10"),
        ({"num_documents": 0}, "num_documents=0"),
        ({"questions_per_document": 0}, "questions_per_document=0"),
        ({"kinds": ["double"]}, "double"),
        ({"kinds": []}, "choose one or more"),
        ({"domain": "naval"}, "domain='naval': allowed are handbook, legal, medical, financial"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    defaults: dict[str, object] = {
        "num_tokens": 512,
        "num_documents": 1,
        "questions_per_document": 2,
        "seed": 0,
    }
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        list(generate_documents(**{**defaults, **options}))  # type: ignore[arg-type]


def test_too_many_questions_for_a_short_document() -> None:
    with pytest.raises(ConfigurationError, match="Ask fewer questions or generate longer"):
        list(generate_documents(num_tokens=200, num_documents=1, questions_per_document=100, seed=0))


def test_sample_documents() -> None:
    samples = sample_documents()
    lengths = [sentence_encoder().count(s.text) for s in samples]
    assert lengths == pytest.approx([4096, 16384, 32768], rel=0.03)
    for sample in samples:
        assert sample.text.startswith(f"# {sample.title}\n\n## ")
        assert len(sample.questions) >= 6
        assert {q.kind for q in sample.questions} == set(KINDS)
        check_evidence(sample)


@pytest.mark.parametrize("domain", DOMAINS)
def test_contradictions_are_well_formed_and_wrong(domain: str) -> None:
    tokenizer = build_tokenizer()
    for document in generate_documents(
        num_tokens=1024, num_documents=4, questions_per_document=8, seed=3, domain=domain
    ):
        for question in document.questions:
            sentences = [document.text[a:b] for a, b in question.evidence]
            wrong = question.contradiction
            assert not any(sentence in wrong for sentence in sentences)
            assert wrong.count(".") == len(sentences)
            encoded = tokenizer.encode(wrong, add_special_tokens=False)
            assert "<unk>" not in encoded.tokens
            # Forms and names stay: what differs are values and a manager's name, of two words.
            right = " ".join(sentences)
            differing = [a for a, b in zip(right.split(), wrong.split(), strict=True) if a != b]
            assert len(sentences) <= len(differing) <= 4 * len(sentences)
            if question.kind == "two_hop":
                manager = " ".join(_manager(wrong.split(". ")[0]))
                assert manager in wrong.split(". ")[1]
                assert manager not in document.text


def _manager(sentence: str) -> list[str]:
    return sentence.rstrip(".").split()[-2:]


def test_the_sample_files_are_what_the_generator_writes(tmp_path_factory: pytest.TempPathFactory) -> None:
    from rapid_integrations.demo.documents import SAMPLES_PATH

    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder)
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (SAMPLES_PATH / path.name).read_bytes()


def test_held_out_seeds_are_not_those_of_training() -> None:
    import random

    from rapid_integrations.demo.training.train import training_rng

    training = {
        training_rng(name, seed).getstate()[1] for name in ("target", "drafter") for seed in range(50)
    }
    held_out = {
        held_out_rng(f"{length}/{seed}/0").getstate()[1] for length in (512, 4096) for seed in range(50)
    }
    assert not training & held_out
    assert held_out_rng("x").random() == random.Random("held-out/x").random()


def test_importing_the_demo_loads_no_framework() -> None:
    script = (
        "import sys, rapid_integrations.demo as demo; demo.sample_documents();"
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
