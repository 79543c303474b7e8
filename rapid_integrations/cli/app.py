"""The command line: ``rapid demo``, ``ask``, ``eval``, ``bench`` and ``bench-shape``.

Results go to stdout, progress and errors to stderr. Exit codes: 0; 2 for input that cannot be used, with one
line that says why; 1 for a failure while answering, in one line too; 130 when interrupted. Heavy modules are
imported inside the commands: ``rapid --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rapid_integrations.cli.options import (
    AcceptanceOption,
    AdaptiveOption,
    DrafterOption,
    DrafterQuantizationOption,
    DraftTokensOption,
    DtypeOption,
    EmbeddingsOption,
    KvDtypeOption,
    MaxNewTokensOption,
    MixtureOption,
    PrefixCacheDirOption,
    RetrieverName,
    RetrieverOption,
    StrengthOption,
    TargetOption,
    TaskName,
    check_writable,
    parse_batches,
    parse_chances,
    parse_context,
    parse_contexts,
    parse_draft_tokens,
    parse_names,
    parse_retrievals,
)
from rapid_integrations.errors import (
    ConfigurationError,
    DeadlineExceededError,
    EngineClosedError,
    GenerationError,
    PromptError,
    QueueFullError,
    RapidError,
)
from rapid_integrations.model_choice import load_pipeline, quiet_libraries

if TYPE_CHECKING:
    from rapid_integrations.pipeline import RapidPipeline

_FAILED, _UNUSABLE, _INTERRUPTED = 1, 2, 130
# Failures while answering; every other RapidError says that the input cannot be used.
_RUNTIME_ERRORS = (GenerationError, EngineClosedError, QueueFullError, DeadlineExceededError)

# The demo language's longest answers have half of this.
_EVALUATION_TOKENS = 128

ASK_TEMPLATE = "{context}\n\nUsing the text above, answer the question.\nQuestion: {question}\nAnswer:"


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Answers over whole long documents from local models, fast (RAPID).",
)


@app.callback(invoke_without_command=True)
def rapid(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Answers over whole long documents from local models, fast (RAPID)."""
    if version:
        import rapid_integrations

        typer.echo(f"rapid {rapid_integrations.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    questions: Annotated[int, typer.Option(min=1, max=10, help="How many questions to ask.")] = 6,
) -> None:
    """Ask the bundled pair about a long document and compare RAPID with other ways to answer."""
    from rapid_integrations.evaluation.showcase import show

    with quiet_libraries():
        show(questions)


@app.command()
def ask(
    document: Annotated[Path, typer.Option(help="A text, Markdown or PDF file.")],
    question: Annotated[str, typer.Option(help="The question to answer from it.")],
    target: TargetOption = None,
    drafter: DrafterOption = None,
    retriever: RetrieverOption = None,
    embeddings: EmbeddingsOption = None,
    acceptance: AcceptanceOption = None,
    transfer_strength: StrengthOption = None,
    adaptive_transfer: AdaptiveOption = None,
    mixture_weight: MixtureOption = None,
    num_draft_tokens: DraftTokensOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampled answers repeatable.")] = None,
    drafter_quantization: DrafterQuantizationOption = None,
    dtype: DtypeOption = None,
    kv_dtype: KvDtypeOption = None,
    prefix_cache_dir: PrefixCacheDirOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Answer one question about a document."""
    import logging

    from rapid_integrations.retrieval.document_files import read_document

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what matters comes as an error
    if not question.strip():
        raise PromptError("the question is empty: ask something with --question.")
    options = _options(
        acceptance=acceptance,
        transfer_strength=transfer_strength,
        adaptive_transfer=adaptive_transfer,
        mixture_weight=mixture_weight,
        num_draft_tokens=num_draft_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    embeddings = _embeddings(retriever, embeddings)
    text = read_document(document)
    with quiet_libraries():
        pipeline = load_pipeline(
            target,
            drafter,
            options,
            embeddings=embeddings,
            dtype=dtype,
            limits={"prefix_cache_dir": prefix_cache_dir},
            drafter_quantization_config=drafter_quantization,
            kv_dtype=kv_dtype,
        )
        _ask(pipeline, text, question.strip(), demo_pair=target is None, as_json=as_json)


@app.command(name="eval")
def evaluate(
    methods: Annotated[
        str,
        typer.Option(
            help="Of lc, rag, sd, streaming, rapid, rapid-fixed, rapid-paper, mixture and generate, with "
            "commas between."
        ),
    ] = "lc,rag,sd,rapid",
    task: Annotated[
        TaskName | None,
        typer.Option(
            help="What is asked: generated documents in the demo language (default), RULER's generated "
            "tasks, ∞Bench or LongBench v2."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Without --task: your own questions, one JSON object a line, with document or "
            "document_file, question, and answer or answers. With a benchmark: its file or folder, else it "
            "is fetched from the hub.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="What judges the answers to your own questions: exact (default), squad-exact, f1, contains, "
            "contains-all, choice, stated-choice, rouge-l or rouge-lsum."
        ),
    ] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The prompt of your own questions: {context} and then {question}."),
    ] = None,
    subsets: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="With commas between. Demo: documents of the domains handbook (default), legal, medical and "
            "financial. RULER: single, multi-key, multi-value, multi-query, variable-tracking and "
            "common-words. ∞Bench: en.qa, en.mc, en.sum. Default: all.",
        ),
    ] = None,
    cot: Annotated[bool, typer.Option("--cot", help="LongBench v2 with chain of thought.")] = False,
    contexts: Annotated[
        str | None,
        typer.Option(
            help="Lengths in tokens, with commas between: of the demo's documents and of RULER's prompts "
            "with their answers (default: 1k,4k,8k,16k), or to cut a benchmark's prompts to (default: what "
            "the target reads)."
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Questions of each subset at each length. Default: 50, or all where they come from files.",
        ),
    ] = None,
    retrieval: Annotated[
        str,
        typer.Option(
            help="What the drafter reads: what the retriever finds (natural); with the right passages "
            "(gold); without them (missing); passages of another document (unrelated); one that says "
            "otherwise in the place of the right ones (adversarial). Several, with commas between, are "
            "measured side by side."
        ),
    ] = "natural",
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="Measure with each of these values, with commas between, of an option: transfer_strength, "
            "adaptive_transfer, acceptance, mixture_weight, tail_rule, num_draft_tokens, "
            "retrieval_max_tokens, retrieval_chunk_tokens, retriever (bm25,dense) and others. Given several "
            "times: with every combination.",
        ),
    ] = None,
    match_acceptance: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="Tune the others of rapid, rapid-fixed, rapid-paper (transfer strength) and mixture "
            "(weight) until they accept as many drafted tokens as this method, on generated questions of "
            "another seed.",
        ),
    ] = None,
    target: TargetOption = None,
    drafter: DrafterOption = None,
    retriever: RetrieverOption = None,
    embeddings: EmbeddingsOption = None,
    acceptance: AcceptanceOption = None,
    transfer_strength: StrengthOption = None,
    adaptive_transfer: AdaptiveOption = None,
    mixture_weight: MixtureOption = None,
    num_draft_tokens: DraftTokensOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    drafter_quantization: DrafterQuantizationOption = None,
    dtype: DtypeOption = None,
    kv_dtype: KvDtypeOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same documents and questions.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results and every answer here.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep every answer in this folder as soon as it is there, and the results and a web page "
            "(report.html) at the end. The same command goes on after an interruption.",
        ),
    ] = None,
) -> None:
    """Measure accuracy, acceptance and speed of several methods on long documents."""
    options = _options(
        acceptance=acceptance,
        transfer_strength=transfer_strength,
        adaptive_transfer=adaptive_transfer,
        mixture_weight=mixture_weight,
        num_draft_tokens=num_draft_tokens,
        max_new_tokens=_EVALUATION_TOKENS if max_new_tokens is None else max_new_tokens,
    )
    embeddings = _embeddings(retriever, embeddings)
    check_writable(json_file)
    lengths = None if contexts is None else tuple(parse_contexts(contexts))
    retrievals = parse_retrievals(retrieval)
    with quiet_libraries():
        from rapid_integrations.demo import PROMPT_TEMPLATE
        from rapid_integrations.evaluation.command import EvaluationPlan
        from rapid_integrations.evaluation.journal import make_folder
        from rapid_integrations.evaluation.settings import parse_sweeps
        from rapid_integrations.evaluation.tasks.choice import TaskChoice

        choice = TaskChoice(
            task=None if task is None else task.value,
            data=data,
            metric=metric,
            prompt_template=prompt_template,
            subsets=None if subsets is None else parse_names(subsets),
            cot=cot,
            contexts=lengths,
            questions=questions,
            max_new_tokens=max_new_tokens,
            seed=seed,
            retrievals=retrievals,
        )
        plan = EvaluationPlan(
            methods=[name.strip() for name in methods.split(",")],
            source=choice.source(default_template=PROMPT_TEMPLATE if target is None else ASK_TEMPLATE),
            retrievals=retrievals,
            sweep=parse_sweeps(sweep or (), fixed=[*options, *(["retriever"] if retriever else [])]),
            embeddings=embeddings,
            report_folder=report,
            match_acceptance=match_acceptance,
        )
        if report is not None:
            make_folder(report)
        pipeline = load_pipeline(
            target,
            drafter,
            options,
            embeddings=embeddings,
            dtype=dtype,
            drafter_quantization_config=drafter_quantization,
            kv_dtype=kv_dtype,
        )
        plan.run(pipeline, json_file)


@app.command()
def bench(
    suite: Annotated[
        str, typer.Option(help="Of prefill, decode, batch, questions and end-to-end, with commas between.")
    ] = "prefill,decode,batch,questions,end-to-end",
    contexts: Annotated[
        str,
        typer.Option(
            help="Lengths of the documents in tokens, with commas between. batch takes the longest up to 4k, "
            "questions and end-to-end up to 16k."
        ),
    ] = "2k,4k,8k,16k,32k",
    batches: Annotated[
        str, typer.Option(help="Numbers of questions asked at once, with commas between.")
    ] = "1,2,4,8",
    repeats: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 5,
    cold_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="What reads a document anew is repeated while it reads no more tokens than this, but once.",
        ),
    ] = 24_576,
    baselines: Annotated[
        str,
        typer.Option(
            "--baselines",
            "--peers",
            help="Of generate, assisted, lookup, plain, lossless, rapid, self, hf-pipeline, hf-llm, "
            "rapid-langchain and rapid-llamaindex, with commas between. Default: all that the models allow.",
        ),
    ] = "",
    retrieval: Annotated[
        str,
        typer.Option(
            help="What the drafter reads while it decodes, of gold, natural, missing, unrelated and "
            "adversarial: RAPID is "
            "measured with each, the others that draft with the first."
        ),
    ] = "gold,natural,unrelated",
    target: TargetOption = None,
    drafter: DrafterOption = None,
    retriever: RetrieverOption = None,
    embeddings: EmbeddingsOption = None,
    transfer_strength: StrengthOption = None,
    adaptive_transfer: AdaptiveOption = None,
    num_draft_tokens: DraftTokensOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    drafter_quantization: DrafterQuantizationOption = None,
    dtype: DtypeOption = None,
    kv_dtype: KvDtypeOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same documents and questions.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results and every sample here.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw PNG files there.")] = None,
) -> None:
    """Measure speed and memory beside transformers and the frameworks' own classes, and compare the answers.

    Baselines run in up to three processes, and each of them loads the models it needs.
    """
    if num_draft_tokens == "0":
        raise ConfigurationError(
            "--num-draft-tokens 0 is plain decoding, one of the baselines: leave it out."
        )
    options = _options(
        transfer_strength=transfer_strength,
        adaptive_transfer=adaptive_transfer,
        num_draft_tokens=num_draft_tokens,
        max_new_tokens=_EVALUATION_TOKENS if max_new_tokens is None else max_new_tokens,
    )
    embeddings = _embeddings(retriever, embeddings)
    check_writable(json_file, plot)
    lengths, sizes = parse_contexts(contexts), parse_batches(batches)
    with quiet_libraries():
        from rapid_integrations.benchmark.baselines import choose_baselines
        from rapid_integrations.benchmark.command import run_benchmark
        from rapid_integrations.benchmark.models import ModelChoice
        from rapid_integrations.benchmark.plan import BenchmarkPlan

        models = ModelChoice(target, drafter, embeddings, dtype, options, drafter_quantization, kv_dtype)
        plan = BenchmarkPlan(
            suites=parse_names(suite),
            contexts=tuple(lengths),
            batches=sizes,
            repeats=repeats,
            cold_tokens=cold_tokens,
            baselines=choose_baselines(parse_names(baselines), has_drafter=models.has_drafter),
            retrievals=parse_retrievals(retrieval),
            seed=seed,
        )
        run_benchmark(plan, models, json_file=json_file, plot_folder=plot)


@app.command("bench-shape")
def bench_shape(
    target: Annotated[
        str,
        typer.Option(
            metavar="SHAPE", help="llama-3.1-8b, llama-3.2-1b, or a folder or hub id with a config.json."
        ),
    ],
    drafter: Annotated[
        str, typer.Option(metavar="SHAPE", help="The same, or 'self': the target's weights.")
    ] = "self",
    context: Annotated[str, typer.Option(help="Tokens of the target's prompts.")] = "8k",
    drafter_context: Annotated[
        str | None,
        typer.Option(help="Tokens of the drafter's prompts. Default: a 24th of the context, at least 256."),
    ] = None,
    batches: Annotated[str, typer.Option(help="Numbers of requests at once, with commas between.")] = "1,4,8",
    acceptances: Annotated[
        str, typer.Option(help="Chances that a drafted token stands, with commas between.")
    ] = "0.8,0.9,0.95",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 128,
    num_draft_tokens: DraftTokensOption = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 3,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the weights. Default: bfloat16 on an accelerator, float32 on a CPU."),
    ] = None,
    kv_dtype: KvDtypeOption = None,
    cuda_graph_tokens: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            help="Up to which context the drafter's short passes are replayed as CUDA graphs, at least 1024. "
            "Default: none are.",
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same weights and prompts.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results and every run here.")
    ] = None,
) -> None:
    """Measure how fast models of a shape would be on this machine, with random weights.

    Nothing is downloaded but a configuration. Acceptance is set, all else is measured: reading, plain passes
    and how much of the memory's speed they reach, drafting, verification, the bound, and generate().
    """
    check_writable(json_file)
    length = parse_context("context", context)
    short = (
        max(256, length // 24)
        if drafter_context is None
        else parse_context("drafter-context", drafter_context)
    )
    with quiet_libraries():
        from rapid_integrations.benchmark.shapes.command import run_shape_bench
        from rapid_integrations.benchmark.shapes.plan import ShapePlan

        plan = ShapePlan(
            target=target,
            drafter=drafter,
            context=length,
            drafter_context=short,
            batches=parse_batches(batches),
            acceptances=parse_chances("acceptances", acceptances),
            num_new_tokens=new_tokens,
            num_draft_tokens=None if num_draft_tokens is None else parse_draft_tokens(num_draft_tokens),
            repeats=repeats,
            dtype=dtype,
            kv_dtype=kv_dtype,
            cuda_graph_tokens=cuda_graph_tokens,
            seed=seed,
        )
        run_shape_bench(plan, json_file=json_file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; ``None`` takes the process's.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows another one instead of ending the program.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = app(args=arguments, prog_name="rapid", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted.", _INTERRUPTED)
    except BrokenPipeError:
        # The reader has gone. Python flushes stdout at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except _RUNTIME_ERRORS as error:
        return _complain(str(error), _FAILED)
    except RapidError as error:
        return _complain(str(error), _UNUSABLE)
    except Exception as error:
        # Every usage error of typer's has this; their base class is private to it.
        if callable(usage := getattr(error, "format_message", None)):
            return _complain(usage(), _UNUSABLE)
        return _complain(f"{type(error).__name__}: {error}", _FAILED)


def _complain(message: str, code: int) -> int:
    """One line on stderr."""
    sys.stderr.write(f"rapid: {' '.join(message.split())}\n")
    return code


def _options(num_draft_tokens: str | None, **flat: Any) -> dict[str, Any]:
    """The flat options that were given, validated before anything is loaded."""
    from rapid_integrations.config import GenerationOptions

    given = {name: value for name, value in flat.items() if value is not None}
    if num_draft_tokens is not None:
        given["num_draft_tokens"] = parse_draft_tokens(num_draft_tokens)
    GenerationOptions().override(**given)
    return given


def _embeddings(retriever: RetrieverName | None, embeddings: str | None) -> str | None:
    """The embedding model to retrieve with; ``None`` retrieves by BM25."""
    if retriever is RetrieverName.DENSE and not embeddings:
        raise ConfigurationError(
            "--retriever dense ranks passages by an embedding model: name one with --embeddings, for example "
            "BAAI/bge-m3, or use --retriever bm25."
        )
    if retriever is RetrieverName.BM25 and embeddings:
        raise ConfigurationError("--retriever bm25 takes no --embeddings: leave one of the two out.")
    return embeddings


def _ask(pipeline: RapidPipeline, document: str, question: str, *, demo_pair: bool, as_json: bool) -> None:
    """Answer, streaming to stdout, or collecting for one JSON object."""
    from rapid_integrations.demo import PROMPT_TEMPLATE
    from rapid_integrations.evaluation.methods import question_prompt
    from rapid_integrations.evaluation.progress import ReadingProgress
    from rapid_integrations.events import Completion, PrefillProgress, TextDelta

    template = PROMPT_TEMPLATE if demo_pair else ASK_TEMPLATE
    prompt = question_prompt(template, context=document, question=question)
    out = sys.stdout
    # Whatever a library prints belongs with the progress.
    with redirect_stdout(sys.stderr), ReadingProgress(stderr=True) as reading:
        for event in pipeline.stream(prompt):
            match event:
                case PrefillProgress():
                    reading.update(event)
                case TextDelta(text) if not as_json:
                    reading.stop()
                    out.write(text)
                    out.flush()
                case Completion():
                    completion = event
    if as_json:
        import json

        answer = {
            "answer": completion.text,
            "finish_reason": completion.finish_reason,
            "stats": completion.stats.as_dict(),
        }
        out.write(json.dumps(answer) + "\n")
        return
    out.write("\n")
    out.flush()
    stats = completion.stats
    line = (
        f"{stats.prompt_tokens:,} prompt tokens read in {stats.prefill_s:.1f} s; {stats.completion_tokens:,} "
        f"tokens at {stats.decode_tokens_per_s:.0f} a second"
    )
    if stats.drafted_tokens:
        line += f", {stats.tokens_per_round:.1f} a round, {stats.acceptance_rate:.0%} of the drafted accepted"
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
