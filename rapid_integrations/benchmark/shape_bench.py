"""``rapid bench-shape``: how fast models of a shape would be here, by how many drafted tokens stand.

Everything runs in one process: the engine plainly and with each acceptance, in turns, and then transformers'
``generate()`` on the same weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import queue
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rapid_integrations.benchmark.bound import SpeedBound, conditional_acceptance
from rapid_integrations.benchmark.dummy_models import (
    Script,
    ScriptedModel,
    dummy_model,
    load_shape,
    random_prompt,
    random_script,
)
from rapid_integrations.benchmark.memory import synchronize
from rapid_integrations.benchmark.processes import hardware
from rapid_integrations.benchmark.results import Spread
from rapid_integrations.benchmark.tables import make_table, spread_label, table_console
from rapid_integrations.benchmark.transformers_runtime import CachedModel
from rapid_integrations.config import EngineLimits, SamplingParams, SpeculationParams
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.requests import Event, Failed, Finished, Request
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError, GenerationError
from rapid_integrations.evaluation.progress import answering_progress
from rapid_integrations.evaluation.report import machine, package_versions
from rapid_integrations.evaluation.tables import NOTHING

SELF = "self"
_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of each prompt's end that is its own: what stands before is the document that all of a batch share.
_QUESTION_TOKENS = 16
# A buffer that no cache holds, copied so often.
_COPIED_BYTES, _COPIES = 2**28, 9
_WIDTH = 120
_GENERATE, _PLAIN, _DRAFTED = "generate()", "ours, plain", "ours, η = 0"


@dataclass(frozen=True, slots=True)
class ShapePlan:
    """What ``rapid bench-shape`` was asked to measure.

    Attributes:
        target: A shape's name, a folder or a hub id.
        drafter: The same, or ``"self"``: the target's own weights, on the short prompt.
        context: Tokens of the target's prompts.
        drafter_context: Tokens of the drafter's prompts.
        batches: Numbers of requests at once.
        acceptances: Chances that a drafted token stands, given that those before it do.
        num_new_tokens: Tokens of each answer.
        num_draft_tokens: gamma; ``None`` is chosen every round.
        repeats: How often everything is measured.
        dtype: Of the weights; ``None`` is bfloat16 on an accelerator and float32 on a CPU.
        kv_dtype: What the engine holds keys and values in; ``None``: what the models compute in.
        cuda_graph_tokens: As in :class:`EngineLimits`.
        seed: Of weights, prompts and answers.
    """

    target: str
    drafter: str
    context: int
    drafter_context: int
    batches: tuple[int, ...]
    acceptances: tuple[float, ...]
    num_new_tokens: int = 128
    num_draft_tokens: int | None = None
    repeats: int = 3
    dtype: str | None = None
    kv_dtype: str | None = None
    cuda_graph_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if bad := [chance for chance in self.acceptances if not 0 <= chance <= 1]:
            raise ConfigurationError(f"the acceptance {bad[0]} is not allowed: it is a chance, from 0 to 1.")
        if self.num_draft_tokens == 0:
            raise ConfigurationError("num_draft_tokens=0 is plain decoding, which is measured anyway.")
        for name in ("context", "drafter_context"):
            if getattr(self, name) <= _QUESTION_TOKENS:
                raise ConfigurationError(
                    f"{name}={getattr(self, name)} is too short: the question alone has {_QUESTION_TOKENS} "
                    "tokens."
                )
        if self.num_new_tokens < 2 or self.repeats < 1 or min(self.batches, default=0) < 1:
            raise ConfigurationError(
                f"num_new_tokens={self.num_new_tokens} must be at least 2, repeats={self.repeats} and every "
                f"one of batches={list(self.batches)} at least 1."
            )
        if self.dtype not in _DTYPES:
            raise ConfigurationError(
                f"dtype={self.dtype!r} is not allowed: it must be one of "
                f"{', '.join(name for name in _DTYPES if name)}, or None."
            )


@dataclass(frozen=True, slots=True)
class ShapeRun:
    """One measurement: so many requests at once, their prompts read before.

    Attributes:
        wall_s: From the first request to the last token.
        stats: Counts and times of all requests, summed; times of shared passes once for each.
    """

    wall_s: float
    stats: RapidStats

    @property
    def tokens_per_s(self) -> float:
        """Of all requests together."""
        return self.stats.completion_tokens / self.wall_s


@dataclass(frozen=True, slots=True)
class ShapeCell:
    """One way to decode a batch.

    Attributes:
        method: ``generate()``, plain or drafted.
        batch: How many requests at once.
        acceptance: The chance that was set; ``None`` where nothing is drafted.
        runs: One per repetition.
    """

    method: str
    batch: int
    acceptance: float | None
    runs: tuple[ShapeRun, ...]

    @property
    def stats(self) -> RapidStats:
        """Of all runs, summed."""
        return RapidStats.pooled(run.stats for run in self.runs)

    @property
    def tokens_per_s(self) -> Spread:
        """Of all requests together."""
        spread = Spread.of(run.tokens_per_s for run in self.runs)
        assert spread is not None
        return spread


@dataclass(frozen=True, slots=True)
class ShapeReport:
    """What was found.

    Attributes:
        cells: In the order of the table.
        prefill_tokens_per_s: Of target and drafter, reading a prompt that nobody has read.
        step_bytes: The least that a plain target pass reads: the weights, and one document's keys and values.
        copy_bytes_per_s: Bytes that the device reads and writes when it copies.
        settings: The plan.
        hardware: The machine.
        versions: Of packages.
    """

    cells: tuple[ShapeCell, ...]
    prefill_tokens_per_s: dict[str, Spread]
    step_bytes: int
    copy_bytes_per_s: float
    settings: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, str]

    def beside(self, cell: ShapeCell, method: str) -> ShapeCell | None:
        """What another method made of the same batch."""
        return next((c for c in self.cells if (c.method, c.batch) == (method, cell.batch)), None)

    def bandwidth_share(self, cell: ShapeCell) -> float | None:
        """How much of the copying speed a plain pass reaches; ``None`` for what drafts, or is not ours."""
        if cell.method != _PLAIN:
            return None
        return self.step_bytes / (cell.stats.verify_s / cell.stats.rounds) / self.copy_bytes_per_s

    def bound(self, cell: ShapeCell) -> SpeedBound | None:
        """The bound on speculation; only for requests that were alone."""
        plain = self.beside(cell, _PLAIN)
        if cell.batch > 1 or cell.acceptance is None or plain is None:
            return None
        return SpeedBound.of(cell.stats, plain.stats)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        found = dataclasses.asdict(self)
        for stored, cell in zip(found["cells"], self.cells, strict=True):
            bound = self.bound(cell)
            stored["tokens_per_s"] = dataclasses.asdict(cell.tokens_per_s)
            stored["bound"] = bound and {**dataclasses.asdict(bound), "share": bound.share}
            stored["bandwidth_share"] = self.bandwidth_share(cell)
        return found


def run_shape_bench(plan: ShapePlan, *, json_file: Path | None = None) -> ShapeReport:
    """Measure; progress goes to stderr, tables to stdout, everything to the file.

    Raises:
        ConfigurationError: A shape cannot be loaded, or a context does not fit it.
        RapidError: The models do not fit each other or the engine.
        OSError: The file cannot be written.
    """
    console = table_console(_WIDTH)
    with ShapeBench(plan) as bench, answering_progress(Console(stderr=True)) as progress:
        bar = progress.add_task("warming up", total=bench.num_runs)
        report = bench.measure(lambda label: progress.update(bar, advance=1, description=label))
    for table in shape_tables(report):
        console.print(table)
        console.print()
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    return report


class ShapeBench:
    """Loads models with random weights, and measures.

    Args:
        plan: What to measure.

    Raises:
        ConfigurationError: A shape cannot be loaded, or a context does not fit it.
        RapidError: The models do not fit each other or the engine.
    """

    def __init__(self, plan: ShapePlan) -> None:
        self.plan = plan
        accelerated = torch.accelerator.is_available()
        device = torch.accelerator.current_accelerator() if accelerated else None
        self._device = device or torch.device("cpu")
        self._dtype = _DTYPES[plan.dtype] or (torch.bfloat16 if accelerated else torch.float32)
        torch.manual_seed(plan.seed)
        target_config = load_shape(plan.target)
        drafter_config = target_config if plan.drafter == SELF else load_shape(plan.drafter)
        for config, tokens in ((target_config, plan.context), (drafter_config, plan.drafter_context)):
            _check_window(config, tokens + plan.num_new_tokens)
        model = dummy_model(target_config, dtype=self._dtype, device=self._device)
        self._target = ScriptedModel(model, name=plan.target, kv_dtype=plan.kv_dtype)
        if plan.drafter != SELF:
            model = dummy_model(drafter_config, dtype=self._dtype, device=self._device)
        self._drafter = ScriptedModel(model, name=plan.drafter, kv_dtype=plan.kv_dtype)
        # The KV of all prompts stays, so that decoding can be measured alone.
        limits = EngineLimits(
            max_active_requests=max(plan.batches),
            prefix_cache_bytes=2**62,
            cuda_graph_tokens=plan.cuda_graph_tokens,
        )
        self._engine = Engine(self._target, self._drafter, limits=limits)
        self._answer = random_script(self._engine.vocab_size, plan.num_new_tokens, plan.seed)
        self._target.script = Script(self._answer, plan.context)
        self._acceptance_draws = random.Random(f"acceptance/{plan.seed}")
        self._requests = [self._request(index) for index in range(max(plan.batches))]
        self._step_bytes = self._count_step_bytes()

    def __enter__(self) -> ShapeBench:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    @property
    def num_runs(self) -> int:
        """How often progress is told."""
        plan = self.plan
        ways = len(plan.batches) * (1 + len(plan.acceptances))
        return plan.repeats + ways * (plan.repeats + 1) + plan.repeats + 1

    def measure(self, on_run: Callable[[str], None]) -> ShapeReport:
        """Measure everything.

        Args:
            on_run: Called before each run, with what it is.
        """
        prefill = self._measure_prefill(on_run)
        cells = [cell for batch in self.plan.batches for cell in self._measure_batch(batch, on_run)]
        self._engine.prefix_cache.clear()
        cells.append(self._measure_generate(on_run))
        cells.sort(key=lambda cell: cell.batch)
        return ShapeReport(
            cells=tuple(cells),
            prefill_tokens_per_s=prefill,
            step_bytes=self._step_bytes,
            copy_bytes_per_s=_copy_bytes_per_s(self._device),
            settings=dataclasses.asdict(self.plan),
            hardware={**machine(), **hardware(), "dtype": str(self._dtype).removeprefix("torch.")},
            versions=package_versions(),
        )

    def _request(self, index: int) -> Request:
        """A question of its own about the document that all share."""
        plan, vocabulary = self.plan, self._engine.vocab_size
        question = random_prompt(vocabulary, _QUESTION_TOKENS, f"{plan.seed}/{index}")

        def prompt(tokens: int) -> list[int]:
            return random_prompt(vocabulary, tokens - _QUESTION_TOKENS, str(plan.seed)) + question

        return Request(
            prompt(plan.context),
            prompt(plan.drafter_context),
            SamplingParams(max_new_tokens=plan.num_new_tokens, ignore_eos=True),
            SpeculationParams(acceptance="lossless", num_draft_tokens=plan.num_draft_tokens),
        )

    def _run(self, batch: int, acceptance: float | None) -> ShapeRun:
        """Answer a batch of requests; ``None`` does so plainly."""
        requests = self._requests[:batch]
        if acceptance is None:
            requests = [dataclasses.replace(request, drafter_tokens=None) for request in requests]
        else:
            self._drafter.script = Script(
                self._answer, self.plan.drafter_context, acceptance, self._acceptance_draws
            )
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        started = time.perf_counter()
        for request in requests:
            self._engine.submit(request, events.put)
        finished: list[RapidStats] = []
        while len(finished) < batch:
            match events.get():
                case Finished(stats=stats):
                    finished.append(stats)
                case Failed(error):
                    raise error
        wall_s = time.perf_counter() - started
        if any(stats.completion_tokens != self.plan.num_new_tokens for stats in finished):
            raise GenerationError("a request did not answer with all of its tokens.")
        return ShapeRun(wall_s, RapidStats.pooled(finished))

    def _measure_prefill(self, on_run: Callable[[str], None]) -> dict[str, Spread]:
        """Read a prompt anew, plainly, and then the drafter's, the target's being known."""
        rates: dict[str, list[float]] = {"target": [], "drafter": []}
        # The engine remembers of equal prompts what their end told it: here, so that all repeats read alike.
        self._run(1, 1.0)
        for _ in range(self.plan.repeats):
            on_run("prefill")
            self._engine.prefix_cache.clear()
            for name, acceptance in (("target", None), ("drafter", 1.0)):
                stats = self._run(1, acceptance).stats
                read = stats.prompt_tokens - stats.reused_prefix_tokens
                read += stats.drafter_prompt_tokens - stats.reused_drafter_prefix_tokens
                rates[name].append(read / stats.prefill_s)
        spreads = {name: Spread.of(found) for name, found in rates.items()}
        return {name: spread for name, spread in spreads.items() if spread is not None}

    def _measure_batch(self, batch: int, on_run: Callable[[str], None]) -> list[ShapeCell]:
        ways = (None, *self.plan.acceptances)
        runs: dict[float | None, list[ShapeRun]] = {way: [] for way in ways}
        for repeat in range(-1, self.plan.repeats):
            # Each time another one begins; the first of all does not count: it reads what is new.
            turn = repeat % len(ways)
            for way in (*ways[turn:], *ways[:turn]):
                on_run(f"{batch} at once, " + ("plain" if way is None else f"acceptance {way:g}"))
                run = self._run(batch, way)
                if repeat >= 0:
                    runs[way].append(run)
        return [
            ShapeCell(_PLAIN if way is None else _DRAFTED, batch, way, tuple(found))
            for way, found in runs.items()
        ]

    @torch.inference_mode()
    def _measure_generate(self, on_run: Callable[[str], None]) -> ShapeCell:
        """One request by transformers alone: for each further one it would copy the document's KV."""
        reader = CachedModel(self._target.model)
        rows = [list(self._requests[0].target_tokens)]
        ids = torch.tensor(rows, device=self._device)
        mask = torch.ones_like(ids)
        runs = []
        for repeat in range(-1, self.plan.repeats):
            on_run(f"{_GENERATE}, one at a time")
            reader.prefill(rows, mask)
            started = time.perf_counter()
            output: Tensor = self._target.model.generate(
                ids,
                attention_mask=mask,
                cache=reader.cache,
                do_sample=False,
                min_new_tokens=self.plan.num_new_tokens,
                max_new_tokens=self.plan.num_new_tokens,
                pad_token_id=0,
            )
            synchronize(self._device)
            wall_s = time.perf_counter() - started
            reader.discard_answer()
            if repeat >= 0:
                tokens = output.shape[1] - ids.shape[1]
                stats = RapidStats(completion_tokens=tokens, rounds=tokens, decode_s=wall_s)
                runs.append(ShapeRun(wall_s, stats))
        return ShapeCell(_GENERATE, 1, None, tuple(runs))

    def _count_step_bytes(self) -> int:
        model = self._target.model
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        weights = sum(int(parameter.nbytes) for parameter in model.parameters())
        if head is not embeddings:  # of the embeddings a pass reads a row a token
            weights -= int(embeddings.nbytes)
        config = model.config.get_text_config(decoder=True)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        window = min(self.plan.context, getattr(config, "sliding_window", None) or self.plan.context)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        tokens = sum(window if kind == "sliding_attention" else self.plan.context for kind in kinds)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        held_in = self._target.kv_dtype or self._dtype
        return weights + 2 * tokens * int(heads * head_dim) * held_in.itemsize


def shape_tables(report: ShapeReport) -> Iterator[Table]:
    """What was found, for the terminal."""
    plan = report.settings
    device = report.hardware.get("device_name", report.hardware["device"])
    reading = make_table(
        f"Random weights, {report.hardware['dtype']}, {device}: prefill",
        "model", "shape", "tokens", "tokens/s", "runs",
    )  # fmt: skip
    for name in ("target", "drafter"):
        tokens = plan["context" if name == "target" else "drafter_context"]
        spread = report.prefill_tokens_per_s[name]
        reading.add_row(name, plan[name], f"{tokens:,}", spread_label(spread, 0), str(spread.count))
    yield reading
    decoding = make_table(
        f"Decoding behind {plan['context']:,} tokens; a plain pass reads {report.step_bytes / 1e9:.2f} GB, "
        f"copying takes {report.copy_bytes_per_s / 1e9:,.0f} GB/s",
        "batch", "method", "α set", "α", "tokens/s", "× plain", "× generate()", "draft ms", "target ms",
        "bandwidth", "bound", "share",
    )  # fmt: skip
    for batch, cells in itertools.groupby(report.cells, lambda cell: cell.batch):
        for row, cell in enumerate(cells):
            decoding.add_row("" if row else str(batch), *_decoding_row(report, cell))
    yield decoding


def _decoding_row(report: ShapeReport, cell: ShapeCell) -> Iterator[str]:
    stats, bound, share = cell.stats, report.bound(cell), report.bandwidth_share(cell)
    yield cell.method
    yield NOTHING if cell.acceptance is None else f"{cell.acceptance:g}"
    yield f"{_alpha(stats):.2f}" if stats.drafted_tokens else NOTHING
    yield spread_label(cell.tokens_per_s, 1)
    for method in (_PLAIN, _GENERATE):
        other = report.beside(cell, method)
        yield NOTHING if other is None else f"{cell.tokens_per_s.median / other.tokens_per_s.median:.2f}"
    yield f"{stats.draft_s / stats.drafter_passes * 1e3:.2f}" if stats.drafter_passes else NOTHING
    yield f"{(stats.verify_s or stats.decode_s) / stats.rounds * 1e3:.2f}"
    yield NOTHING if share is None else f"{share * 100:.0f} %"
    yield NOTHING if bound is None else f"{bound.speed_up:.2f}"
    yield NOTHING if bound is None else f"{bound.share * 100:.0f} %"


def _alpha(stats: RapidStats) -> float:
    return conditional_acceptance(stats.accepted_tokens / stats.rounds, stats.drafted_tokens / stats.rounds)


def _check_window(config: Any, tokens: int) -> None:
    window = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if window and tokens > window:
        raise ConfigurationError(
            f"{tokens:,} tokens of prompt and answer are more than the {window:,} that the shape reads: give "
            "a shorter --context or --drafter-context, or fewer --new-tokens."
        )


def _copy_bytes_per_s(device: torch.device) -> float:
    """How fast the device copies, reading and writing counted: the median of several copies."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    seconds = []
    for _ in range(_COPIES):
        synchronize(device)
        started = time.perf_counter()
        copy.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * _COPIED_BYTES / statistics.median(seconds)
