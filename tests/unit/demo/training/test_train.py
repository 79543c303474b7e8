"""The stages of training, and resuming."""

import random
from pathlib import Path

import pytest
import torch

from rapid_integrations.demo.domains import DOMAINS
from rapid_integrations.demo.tokenizer import (
    build_tokenizer,
)
from rapid_integrations.demo.training import train
from rapid_integrations.demo.training.network import (
    SHAPES,
    Shape,
)
from rapid_integrations.demo.training.plans import Plan, Stage
from rapid_integrations.demo.training.train import Trainer
from rapid_integrations.demo.training.training_data import (
    question_example,
)


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
    batch = [question_example(random.Random(256), 256, 4) for _ in range(4)]
    losses = [trainer._step(batch, 0.005)["loss"] for _ in range(6)]
    assert losses[-1] < losses[0] - 0.5
