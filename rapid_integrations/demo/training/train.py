"""Train the demo pair: ``python -m rapid_integrations.demo.training.train --output DIR``.

The drafter learns in stages: repetition of random segments, then questions about short documents, then a mix
of lengths with a decaying learning rate, and this four times more, at last with tool dialogues and then with
documents of all domains. The target starts from the drafter, widened, and learns to read long documents.
A stage ends when its
minutes are over or the accuracy is reached at which it has nothing left to teach. The state is saved every
few minutes; the same command resumes from it.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rapid_integrations.demo.domains import DOMAINS, HANDBOOK
from rapid_integrations.demo.tokenizer import EOS, MAX_LENGTH, SPECIAL_TOKENS
from rapid_integrations.demo.training.initialisation import initialise, widen
from rapid_integrations.demo.training.muon import Muon
from rapid_integrations.demo.training.network import (
    SHAPES,
    TrainableLlama,
    load_from_transformers,
    save_for_transformers,
)
from rapid_integrations.demo.training.tool_dialogues import tool_example
from rapid_integrations.demo.training.training_data import (
    ANSWER,
    CALL,
    IGNORED,
    Example,
    question_example,
    repetition_example,
)

logger = logging.getLogger(__name__)

TOOL_LENGTHS = (1024, 2048)
TOOL_MAX_POSITION = 8192
REPETITION_SHARE = 0.12  # of the examples of the question stages
QUESTION_WEIGHT = 0.5  # of the loss on questions and repeated name tails
CALL_WEIGHT = 0.5  # of the loss on tool calls
SAVE_EVERY_S = 180.0
_EOS = SPECIAL_TOKENS.index(EOS)
_ALL_DOMAINS = {name: 0.34 if name == HANDBOOK.name else 0.22 for name in DOMAINS}


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: For the log.
        lengths: Length of the examples, questions an example and weight; a step draws one.
        minutes: Time after which the stage ends.
        lr: Learning rate of the matrices; the embeddings' follows it.
        max_steps: Steps after which the stage ends.
        enough: Accuracy over 20 steps (of answers; of tokens in repetition) at which the stage ends.
        max_position: Positions are skipped up to here.
        near_duplicates: Share of documents with names that resemble one another.
        repetition: Whether the stage holds nothing but repetition.
        decay: Whether the learning rate falls to zero.
        tokens_per_step: Tokens a step; one example, where that is longer.
        tools: Share of tool dialogues among the examples of 1024 and 2048 tokens.
        domains: Weights of the documents' domains.
    """

    name: str
    lengths: tuple[tuple[int, int, float], ...]
    minutes: float
    lr: float
    max_steps: int = 100_000
    enough: float = 2.0
    max_position: int = MAX_LENGTH
    near_duplicates: float = 0.7
    repetition: bool = False
    decay: bool = False
    tokens_per_step: int = 8192
    tools: float = 0.0
    domains: Mapping[str, float] = field(default_factory=lambda: {HANDBOOK.name: 1.0})


@dataclass(frozen=True)
class Plan:
    """How one model is trained."""

    stages: tuple[Stage, ...]
    embedding_lr: float = 0.8  # relative to the matrices'
    start: str | None = None  # stage of the drafter's training whose result, widened, is the start


PLANS = {
    "drafter": Plan(
        stages=(
            Stage("repeat", ((128, 0, 1.0),), 3.6, 0.01, enough=0.985, max_position=0, repetition=True),
            Stage("short", ((256, 4, 1.0),), 12.8, 0.01, enough=0.94, near_duplicates=0.4),
            Stage("medium", ((512, 7, 1.0),), 17.6, 0.01, enough=0.96),
            Stage(
                "long",
                ((256, 4, 0.2), (512, 7, 0.35), (1024, 14, 0.3), (1536, 20, 0.15)),
                46,
                0.008,
                decay=True,
            ),
            Stage(
                "polish",
                ((512, 7, 0.3), (1024, 14, 0.45), (1536, 20, 0.25)),
                25,
                0.006,
                decay=True,
                tokens_per_step=4096,
            ),
            Stage(
                "refine",
                ((256, 4, 0.1), (512, 7, 0.3), (1024, 14, 0.35), (1536, 20, 0.15), (2048, 26, 0.1)),
                45,
                0.005,
                decay=True,
                tokens_per_step=4096,
            ),
            Stage(
                "tools",
                ((256, 4, 0.05), (512, 7, 0.25), (1024, 14, 0.55), (2048, 26, 0.15)),
                60,
                0.004,
                decay=True,
                tokens_per_step=4096,
                tools=0.5,
            ),
            Stage(
                "specialise",
                ((256, 4, 0.1), (512, 7, 0.3), (1024, 14, 0.4), (2048, 26, 0.2)),
                50,
                0.004,
                decay=True,
                tokens_per_step=4096,
                tools=0.3,
                domains=_ALL_DOMAINS,
            ),
        ),
    ),
    "target": Plan(
        stages=(
            Stage(
                "grow",
                ((512, 7, 0.12), (1024, 14, 0.3), (2048, 26, 0.28), (4096, 48, 0.18), (8192, 90, 0.12)),
                80,
                0.002,
                decay=True,
                tokens_per_step=4096,
                tools=0.5,
                domains=_ALL_DOMAINS,
            ),
        ),
        start="specialise",
    ),
}


@dataclass
class Progress:
    """Where training stands."""

    stage: int = 0
    step: int = 0  # in the stage
    stage_s: float = 0.0
    total_steps: int = 0
    total_s: float = 0.0


class Trainer:
    """Trains one model; ``run`` resumes from the saved state, if there is one."""

    def __init__(
        self,
        name: str,
        output: Path,
        *,
        seed: int,
        pace: float = 1.0,
        continue_from: Path | None = None,
    ) -> None:
        self.name, self.plan, self.folder = name, PLANS[name], output / name
        self.pace = pace
        torch.manual_seed(seed)
        self.rng = training_rng(name, seed)
        self.model = TrainableLlama(SHAPES[name])
        if continue_from is not None:
            load_from_transformers(self.model, continue_from / name)
        elif self.plan.start is None:
            initialise(self.model, seed)
        else:
            drafter = TrainableLlama(SHAPES["drafter"])
            drafter.load_state_dict(torch.load(output / "drafter" / f"{self.plan.start}.pt"))
            widen(drafter, self.model, seed)
        matrices: list[Tensor] = []
        embeddings: list[Tensor] = []
        gains: list[Tensor] = []
        for parameter_name, parameter in self.model.named_parameters():
            group = gains if parameter.dim() != 2 else embeddings if "embed" in parameter_name else matrices
            group.append(parameter)
        self.muon = Muon(matrices, lr=0.0, weight_decay=0.01)
        self.adam = torch.optim.AdamW(
            [{"params": embeddings}, {"params": gains}], lr=0.0, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.progress = Progress(stage=len(self.plan.stages) - 1 if continue_from else 0)
        self._load()

    def run(self) -> None:
        """Train to the end of the plan and save the model for Transformers."""
        for number, stage in enumerate(self.plan.stages):
            if number >= self.progress.stage:
                self._run_stage(stage)
                self.progress.stage, self.progress.step, self.progress.stage_s = number + 1, 0, 0.0
                self._save()
                torch.save(self.model.state_dict(), self.folder / f"{stage.name}.pt")
        save_for_transformers(self.model, self.folder)

    def _run_stage(self, stage: Stage) -> None:
        limit_s = stage.minutes * self.pace * 60
        history: list[dict[str, float]] = []
        progress, saved = self.progress, time.monotonic()
        while progress.step < stage.max_steps and progress.stage_s < limit_s:
            start = time.monotonic()
            fraction = max(progress.step / stage.max_steps, progress.stage_s / limit_s)
            lr = stage.lr * min(1.0, (progress.total_steps + 1) / 40)
            length, examples = self._batch(stage)
            history.append(self._step(examples, lr * (max(0.02, 1 - fraction) if stage.decay else 1.0)))
            taken = time.monotonic() - start
            progress.step += 1
            progress.total_steps += 1
            progress.stage_s += taken
            progress.total_s += taken
            if progress.step % 20 == 0 or progress.step == 1:
                recent = history[-20:]
                mean = {
                    key: statistics.fmean(h[key] for h in recent if key in h)
                    for key in dict.fromkeys(key for h in recent for key in h)
                }
                logger.info(
                    "%s %.0fs %s step %d/%d length %d %.1fs/step %s",
                    self.name, progress.total_s, stage.name, progress.step, progress.total_steps, length,
                    progress.stage_s / progress.step, " ".join(f"{k} {v:.3f}" for k, v in mean.items()),
                )  # fmt: skip
                if len(history) >= 40 and mean["tokens" if stage.repetition else "answers"] >= stage.enough:
                    break
            if time.monotonic() - saved > SAVE_EVERY_S:
                self._save()
                saved = time.monotonic()

    def _batch(self, stage: Stage) -> tuple[int, list[Example]]:
        length, num_questions, _ = self.rng.choices(stage.lengths, [x[2] for x in stage.lengths])[0]
        examples = []
        for _ in range(max(1, stage.tokens_per_step // length)):
            domain = DOMAINS[self.rng.choices(list(stage.domains), list(stage.domains.values()))[0]]
            if stage.repetition or (length <= 1024 and self.rng.random() < REPETITION_SHARE):
                examples.append(repetition_example(self.rng, length, stage.max_position))
            elif length in TOOL_LENGTHS and self.rng.random() < stage.tools:
                examples.append(
                    tool_example(
                        self.rng,
                        length,
                        max_position=min(stage.max_position, TOOL_MAX_POSITION),
                        near_duplicates=stage.near_duplicates,
                        domain=domain,
                    )
                )
            else:
                examples.append(
                    question_example(
                        self.rng,
                        length,
                        num_questions,
                        max_position=stage.max_position,
                        near_duplicates=stage.near_duplicates,
                        domain=domain,
                    )
                )
        return length, examples

    def _step(self, examples: list[Example], lr: float) -> dict[str, float]:
        ids = torch.tensor([e.ids for e in examples])
        positions = torch.tensor([e.positions for e in examples])
        labels = torch.tensor([e.labels for e in examples])[:, 1:].reshape(-1)
        selected = (labels != IGNORED).nonzero()[:, 0]
        targets, labels = ids[:, 1:].reshape(-1)[selected], labels[selected]
        hidden = self.model.model(ids[:, :-1], positions[:, :-1])
        logits = self.model.logits(hidden.reshape(-1, hidden.shape[-1])[selected])
        losses = functional.cross_entropy(logits, targets, reduction="none")
        in_answer, in_call = labels == ANSWER, labels == CALL
        answer_loss, call_loss = _mean(losses[in_answer]), _mean(losses[in_call])
        other_loss = _mean(losses[~(in_answer | in_call)])
        loss = answer_loss + CALL_WEIGHT * call_loss + QUESTION_WEIGHT * other_loss
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.param_groups[0]["lr"] = lr
        self.adam.param_groups[0]["lr"] = lr * self.plan.embedding_lr
        self.adam.param_groups[1]["lr"] = lr * self.plan.embedding_lr * 0.1
        optimizers: tuple[torch.optim.Optimizer, ...] = (self.muon, self.adam)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        correct = logits.argmax(-1) == targets
        figures = {"loss": answer_loss.item(), "other": other_loss.item()}
        if in_answer.any():
            figures["tokens"] = correct[in_answer].float().mean().item()
            figures["answers"] = _whole_answers(correct[in_answer], targets[in_answer])
        if in_call.any():
            figures["calls"] = _whole_answers(correct[in_call], targets[in_call])
        return figures

    def _load(self) -> None:
        path = self.folder / "state.pt"
        if path.exists():
            state: dict[str, Any] = torch.load(path, weights_only=False)
            self.model.load_state_dict(state["model"])
            self.muon.load_state_dict(state["muon"])
            self.adam.load_state_dict(state["adam"])
            self.rng.setstate(state["rng"])
            self.progress = Progress(**state["progress"])
            logger.info("%s resumes: %s", self.name, self.progress)

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "rng": self.rng.getstate(),
            "progress": asdict(self.progress),
        }
        unfinished = self.folder / "state.pt.new"
        torch.save(state, unfinished)
        unfinished.replace(self.folder / "state.pt")


def training_rng(name: str, seed: int) -> random.Random:
    """Return the generator of a model's training examples; ``documents.held_out_rng`` never has its seed."""
    return random.Random(f"train/{name}/{seed}")


def _mean(losses: Tensor) -> Tensor:
    """Return the mean, 0 of none."""
    return losses.mean() if losses.numel() else torch.zeros(())


def _whole_answers(correct: Tensor, targets: Tensor) -> float:
    """Return the share of answers (or calls), each ended by ``<eos>``, without a wrong token."""
    ends = (targets == _EOS).long()
    answer = torch.cumsum(ends, 0) - ends
    whole = torch.ones(int(answer.max()) + 1).scatter_reduce(0, answer, correct.float(), "amin")
    return whole.mean().item()


def main(arguments: Iterable[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the demo pair on a CPU.")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for target/ and drafter/; resumes from it"
    )
    parser.add_argument(
        "--only", choices=tuple(PLANS), help="train one of the two; the target starts from the drafter"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="threads for each model (default: 1)")
    parser.add_argument("--pace", type=float, default=1.0, help="multiplies the time that each stage has")
    parser.add_argument(
        "--continue-from",
        type=Path,
        metavar="FOLDER",
        help="train the last stage only, from the models in FOLDER/target and FOLDER/drafter",
    )
    options = parser.parse_args(None if arguments is None else list(arguments))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # softmax leaves so many that attention's backward took five times as long
    for name in [options.only] if options.only else PLANS:
        Trainer(
            name,
            options.output,
            seed=options.seed,
            pace=options.pace,
            continue_from=options.continue_from,
        ).run()


if __name__ == "__main__":
    main()
