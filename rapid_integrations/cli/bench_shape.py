"""``rapid bench-shape``: how fast models of a shape would be on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rapid_integrations.cli.options import DraftTokensOption, KvDtypeOption
from rapid_integrations.cli.parsing import (
    check_writable,
    parse_batches,
    parse_context,
    parse_draft_tokens,
    parse_probabilities,
)


@dataclass(frozen=True, kw_only=True)
class BenchShapeOptions:
    """The options of ``rapid bench-shape``."""

    target: Annotated[
        str,
        typer.Option(
            metavar="SHAPE", help="llama-3.1-8b, llama-3.2-1b, or a folder or hub id with a config.json."
        ),
    ]
    drafter: Annotated[
        str, typer.Option(metavar="SHAPE", help="The same, or 'self': the target's weights.")
    ] = "self"
    context: Annotated[str, typer.Option(help="Tokens of the target's prompts.")] = "8k"
    drafter_context: Annotated[
        str | None,
        typer.Option(help="Tokens of the drafter's prompts. Default: a 24th of the context, at least 256."),
    ] = None
    batches: Annotated[str, typer.Option(help="Comma-separated numbers of concurrent requests.")] = "1,4,8"
    acceptances: Annotated[
        str, typer.Option(help="Comma-separated probabilities that a draft token is accepted.")
    ] = "0.8,0.9,0.95"
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 128
    num_draft_tokens: DraftTokensOption = None
    repeats: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 3
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number format of the weights. Default: bfloat16 on an accelerator, float32 on a CPU."
        ),
    ] = None
    kv_dtype: KvDtypeOption = None
    cuda_graph_tokens: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            help="Replay the drafter's short passes as CUDA graphs for contexts up to this length, at least "
            "1024. Default: no graphs.",
        ),
    ] = 0
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same weights and prompts.")] = 0
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results and every run here.")
    ] = None


def bench_shape(options: BenchShapeOptions) -> None:
    """Measure how fast models of a shape would be on this machine, with random weights.

    Only a configuration is downloaded. Acceptance is set; everything else is measured: prefill, plain passes
    and their share of the memory's speed, drafting, verification, the bound, and generate().
    """
    check_writable(options.json_file)
    length = parse_context("context", options.context)
    if options.drafter_context is None:
        drafter_length = max(256, length // 24)
    else:
        drafter_length = parse_context("drafter-context", options.drafter_context)
    from rapid_integrations.model_choice import quiet_libraries

    draft_tokens = options.num_draft_tokens
    with quiet_libraries():
        from rapid_integrations.benchmark.shapes.command import run_shape_bench
        from rapid_integrations.benchmark.shapes.plan import ShapePlan

        plan = ShapePlan(
            target=options.target,
            drafter=options.drafter,
            context=length,
            drafter_context=drafter_length,
            batches=parse_batches(options.batches),
            acceptances=parse_probabilities("acceptances", options.acceptances),
            num_new_tokens=options.new_tokens,
            num_draft_tokens=None if draft_tokens is None else parse_draft_tokens(draft_tokens),
            repeats=options.repeats,
            dtype=options.dtype,
            kv_dtype=options.kv_dtype,
            cuda_graph_tokens=options.cuda_graph_tokens,
            seed=options.seed,
        )
        run_shape_bench(plan, json_file=options.json_file)
