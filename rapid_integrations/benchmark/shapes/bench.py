"""Measures models of a shape: their prefill, and decoding by the engine and by transformers.

Everything runs in one process. The engine decodes plainly and with each acceptance in turn, then
``generate()`` runs on the same weights.
"""

from __future__ import annotations

import dataclasses
import queue
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from rapid_integrations.benchmark.memory import synchronize
from rapid_integrations.benchmark.processes import hardware
from rapid_integrations.benchmark.results import Spread
from rapid_integrations.benchmark.shapes.models import (
    Script,
    ScriptedModel,
    dummy_model,
    load_shape,
    random_prompt,
    random_script,
)
from rapid_integrations.benchmark.shapes.plan import DTYPES, QUESTION_TOKENS, SELF, ShapePlan
from rapid_integrations.benchmark.shapes.report import (
    DRAFTED,
    GENERATE,
    PLAIN,
    ShapeCell,
    ShapeReport,
    ShapeRun,
)
from rapid_integrations.benchmark.transformers_runtime import CachedModel
from rapid_integrations.config import EngineLimits, SamplingParams, SpeculationParams
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.requests import Event, Failed, Finished, Request
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError, GenerationError
from rapid_integrations.evaluation.results.environment import machine, package_versions

# The copied buffer is larger than any processor's cache.
_COPIED_BYTES, _COPIES = 2**28, 9


class ShapeBench:
    """The engine with models of random weights, and the measurements on them.

    Args:
        plan: The work to measure.

    Raises:
        ConfigurationError: A shape cannot be loaded, or a context is longer than the shape allows.
        RapidError: The models are not compatible with each other or with the engine.
    """

    def __init__(self, plan: ShapePlan) -> None:
        self.plan = plan
        accelerated = torch.accelerator.is_available()
        device = torch.accelerator.current_accelerator() if accelerated else None
        self._device = device or torch.device("cpu")
        self._dtype = DTYPES[plan.dtype] or (torch.bfloat16 if accelerated else torch.float32)
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
        # The cache holds the keys and values of all prompts, so that decoding can be measured alone.
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
        """The number of calls of ``on_run`` by :meth:`measure`."""
        plan = self.plan
        num_cells = len(plan.batches) * (1 + len(plan.acceptances))
        return plan.repeats + num_cells * (plan.repeats + 1) + plan.repeats + 1

    def measure(self, on_run: Callable[[str], None]) -> ShapeReport:
        """Measure the whole plan.

        Args:
            on_run: Called before each run with a short description of it.
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
        """A request. All requests share the document; each has another question."""
        plan, vocabulary = self.plan, self._engine.vocab_size
        question = random_prompt(vocabulary, QUESTION_TOKENS, f"{plan.seed}/{index}")

        def prompt(tokens: int) -> list[int]:
            return random_prompt(vocabulary, tokens - QUESTION_TOKENS, str(plan.seed)) + question

        return Request(
            prompt(plan.context),
            prompt(plan.drafter_context),
            SamplingParams(max_new_tokens=plan.num_new_tokens, ignore_eos=True),
            SpeculationParams(acceptance="lossless", num_draft_tokens=plan.num_draft_tokens),
        )

    def _run(self, batch: int, acceptance: float | None) -> ShapeRun:
        """Decode a batch of requests, plainly if ``acceptance`` is ``None``."""
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
        all_stats: list[RapidStats] = []
        while len(all_stats) < batch:
            match events.get():
                case Finished(stats=stats):
                    all_stats.append(stats)
                case Failed(error):
                    raise error
        wall_s = time.perf_counter() - started
        if any(stats.completion_tokens != self.plan.num_new_tokens for stats in all_stats):
            raise GenerationError(
                "an answer is shorter than num_new_tokens: this is a fault of the benchmark."
            )
        return ShapeRun(wall_s, RapidStats.pooled(all_stats))

    def _measure_prefill(self, on_run: Callable[[str], None]) -> dict[str, Spread]:
        """Measure the target's prefill with empty caches, then the drafter's alone."""
        rates: dict[str, list[float]] = {"target": [], "drafter": []}
        # The engine stores the question agreement of known prompts. Without this run, only the first
        # repetition would compute it.
        self._run(1, 1.0)
        for _ in range(self.plan.repeats):
            on_run("prefill")
            self._engine.prefix_cache.clear()
            for name, acceptance in (("target", None), ("drafter", 1.0)):
                stats = self._run(1, acceptance).stats
                tokens_read = stats.prompt_tokens - stats.reused_prefix_tokens
                tokens_read += stats.drafter_prompt_tokens - stats.reused_drafter_prefix_tokens
                rates[name].append(tokens_read / stats.prefill_s)
        spreads = {name: Spread.of(values) for name, values in rates.items()}
        return {name: spread for name, spread in spreads.items() if spread is not None}

    def _measure_batch(self, batch: int, on_run: Callable[[str], None]) -> list[ShapeCell]:
        acceptances = (None, *self.plan.acceptances)
        runs: dict[float | None, list[ShapeRun]] = {acceptance: [] for acceptance in acceptances}
        for repeat in range(-1, self.plan.repeats):
            # Each repetition starts with a different acceptance. The first one fills the caches and is not
            # counted.
            first = repeat % len(acceptances)
            for acceptance in (*acceptances[first:], *acceptances[:first]):
                on_run(
                    f"{batch} at once, " + ("plain" if acceptance is None else f"acceptance {acceptance:g}")
                )
                run = self._run(batch, acceptance)
                if repeat >= 0:
                    runs[acceptance].append(run)
        return [
            ShapeCell(PLAIN if acceptance is None else DRAFTED, batch, acceptance, tuple(measured))
            for acceptance, measured in runs.items()
        ]

    @torch.inference_mode()
    def _measure_generate(self, on_run: Callable[[str], None]) -> ShapeCell:
        """Measure one request by transformers, which copies keys and values for each request of a batch."""
        model = CachedModel(self._target.model)
        rows = [list(self._requests[0].target_tokens)]
        ids = torch.tensor(rows, device=self._device)
        mask = torch.ones_like(ids)
        runs = []
        for repeat in range(-1, self.plan.repeats):
            on_run(f"{GENERATE}, one at a time")
            model.prefill(rows, mask)
            started = time.perf_counter()
            output: Tensor = self._target.model.generate(
                ids,
                attention_mask=mask,
                cache=model.cache,
                do_sample=False,
                min_new_tokens=self.plan.num_new_tokens,
                max_new_tokens=self.plan.num_new_tokens,
                pad_token_id=0,
            )
            synchronize(self._device)
            wall_s = time.perf_counter() - started
            model.discard_answer()
            if repeat >= 0:
                tokens = output.shape[1] - ids.shape[1]
                stats = RapidStats(completion_tokens=tokens, rounds=tokens, decode_s=wall_s)
                runs.append(ShapeRun(wall_s, stats))
        return ShapeCell(GENERATE, 1, None, tuple(runs))

    def _count_step_bytes(self) -> int:
        """The minimum of bytes that a plain target pass reads, see :class:`ShapeReport`."""
        model = self._target.model
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        weights = sum(int(parameter.nbytes) for parameter in model.parameters())
        if head is not embeddings:  # a pass reads only one row of the embeddings per token
            weights -= int(embeddings.nbytes)
        config = model.config.get_text_config(decoder=True)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        window = min(self.plan.context, getattr(config, "sliding_window", None) or self.plan.context)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        tokens = sum(window if kind == "sliding_attention" else self.plan.context for kind in kinds)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        kv_dtype = self._target.kv_dtype or self._dtype
        return weights + 2 * tokens * int(heads * head_dim) * kv_dtype.itemsize


def _check_window(config: PreTrainedConfig, tokens: int) -> None:
    window = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if window and tokens > window:
        raise ConfigurationError(
            f"{tokens:,} tokens of prompt and answer are more than the {window:,} that the shape allows: "
            "choose a shorter --context or --drafter-context, or fewer --new-tokens."
        )


def _copy_bytes_per_s(device: torch.device) -> float:
    """The bytes per second that the device reads and writes while it copies: a median."""
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
