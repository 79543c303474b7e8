"""Train the demo pair: ``python -m rapid_integrations.demo.training.train --output DIR``.

A stage (:mod:`~rapid_integrations.demo.training.plans`) ends after its time limit, or when its accuracy shows
that it has nothing left to teach. The state is saved every few minutes, and the same command resumes from it.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rapid_integrations.demo.domains import DOMAINS
from rapid_integrations.demo.tokenizer import EOS, SPECIAL_TOKENS
from rapid_integrations.demo.training.initialisation import initialise, widen
from rapid_integrations.demo.training.muon import Muon
from rapid_integrations.demo.training.network import (
    SHAPES,
    TrainableLlama,
    load_from_transformers,
    save_for_transformers,
)
from rapid_integrations.demo.training.plans import PLANS, Stage
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
REPETITION_SHARE = 0.12
"""The share of repetition among the examples of the question stages."""
QUESTION_WEIGHT = 0.5
"""The weight of the loss on questions and on repeated name endings."""
CALL_WEIGHT = 0.5
"""The weight of the loss on tool calls."""
SAVE_EVERY_S = 180.0
_EOS = SPECIAL_TOKENS.index(EOS)


@dataclass
class Progress:
    """The position in the plan of a training run."""

    stage: int = 0
    step: int = 0  # within the stage
    stage_s: float = 0.0
    total_steps: int = 0
    total_s: float = 0.0


class Trainer:
    """Trains one model. It resumes from the state saved in its folder, if there is one.

    Args:
        name: ``"target"`` or ``"drafter"``.
        output: The folder that gets the model's folder.
        seed: The seed of weights and examples.
        pace: A factor for the time limits of all stages.
        continue_from: A folder with trained models, of which only the last stage is trained; ``None`` trains
            all stages.
    """

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
        """Train all remaining stages and save the model for transformers."""
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
            elapsed_s = time.monotonic() - start
            progress.step += 1
            progress.total_steps += 1
            progress.stage_s += elapsed_s
            progress.total_s += elapsed_s
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
                if (
                    len(history) >= 40
                    and mean["tokens" if stage.repetition else "answers"] >= stage.stop_accuracy
                ):
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
    """The generator of a model's training examples, whose seed ``documents.held_out_rng`` never uses."""
    return random.Random(f"train/{name}/{seed}")


def _mean(losses: Tensor) -> Tensor:
    """The mean of the losses; 0 if there are none."""
    return losses.mean() if losses.numel() else torch.zeros(())


def _whole_answers(correct: Tensor, targets: Tensor) -> float:
    """The share of answers or calls, each ended by ``<eos>``, without a wrong token."""
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
    torch.set_flush_denormal(True)  # denormals of softmax make the backward pass five times slower
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
