"""Measure speculation under output formats: ``python -m rapid_integrations.demo.evaluate_formats``.

The demo pair answers questions about documents that it was not trained on, as text and in seven formats
(extra ``structured``). Its training has no JSON, so a JSON answer is not always right. The measurement counts
the tokens per target pass, and checks that all answers that end by themselves follow the format.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field

from rapid_integrations.config import Acceptance, GenerationOptions
from rapid_integrations.demo import DRAFTER_PATH, OPTIONS, PROMPT_TEMPLATE, TARGET_PATH
from rapid_integrations.demo.documents import DemoDocument, DemoQuestion, generate_documents
from rapid_integrations.demo.evaluate import share
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.pipeline import RapidPipeline

MAX_NEW_TOKENS = 96
NUM_CHOICES = 20

# Bounded, because a model without JSON in its training may never end a string.
_SENTENCE = r"[A-Z][a-z]{1,11}( [A-Za-z0-9]{1,12}){2,12}\."
Name = Annotated[str, Field(pattern=r"^[A-Z][a-z]{2,11}( [A-Za-z][a-z]{2,11}){0,2}$")]
Sentence = Annotated[str, Field(pattern=f"^{_SENTENCE}$")]


class Strings(BaseModel):
    """An object with strings."""

    subject: Name
    answer: Sentence


class Enums(BaseModel):
    """An object with an enum in each field."""

    kind: Literal["depot", "archive", "library", "mill"]
    found: Literal["yes", "no", "in part"]


class Numbers(BaseModel):
    """An object with numbers."""

    passcode: int = Field(ge=100_000, le=999_999)
    year: int = Field(ge=1500, le=2100)


class Person(BaseModel):
    """The object nested in :class:`Place`."""

    name: Name
    town: Name


class Place(BaseModel):
    """The object nested in :class:`Nested`."""

    name: Name
    manager: Person


class Nested(BaseModel):
    """Objects in objects."""

    place: Place
    certain: bool


class Arrays(BaseModel):
    """An object with arrays."""

    names: list[Name] = Field(max_length=2)
    sentences: list[Sentence] = Field(max_length=2)


OutputFormat = Callable[[DemoDocument, DemoQuestion], dict[str, Any]]

FORMATS: Mapping[str, OutputFormat] = {
    "text": lambda document, question: {},
    "strings": lambda document, question: {"json_schema": Strings},
    "enum": lambda document, question: {"json_schema": Enums},
    "numbers": lambda document, question: {"json_schema": Numbers},
    "nesting": lambda document, question: {"json_schema": Nested},
    "arrays": lambda document, question: {"json_schema": Arrays},
    "regex": lambda document, question: {"regex": rf"{_SENTENCE}( {_SENTENCE}){{0,3}}"},
    "choices": lambda document, question: {"choices": _choices(document, question)},
}
"""The formats by name: functions from a document and a question to the options of the call."""


def _choices(document: DemoDocument, question: DemoQuestion) -> list[str]:
    sentences = re.findall(r"[A-Z][^.\n]*\.", document.text)
    return list(dict.fromkeys([question.answer, *sentences[:NUM_CHOICES]]))


def is_valid(text: str, output_format: Mapping[str, Any]) -> bool:
    """Whether a text follows an output format."""
    if "regex" in output_format:
        return re.fullmatch(output_format["regex"], text) is not None
    if "choices" in output_format:
        return text in output_format["choices"]
    if "json_schema" in output_format:
        try:
            output_format["json_schema"].model_validate(json.loads(text))
        except ValueError:
            return False
    return True


@dataclass(frozen=True)
class FormatResult:
    """The answers in one format.

    Attributes:
        ended: For each answer, whether it ended by itself.
        valid: For each answer that ended by itself, whether it follows the format.
        stats: Counts and times of all answers, summed.
    """

    ended: list[bool]
    valid: list[bool]
    stats: RapidStats


def evaluate(
    pipeline: RapidPipeline,
    make_format: OutputFormat,
    documents: Iterable[DemoDocument],
    *,
    num_draft_tokens: int,
    acceptance: str = "lossless",
) -> FormatResult:
    """Ask all questions about documents in one format."""
    ended, valid, stats = [], [], []
    for document in documents:
        for question in document.questions:
            output_format = make_format(document, question)
            options = pipeline.options.override(
                max_new_tokens=MAX_NEW_TOKENS,
                num_draft_tokens=num_draft_tokens,
                acceptance=acceptance,
                **output_format,
            )
            prompt = PROMPT_TEMPLATE.format(context=document.text, question=question.question)
            (answer,) = pipeline.generate([prompt], options=options)
            ended.append(answer.finish_reason == "stop")
            if ended[-1]:
                valid.append(is_valid(answer.text, output_format))
            stats.append(answer.stats)
    return FormatResult(ended, valid, RapidStats.pooled(stats))


def table(results: Mapping[str, FormatResult]) -> str:
    """The results as a Markdown table. A round is one target pass; plain decoding has one token per round."""
    rows = [
        "| format | ended | valid | tokens an answer | of these forced | accepted of drafted "
        "| tokens a round | forced left out |",
        "|---" * 8 + "|",
    ]
    for name, result in results.items():
        stats = result.stats
        cells = [
            share(result.ended),
            share(result.valid),
            f"{stats.completion_tokens / len(result.ended):.1f}",
            f"{stats.forced_tokens / len(result.ended):.1f}",
            f"{stats.acceptance_rate:.2f}",
            f"{stats.tokens_per_round:.2f}",
            f"{(stats.completion_tokens - stats.forced_tokens) / stats.rounds:.2f}",
        ]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def main(arguments: Iterable[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure speculation under output formats on the demo pair.")
    parser.add_argument("--target", type=Path, default=TARGET_PATH)
    parser.add_argument("--drafter", type=Path, default=DRAFTER_PATH)
    parser.add_argument("--formats", nargs="+", choices=tuple(FORMATS), default=tuple(FORMATS))
    parser.add_argument("--tokens", type=int, default=2048, help="length of a document (default: 2048)")
    parser.add_argument("--questions", type=int, default=20, help="questions for each (default: 20)")
    parser.add_argument("--draft-tokens", type=int, default=6, help="tokens drafted a round (default: 6)")
    parser.add_argument("--acceptance", choices=get_args(Acceptance), default="lossless")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(None if arguments is None else list(arguments))
    documents = list(
        generate_documents(
            num_tokens=options.tokens,
            num_documents=-(-options.questions // 5),
            questions_per_document=5,
            seed=options.seed,
        )
    )
    generation = GenerationOptions().override(**OPTIONS)
    pipeline = RapidPipeline.from_pretrained(options.target, options.drafter, options=generation)
    with closing(pipeline):
        results = {
            name: evaluate(
                pipeline,
                FORMATS[name],
                documents,
                num_draft_tokens=options.draft_tokens,
                acceptance=options.acceptance,
            )
            for name in options.formats
        }
    sys.stdout.write(table(results))


if __name__ == "__main__":
    main()
