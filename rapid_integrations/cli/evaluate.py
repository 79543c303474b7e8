"""``rapid eval``: accuracy, acceptance and speed of several methods on long documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from rapid_integrations.cli.ask import ASK_TEMPLATE
from rapid_integrations.cli.options import AnswerOptions, SeedOption
from rapid_integrations.cli.parsing import check_writable, parse_contexts, parse_names, parse_retrievals

# The longest answers in the demo language have half of this.
EVALUATION_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(AnswerOptions):
    """The options of ``rapid eval``."""

    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated, of lc, rag, sd, streaming, rapid, rapid-fixed, rapid-paper, mixture and "
            "generate."
        ),
    ] = "lc,rag,sd,rapid"
    task: Annotated[
        Literal["demo", "ruler", "infinitebench", "longbench-v2"] | None,
        typer.Option(
            help="The questions: generated documents in the demo language (default), RULER's generated "
            "tasks, ∞Bench or LongBench v2."
        ),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Without --task: your own questions, one JSON object per line, with document or "
            "document_file, question, and answer or answers. With a benchmark: its file or folder; by "
            "default it is fetched from the hub.",
        ),
    ] = None
    metric: Annotated[
        str | None,
        typer.Option(
            help="Metric for your own questions: exact (default), squad-exact, f1, contains, contains-all, "
            "choice, stated-choice, rouge-l or rouge-lsum."
        ),
    ] = None
    prompt_template: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The prompt of your own questions: {context} and then {question}."),
    ] = None
    subsets: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Comma-separated. Demo: documents of the domains handbook (default), legal, medical and "
            "financial. RULER: single, multi-key, multi-value, multi-query, variable-tracking and "
            "common-words. ∞Bench: en.qa, en.mc, en.sum. Default: all.",
        ),
    ] = None
    cot: Annotated[bool, typer.Option("--cot", help="LongBench v2 with chain of thought.")] = False
    contexts: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated lengths in tokens: of the demo's documents and of RULER's prompts with "
            "their answers (default: 1k,4k,8k,16k), or limits for a benchmark's prompts (default: the "
            "target's window)."
        ),
    ] = None
    questions: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Questions of each subset at each length. Default: 50, or all if they come from files.",
        ),
    ] = None
    retrieval: Annotated[
        str,
        typer.Option(
            help="What the drafter reads: retrieved passages (natural), including the right ones (gold), "
            "without them (missing), passages of another document (unrelated), or a contradicting passage "
            "instead of the right ones (adversarial). Several, comma-separated, are measured side by side."
        ),
    ] = "natural"
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="Measure with each of these comma-separated values of an option: transfer_strength, "
            "adaptive_transfer, acceptance, mixture_weight, tail_rule, num_draft_tokens, "
            "retrieval_max_tokens, retrieval_chunk_tokens, retriever (bm25,dense) and others. If given "
            "several times: with every combination.",
        ),
    ] = None
    match_acceptance: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="Tune the others of rapid, rapid-fixed, rapid-paper (transfer strength) and mixture "
            "(weight) until their acceptance equals this method's, on generated questions of another seed.",
        ),
    ] = None
    seed: SeedOption = 0
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results and every answer here.")
    ] = None
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write every answer to this folder as soon as it is complete, and at the end the results "
            "and a web page (report.html). The same command continues an interrupted run.",
        ),
    ] = None


def evaluate(options: EvaluateOptions) -> None:
    """Measure accuracy, acceptance and speed of several methods on long documents."""
    max_new_tokens = options.max_new_tokens
    generation = options.generation(
        max_new_tokens=EVALUATION_TOKENS if max_new_tokens is None else max_new_tokens
    )
    options.check_retriever()
    check_writable(options.json_file)
    lengths = None if options.contexts is None else tuple(parse_contexts(options.contexts))
    retrievals = parse_retrievals(options.retrieval)
    from rapid_integrations.model_choice import quiet_libraries

    with quiet_libraries():
        from rapid_integrations.demo import PROMPT_TEMPLATE
        from rapid_integrations.evaluation.command import EvaluationPlan
        from rapid_integrations.evaluation.methods.settings import parse_sweeps
        from rapid_integrations.evaluation.results.journal import make_folder
        from rapid_integrations.evaluation.tasks.choice import TaskChoice

        choice = TaskChoice(
            task=options.task,
            data=options.data,
            metric=options.metric,
            prompt_template=options.prompt_template,
            subsets=None if options.subsets is None else parse_names(options.subsets),
            cot=options.cot,
            contexts=lengths,
            questions=options.questions,
            max_new_tokens=max_new_tokens,
            seed=options.seed,
            retrievals=retrievals,
        )
        template = PROMPT_TEMPLATE if options.target is None else ASK_TEMPLATE
        fixed = [*generation, *(["retriever"] if options.retriever else [])]
        plan = EvaluationPlan(
            methods=[name.strip() for name in options.methods.split(",")],
            source=choice.source(default_template=template),
            retrievals=retrievals,
            sweep=parse_sweeps(options.sweep or (), fixed=fixed),
            embeddings=options.embeddings,
            report_folder=options.report,
            match_acceptance=options.match_acceptance,
        )
        if options.report is not None:
            make_folder(options.report)
        plan.run(options.load_pipeline(generation), options.json_file)
