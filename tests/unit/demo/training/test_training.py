import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rapid_integrations.demo import tokenizer as tokenizer_module
from rapid_integrations.demo.domains import DOMAINS
from rapid_integrations.demo.tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    MAX_LENGTH,
    PAD,
    SPECIAL_TOKENS,
    USER,
    build_tokenizer,
    build_vocabulary,
)
from rapid_integrations.demo.training import train
from rapid_integrations.demo.training.initialisation import initialise, widen
from rapid_integrations.demo.training.network import (
    SHAPES,
    Shape,
    TrainableLlama,
    load_from_transformers,
    save_for_transformers,
)
from rapid_integrations.demo.training.plans import Plan, Stage
from rapid_integrations.demo.training.train import Trainer
from rapid_integrations.demo.training.training_data import (
    ANSWER,
    QUESTION,
    Example,
    question_example,
    repetition_example,
)

ID = {token: i for i, token in enumerate(SPECIAL_TOKENS)}


def examples(length: int, num_questions: int, count: int) -> list[Example]:
    rng = random.Random(length)
    return [question_example(rng, length, num_questions) for _ in range(count)]


@pytest.mark.parametrize(("length", "num_questions"), [(256, 4), (512, 7), (2048, 26)])
def test_examples_fit_and_their_answers_are_whole_turns(length: int, num_questions: int) -> None:
    for example in examples(length, num_questions, 40):
        assert len(example.ids) == len(example.positions) == len(example.labels) == length
        assert all(before < after for before, after in itertools.pairwise(example.positions))
        assert example.positions[-1] < MAX_LENGTH + length
        assert example.ids[0] == ID[BOS]
        assert ANSWER in example.labels
        if QUESTION not in example.labels:
            continue  # an excerpt without facts became repetition
        for i, label in enumerate(example.labels[1:], 1):
            if label == ANSWER and example.labels[i - 1] != ANSWER and ID[USER] in example.ids:
                assert example.ids[i - 1] == ID[ASSISTANT]
            if label != ANSWER and example.labels[i - 1] == ANSWER:
                assert example.ids[i - 1] == ID[EOS]


def test_answers_of_examples_are_in_the_context() -> None:
    tokenizer = build_tokenizer()
    for example in examples(512, 6, 40):
        if QUESTION not in example.labels:
            continue
        first = (
            example.labels.index(QUESTION) if ANSWER not in example.labels else example.labels.index(ANSWER)
        )
        context = tokenizer.decode(example.ids[:first])
        answers = tokenizer.decode(
            [t for t, label in zip(example.ids, example.labels, strict=True) if label == ANSWER]
        )
        numbers = [word.strip(".") for word in answers.split() if word.strip(".").isdigit()]
        assert all(number in context for number in numbers)


def test_excerpts_begin_and_end_within_sentences() -> None:
    tokenizer = build_tokenizer()
    starts = [
        tokenizer.decode(e.ids[3:7])
        for e in examples(512, 6, 200)
        if tokenizer.id_to_token(e.ids[2]) == "▁Context"
    ]
    assert any(start.lstrip(": ")[:1].islower() for start in starts)
    assert sum(start.lstrip(": #")[:1].isupper() for start in starts) > len(starts) / 2


def test_repetition_repeats() -> None:
    example = repetition_example(random.Random(0), 128, max_position=4096)
    half = example.labels.index(ANSWER)
    seen = set(itertools.pairwise(example.ids[1:half]))
    pairs = [(example.ids[i - 1], example.ids[i]) for i in range(1, 128) if example.labels[i] == ANSWER]
    assert len(pairs) > 40
    assert set(pairs) <= seen
    assert ID[PAD] not in example.ids[:127]


def test_the_structured_start_attends_as_described() -> None:
    """Each of layer 0's heads attends most to the token its offset back."""
    model = TrainableLlama(SHAPES["target"])
    initialise(model, seed=1)
    ids = torch.randint(len(SPECIAL_TOKENS), 1300, (1, 64), generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[0]
    x = layer.input_layernorm(model.model.embed_tokens(ids))
    angles = torch.arange(64).float()[:, None] * model.model.frequencies
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))

    def rotated(projection: torch.nn.Module) -> torch.Tensor:
        heads = projection(x).view(1, 64, 8, 32).transpose(1, 2)
        first, second = heads.chunk(2, -1)
        return heads * cos + torch.cat((-second, first), -1) * sin

    scores = rotated(layer.self_attn.q_proj) @ rotated(layer.self_attn.k_proj).mT
    looked_at = scores[0].masked_fill(torch.ones(64, 64).triu(1).bool(), -1e9).argmax(-1)
    for head, offset in enumerate([1, 1, 1, 1, 2, 2, 3, 4]):
        right = looked_at[head, 8:] == torch.arange(8, 64) - offset
        assert right.float().mean() > 0.9, (head, offset)


def test_a_widened_model_computes_the_same_with_different_copies() -> None:
    small, large = TrainableLlama(SHAPES["drafter"]), TrainableLlama(SHAPES["target"])
    initialise(small, seed=0)
    widen(small, large, seed=0)
    ids = torch.randint(0, 1300, (2, 50), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(50).expand(2, 50)
    with torch.no_grad():
        expected = small.logits(small.model(ids, positions))
        torch.testing.assert_close(large.logits(large.model(ids, positions)), expected, atol=2e-3, rtol=1e-3)
    query = large.get_parameter("model.layers.1.self_attn.q_proj.weight")
    assert not torch.allclose(query[:128], query[128:])
    with pytest.raises(ValueError, match="twice as wide"):
        widen(small, small, seed=0)


def test_the_saved_model_computes_what_the_trained_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TrainableLlama(SHAPES["drafter"])
    initialise(model, seed=0)
    save_for_transformers(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.config.max_position_embeddings == MAX_LENGTH
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id == ID[EOS]
    ids = tokenizer("The Trottivik depot passcode is 123456.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.logits(model.model(ids, torch.arange(ids.shape[1])[None]))
        actual = loaded(ids).logits
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.02)  # saved as float16


def test_a_vocabulary_that_has_grown_gets_embeddings_like_those_of_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(hidden_size=64, intermediate_size=32, num_attention_heads=2)
    grown = TrainableLlama(shape)
    with monkeypatch.context() as patch:
        vocabulary = {piece: i for piece, i in build_vocabulary().items() if i < 1400}
        patch.setattr(tokenizer_module, "build_vocabulary", lambda: vocabulary)
        small = TrainableLlama(replace(shape, vocab_size=1408))
        save_for_transformers(small, tmp_path)
    load_from_transformers(grown, tmp_path)
    before, after = (model.model.embed_tokens.weight.detach() for model in (small, grown))
    torch.testing.assert_close(after[:1400], before[:1400], atol=1e-2, rtol=1e-2)  # saved as float16
    assert len(after) == shape.vocab_size
    new = after[1400:]
    assert new.std() == pytest.approx(before.std().item(), rel=0.1)
    likeness = torch.nn.functional.cosine_similarity(new[:, None], before[None, :1400], dim=-1)
    assert (likeness.amax(1) > 0.4).all()
    assert (likeness.amax(1) < 0.99).all()
    for (name, a), (_, b) in zip(
        small.model.layers.named_parameters(), grown.model.layers.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2, msg=name)


def test_the_last_stage_has_documents_of_every_domain(tmp_path: Path) -> None:
    trainer = Trainer("drafter", tmp_path, seed=0)
    stage = trainer.plan.stages[-1]
    tokenizer = build_tokenizer()
    texts = [tokenizer.decode(example.ids) for _ in range(20) for example in trainer._batch(stage)[1]]
    for domain in DOMAINS.values():
        own = [noun for noun in domain.subject.nouns if sum(f" {noun} " in text for text in texts)]
        assert len(own) > len(domain.subject.nouns) / 2


def test_training_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(
        hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=2, head_dim=8
    )
    first = Stage(
        "repeat",
        ((64, 0, 1.0),),
        5,
        0.01,
        max_steps=2,
        max_position=0,
        repetition=True,
        tokens_per_step=256,
    )
    second = Stage("short", ((256, 3, 1.0),), 5, 0.01, max_steps=2, decay=True, tokens_per_step=256)
    monkeypatch.setitem(SHAPES, "drafter", shape)
    monkeypatch.setattr(train, "initialise", lambda model, seed: None)

    def run(folder: Path, stages: tuple[Stage, ...]) -> Trainer:
        monkeypatch.setitem(train.PLANS, "drafter", Plan(stages))
        trainer = Trainer("drafter", folder, seed=5)
        trainer.run()
        return trainer

    whole = run(tmp_path / "whole", (first, second))
    run(tmp_path / "parts", (first,))
    resumed = run(tmp_path / "parts", (first, second))
    assert whole.progress.total_steps == resumed.progress.total_steps == 4
    for (name, a), (_, b) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0, msg=name)
    assert (tmp_path / "whole" / "drafter" / "model.safetensors").exists()


def test_the_target_starts_from_the_drafter(tmp_path: Path) -> None:
    drafter = Trainer("drafter", tmp_path, seed=0)
    (tmp_path / "drafter").mkdir()
    torch.save(drafter.model.state_dict(), tmp_path / "drafter" / "specialise.pt")
    target = Trainer("target", tmp_path, seed=0)
    embeddings = drafter.model.model.embed_tokens.weight
    torch.testing.assert_close(target.model.model.embed_tokens.weight, torch.cat((embeddings, embeddings), 1))


def test_steps_lower_the_loss_on_their_own_batch(tmp_path: Path) -> None:
    trainer = Trainer("drafter", tmp_path, seed=0)
    batch = examples(256, 4, 4)
    losses = [trainer._step(batch, 0.005)["loss"] for _ in range(6)]
    assert losses[-1] < losses[0] - 0.5
