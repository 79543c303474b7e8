"""``rapid bench``: speed and memory beside transformers and the frameworks' own classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rapid_integrations.cli.evaluate import EVALUATION_TOKENS
from rapid_integrations.cli.options import ModelOptions, SeedOption, generation_options
from rapid_integrations.cli.parsing import (
    check_writable,
    parse_batches,
    parse_contexts,
    parse_names,
    parse_retrievals,
)
from rapid_integrations.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class BenchOptions(ModelOptions):
    """The options of ``rapid bench``."""

    suite: Annotated[
        str, typer.Option(help="Comma-separated, of prefill, decode, batch, questions and end-to-end.")
    ] = "prefill,decode,batch,questions,end-to-end"
    contexts: Annotated[
        str,
        typer.Option(
            help="Comma-separated lengths of the documents in tokens. batch takes the longest up to 4k, "
            "questions and end-to-end up to 16k."
        ),
    ] = "2k,4k,8k,16k,32k"
    batches: Annotated[
        str, typer.Option(help="Comma-separated numbers of questions that are asked at once.")
    ] = "1,2,4,8"
    repeats: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 5
    cold_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Runs that read a document from scratch are repeated up to this number of tokens in all, "
            "and at least once.",
        ),
    ] = 24_576
    baselines: Annotated[
        str,
        typer.Option(
            "--baselines",
            "--peers",
            help="Comma-separated, of generate, assisted, lookup, plain, lossless, rapid, self, hf-pipeline, "
            "hf-llm, rapid-langchain and rapid-llamaindex. Default: all that the models allow.",
        ),
    ] = ""
    retrieval: Annotated[
        str,
        typer.Option(
            help="What the drafter reads while it decodes, of gold, natural, missing, unrelated and "
            "adversarial. RAPID is measured with each, the other drafting methods with the first."
        ),
    ] = "gold,natural,unrelated"
    seed: SeedOption = 0
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results and every sample here.")
    ] = None
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw PNG files there.")] = None


def bench(options: BenchOptions) -> None:
    """Measure speed and memory beside transformers and the frameworks' own classes, and compare the answers.

    Baselines run in up to three processes, each of which loads the models that it needs.
    """
    if options.num_draft_tokens == "0":
        raise ConfigurationError(
            "--num-draft-tokens 0 is plain decoding, which is one of the --baselines: leave it out."
        )
    max_new_tokens = options.max_new_tokens
    generation = generation_options(
        options.num_draft_tokens,
        transfer_strength=options.transfer_strength,
        adaptive_transfer=options.adaptive_transfer,
        max_new_tokens=EVALUATION_TOKENS if max_new_tokens is None else max_new_tokens,
    )
    options.check_retriever()
    check_writable(options.json_file, options.plot)
    lengths, sizes = parse_contexts(options.contexts), parse_batches(options.batches)
    from rapid_integrations.model_choice import quiet_libraries

    with quiet_libraries():
        from rapid_integrations.benchmark.baselines import choose_baselines
        from rapid_integrations.benchmark.command import run_benchmark
        from rapid_integrations.benchmark.models import ModelChoice
        from rapid_integrations.benchmark.plan import BenchmarkPlan

        models = ModelChoice(
            options.target,
            options.drafter,
            options.embeddings,
            options.dtype,
            generation,
            options.drafter_quantization,
            options.kv_dtype,
            options.gguf_file,
            options.drafter_gguf_file,
        )
        plan = BenchmarkPlan(
            suites=parse_names(options.suite),
            contexts=tuple(lengths),
            batches=sizes,
            repeats=options.repeats,
            cold_tokens=options.cold_tokens,
            baselines=choose_baselines(parse_names(options.baselines), has_drafter=models.has_drafter),
            retrievals=parse_retrievals(options.retrieval),
            seed=options.seed,
        )
        run_benchmark(plan, models, json_file=options.json_file, plot_folder=options.plot)
