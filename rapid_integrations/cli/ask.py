"""``rapid ask``: one question about a document."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rapid_integrations.cli.options import AnswerOptions
from rapid_integrations.errors import PromptError

if TYPE_CHECKING:
    from rapid_integrations.pipeline import RapidPipeline

ASK_TEMPLATE = "{context}\n\nUsing the text above, answer the question.\nQuestion: {question}\nAnswer:"


@dataclass(frozen=True, kw_only=True)
class AskOptions(AnswerOptions):
    """The options of ``rapid ask``."""

    document: Annotated[Path, typer.Option(help="A text, Markdown or PDF file.")]
    question: Annotated[str, typer.Option(help="The question to answer from it.")]
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token.")] = None
    seed: Annotated[int | None, typer.Option(help="Makes sampled answers repeatable.")] = None
    prefix_cache_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the models' caches of long documents in this folder, for the next question.",
        ),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False


def ask(options: AskOptions) -> None:
    """Answer one question about a document."""
    import logging

    from rapid_integrations.model_choice import quiet_libraries
    from rapid_integrations.retrieval.document_files import read_document

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its errors are raised too
    if not options.question.strip():
        raise PromptError("the question is empty: ask something with --question.")
    generation = options.generation(temperature=options.temperature, seed=options.seed)
    options.check_retriever()
    text = read_document(options.document)
    with quiet_libraries():
        pipeline = options.load_pipeline(generation, limits={"prefix_cache_dir": options.prefix_cache_dir})
        _answer(
            pipeline,
            text,
            options.question.strip(),
            demo_pair=options.target is None,
            as_json=options.as_json,
        )


def _answer(pipeline: RapidPipeline, document: str, question: str, *, demo_pair: bool, as_json: bool) -> None:
    """Answer, as a stream to stdout or as one JSON object."""
    from rapid_integrations.demo import PROMPT_TEMPLATE
    from rapid_integrations.evaluation.progress import PrefillBar
    from rapid_integrations.evaluation.tasks.prompts import question_prompt
    from rapid_integrations.events import Completion, PrefillProgress, TextDelta

    template = PROMPT_TEMPLATE if demo_pair else ASK_TEMPLATE
    prompt = question_prompt(template, context=document, question=question)
    out = sys.stdout
    # Output of libraries belongs to the progress on stderr.
    with redirect_stdout(sys.stderr), PrefillBar(stderr=True) as bar:
        for event in pipeline.stream(prompt):
            match event:
                case PrefillProgress():
                    bar.update(event)
                case TextDelta(text) if not as_json:
                    bar.stop()
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
