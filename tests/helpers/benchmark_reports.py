"""Scripted runs, outcomes and reports of a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rapid_integrations.benchmark.baselines import BASELINES
from rapid_integrations.benchmark.results import BenchmarkReport, Cell, Suite
from rapid_integrations.benchmark.work import Answer, Outcome, Run
from rapid_integrations.engine.stats import RapidStats


def outcome(*texts: str, speed: float = 100.0, **changes: Any) -> Outcome:
    """Answers of ten tokens each, decoded at ``speed`` tokens per second."""
    tokens = 10 * len(texts)
    seconds = tokens / speed
    stats = RapidStats(
        completion_tokens=tokens,
        rounds=tokens // 2,
        drafted_tokens=tokens,
        accepted_tokens=tokens // 2,
        prefill_s=0.5,
        draft_s=seconds * 0.2,
        verify_s=seconds * 0.7,
        decode_s=seconds,
    )
    answers = tuple(Answer(text, tuple(map(ord, text))) for text in texts)
    fields = {
        "wall_s": 0.5 + seconds,
        "first_token_s": tuple(0.1 * (i + 1) for i in range(len(texts))),
        "kv_bytes": 2**20,
        "rest_bytes": 2**21,
        "peak_bytes": 2**22,
    }
    return Outcome(answers, stats, **{**fields, **changes})


def plain_outcome(*texts: str, speed: float = 50.0) -> Outcome:
    """As :func:`outcome`, without drafts."""
    tokens = 10 * len(texts)
    seconds = tokens / speed
    stats = RapidStats(completion_tokens=tokens, rounds=tokens, verify_s=seconds, decode_s=seconds)
    return Outcome(tuple(Answer(t, tuple(map(ord, t))) for t in texts), stats, wall_s=seconds)


class ScriptedWorkers:
    """Replaces the worker processes: all baselines answer with ``script(run)``."""

    hardware: dict[Any, Any] = {"rapid": {"device": "cpu", "threads": 1}}  # noqa: RUF012  # never changed

    def __init__(self, script: Callable[[Run], Outcome]) -> None:
        self.script = script
        self.runs: list[Run] = []

    def __enter__(self) -> ScriptedWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, run: Run) -> Outcome:
        self.runs.append(run)
        return self.script(run)


def right_answers(run: Run) -> Outcome:
    """Every question answered as its task expects."""
    texts = [question.answers[0] for question in run.task.questions]
    drafts = BASELINES[run.baseline].options != {"num_draft_tokens": 0}
    return outcome(*texts) if drafts else plain_outcome(*texts)


def cell(suite: Suite, baseline: str, *samples: Outcome, context: int = 1024, **fields: Any) -> Cell:
    cold = suite in ("prefill", "questions", "end-to-end")
    given = {"together": suite == "batch", "cold": cold, "retrieval": None, **fields}
    return Cell(suite, baseline, context, len(samples[0].answers), samples=samples, **given)


def report(*cells: Cell, **fields: Any) -> BenchmarkReport:
    given: dict[str, Any] = {
        "differences": (),
        "settings": {"seconds": 1.0},
        "hardware": {"processor": "abacus", "runtimes": {"rapid": {"device": "cpu", "threads": 2}}},
        "versions": {"python": "3"},
    }
    return BenchmarkReport(cells, **{**given, **fields})


def full_report() -> BenchmarkReport:
    """A few cells of every suite, two contexts and two batches."""
    cells = []
    for context in (1024, 2048):
        cells.append(cell("prefill", "generate", plain_outcome("a"), context=context))
        cells.append(cell("prefill", "rapid", outcome("a"), context=context, retrieval="natural"))
        for name, speed in (("generate", 10.0), ("plain", 50.0)):
            sample = plain_outcome("a", "b", speed=speed)
            cells.append(cell("decode", name, sample, sample, context=context, compared=4, equal=4, asked=2))
        for quality, speed in (("gold", 200.0), ("unrelated", 40.0)):
            cells.append(
                cell("decode", "rapid", outcome("a", "b", speed=speed), context=context, retrieval=quality)
            )
    for batch in (("a",), ("a", "b")):
        cells.append(cell("batch", "plain", plain_outcome(*batch)))
        cells.append(cell("batch", "rapid", outcome(*batch), retrieval="gold"))
    for together in (False, True):
        cells.append(cell("questions", "plain", outcome("a", "b"), together=together))
    for name, speed in (("hf-pipeline", 5.0), ("rapid-langchain", 100.0)):
        cells.append(cell("end-to-end", name, outcome("a", speed=speed), compared=1, equal=1))
    return report(*cells)
