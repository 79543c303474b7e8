"""The committed weights, on documents they were not trained on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rapid_integrations.demo import DRAFTER_PATH, TARGET_PATH, generate_documents, sample_documents
from rapid_integrations.demo.domains import DOMAINS
from rapid_integrations.demo.evaluate import ChunkIndex, Scorer, evaluate, table
from rapid_integrations.demo.tokenizer import MAX_LENGTH, build_tokenizer

PATHS = (TARGET_PATH, DRAFTER_PATH)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def target() -> Scorer:
    return Scorer(TARGET_PATH)


@pytest.fixture(scope="module")
def drafter() -> Scorer:
    return Scorer(DRAFTER_PATH)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_the_files_are_those_of_this_tokenizer(path: Path, target: Scorer) -> None:
    assert (path / "tokenizer.json").read_text(encoding="utf-8") == build_tokenizer().to_str(pretty=True)
    with safe_open(path / "model.safetensors", framework="pt") as weights:
        names = weights.keys()
        assert "model.embed_tokens.weight" in names
        assert all(weights.get_tensor(name).dtype == torch.float16 for name in names)
    assert target.model.config.max_position_embeddings == MAX_LENGTH


def test_the_pair_is_small() -> None:
    assert sum(f.stat().st_size for path in PATHS for f in path.iterdir()) <= 15e6


def test_accuracy_on_short_documents(target: Scorer, drafter: Scorer) -> None:
    cells = evaluate(target, drafter, num_tokens=600, num_questions=48, per_document=6, seed=7)
    pooled: dict[str, list[bool]] = {}
    for (column, _, _), results in cells.items():
        pooled.setdefault(column, []).extend(results)
    share = {column: sum(results) / len(results) for column, results in pooled.items()}
    assert len(pooled["target full"]) == len(pooled["drafter full"]) == 48
    assert share["target full"] >= 0.9
    assert share["target hit"] >= 0.9
    assert share["drafter hit"] >= 0.9
    assert share["target miss"] + share["drafter miss"] <= 0.4
    assert table(cells, [600], ["single", "describe", "two_hop", "inflected"]).count("|\n") == 3


def test_the_target_reads_the_handbook(target: Scorer) -> None:
    handbook = sample_documents()[0]
    right = target.score(handbook.text, handbook.questions)
    assert sum(right) >= len(right) / 2


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_generation_through_the_chat_template(path: Path) -> None:
    scorer = Scorer(path)
    context = (
        "The Trottivik depot passcode is 123456. The Trottivik depot opened in 1801. The old river was quiet."
    )
    for question in (
        "What is the passcode of the Trottivik depot?",
        "Which passcode opens the Trottivikan depot?",
    ):
        prompt = scorer.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Context: {context} Question: {question}"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            out = scorer.model.generate(**prompt, max_new_tokens=30, do_sample=False)
        answer = scorer.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
        assert answer == "The Trottivik depot passcode is 123456.<eos>"


def test_matching_words_misses_inflected_names(target: Scorer) -> None:
    found = {"single": [], "inflected": []}
    for kind, outcomes in found.items():
        documents = generate_documents(
            num_tokens=4096, num_documents=3, questions_per_document=10, seed=1, kinds=[kind]
        )
        for document in documents:
            index = ChunkIndex(document, target.tokenizer)
            outcomes += [index.retrieve(question).outcome for question in document.questions]
    assert found["single"].count("hit") > 25
    assert found["inflected"].count("hit") < 15


@pytest.mark.slow
@pytest.mark.parametrize("domain", [name for name in DOMAINS if name != "handbook"])
def test_the_drafter_knows_the_other_domains(target: Scorer, drafter: Scorer, domain: str) -> None:
    cells = evaluate(target, drafter, num_tokens=600, num_questions=36, per_document=6, seed=7, domain=domain)
    right = [x for (column, _, _), results in cells.items() if column == "drafter hit" for x in results]
    assert len(right) > 12
    assert sum(right) / len(right) > 0.5
