"""Measure the demo pair: ``python -m rapid_integrations.demo.evaluate`` prints the README's tables.

An answer is right if greedy decoding gives all of it, including the final ``<eos>``. One forward pass over
prompt and answer shows this: the model must predict each token of the answer from those before it. The keys
and values of a document are computed once for all its questions.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from rapid_integrations.demo import DRAFTER_PATH, PROMPT_TEMPLATE, TARGET_PATH
from rapid_integrations.demo.documents import DemoDocument, DemoQuestion, generate_documents
from rapid_integrations.demo.domains import DOMAINS, HANDBOOK
from rapid_integrations.demo.world import KINDS

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
CHUNK_TOKENS = 96
_PREFILL_TOKENS = 2048


@dataclass(frozen=True)
class Retrieved:
    """The retrieved chunks of a question.

    Attributes:
        text: The text of the chunks.
        num_found: The number of evidence sentences that are completely in the text.
        num_needed: The number of evidence sentences.
    """

    text: str
    num_found: int
    num_needed: int

    @property
    def outcome(self) -> str:
        """One of ``hit``, ``part`` and ``miss``."""
        return {0: "miss", self.num_needed: "hit"}.get(self.num_found, "part")


class ChunkIndex:
    """A BM25 index over the words of a document's chunks of 96 tokens."""

    def __init__(self, document: DemoDocument, tokenizer: Any) -> None:
        encoded = tokenizer(document.text, return_offsets_mapping=True, add_special_tokens=False)
        offsets = encoded["offset_mapping"]
        self._text = document.text
        self.num_tokens = len(offsets)
        self._chunks = [
            (offsets[i][0], offsets[min(i + CHUNK_TOKENS, len(offsets)) - 1][1])
            for i in range(0, len(offsets), CHUNK_TOKENS)
        ]
        self._bm25 = bm25s.BM25()
        self._bm25.index([_words(self._text[a:b]) for a, b in self._chunks], show_progress=False)

    def retrieve(self, question: DemoQuestion) -> Retrieved:
        """The best chunks with ``max(256, length / 24)`` tokens in total, in document order."""
        number = min(len(self._chunks), max(256, self.num_tokens // 24) // CHUNK_TOKENS)
        ranked, _ = self._bm25.retrieve([_words(question.question)], k=number, show_progress=False)
        spans: list[tuple[int, int]] = []
        for i in sorted(int(i) for i in ranked[0]):
            start, end = self._chunks[i]
            if spans and i > 0 and spans[-1][1] == self._chunks[i - 1][1]:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((start, end))
        inside = [any(a <= start and end <= b for a, b in spans) for start, end in question.evidence]
        text = "\n\n".join(self._text[a:b].strip() for a, b in spans)
        return Retrieved(text, sum(inside), len(inside))


class Scorer:
    """Checks whether a model's answers to questions about a context are exactly right."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.inference_mode()
    def score(self, context: str, questions: Sequence[DemoQuestion]) -> list[bool]:
        """For each question, whether greedy decoding gives its answer."""
        before, after = PROMPT_TEMPLATE.split("{context}")
        prefix = self._encode(f"<bos><|user|>{before}{context}")
        cache = DynamicCache(config=self.model.config)
        for start in range(0, len(prefix), _PREFILL_TOKENS):
            part = torch.tensor([prefix[start : start + _PREFILL_TOKENS]])
            self.model(part, cache=cache, logits_to_keep=1)
        right = []
        for question in questions:
            prompt = self._encode(f"{after.replace('{question}', question.question)}<eos><|assistant|>")
            answer = self._encode(f"{question.answer}<eos>")
            ids = torch.tensor([prompt + answer[:-1]])
            logits = self.model(ids, cache=cache, logits_to_keep=len(answer)).logits[0]
            right.append(bool((logits.argmax(-1) == torch.tensor(answer)).all()))
            cache.crop(len(prefix) - cache.get_seq_length())
        return right

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


Cells = dict[tuple[str, int, str], list[bool]]
"""Results by column, document length and kind of question."""


def evaluate(
    target: Scorer,
    drafter: Scorer,
    *,
    num_tokens: int,
    num_questions: int,
    per_document: int,
    seed: int,
    domain: str = HANDBOOK.name,
) -> Cells:
    """Measure both models on documents of one length."""
    cells: Cells = defaultdict(list)
    documents = generate_documents(
        num_tokens=num_tokens,
        num_documents=-(-num_questions // per_document),
        questions_per_document=per_document,
        seed=seed,
        domain=domain,
    )
    for document in documents:
        index = ChunkIndex(document, target.tokenizer)
        retrieved = [index.retrieve(question) for question in document.questions]
        for name, scorer in (("target", target), ("drafter", drafter)):
            for question, right in zip(
                document.questions, scorer.score(document.text, document.questions), strict=True
            ):
                cells[f"{name} full", num_tokens, question.kind].append(right)
            for question, chunks in zip(document.questions, retrieved, strict=True):
                column = f"{name} {chunks.outcome}"
                cells[column, num_tokens, question.kind] += scorer.score(chunks.text, [question])
        for question, chunks in zip(document.questions, retrieved, strict=True):
            cells["hits", num_tokens, question.kind].append(chunks.outcome == "hit")
            length = len(target.tokenizer(question.answer)["input_ids"])
            cells["answer", num_tokens, question.kind] += [True] * length
    return cells


def table(cells: Cells, lengths: Iterable[int], kinds: Sequence[str]) -> str:
    """The results as a Markdown table: accuracies, each followed by its number of questions."""
    columns = [f"{name} {c}" for name in ("target", "drafter") for c in ("full", "hit", "part", "miss")]
    rows = ["| length | hits | tokens | " + " | ".join(columns) + " |", "|---" * (len(columns) + 3) + "|"]
    for length in lengths:
        pooled = {
            c: [x for k in kinds for x in cells.get((c, length, k), [])] for c in (*columns, "hits", "answer")
        }
        mean_tokens = len(pooled["answer"]) / max(1, len(pooled["hits"]))
        values = [share(pooled["hits"]), f"{mean_tokens:.1f}", *(share(pooled[c]) for c in columns)]
        rows.append(f"| {length} | " + " | ".join(values) + " |")
    return "\n".join(rows) + "\n"


def share(results: Sequence[bool]) -> str:
    """The share of true results, followed by their number."""
    return f"{sum(results) / len(results):.2f} ({len(results)})" if results else "-"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def main(arguments: Iterable[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure the demo pair.")
    parser.add_argument("--target", type=Path, default=TARGET_PATH)
    parser.add_argument("--drafter", type=Path, default=DRAFTER_PATH)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--questions", type=int, default=400, help="questions at each length (default: 400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--domain", choices=tuple(DOMAINS), default=HANDBOOK.name)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(None if arguments is None else list(arguments))
    torch.set_num_threads(options.threads)
    target, drafter = Scorer(options.target), Scorer(options.drafter)
    cells: Cells = {}
    for length in options.lengths:
        per_document = min(40, max(6, length // 100))
        cells |= evaluate(
            target,
            drafter,
            num_tokens=length,
            num_questions=options.questions,
            per_document=per_document,
            seed=options.seed,
            domain=options.domain,
        )
        sys.stderr.write(table(cells, [length], KINDS))
    for name, kinds in [("all kinds", KINDS), *((kind, (kind,)) for kind in KINDS)]:
        sys.stdout.write(f"\n{name}\n\n{table(cells, options.lengths, kinds)}")


if __name__ == "__main__":
    main()
