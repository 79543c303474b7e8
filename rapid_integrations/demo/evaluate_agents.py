"""Measure agents on the demo pair: ``python -m rapid_integrations.demo.evaluate_agents``.

An agent of each framework has one tool, which searches a long document by BM25 and returns passages followed
by the query, because the pair answers best if the question comes after the context. The agent gets only the
question: it must call the tool with a query that finds the passage, and read the result. An answer is right
if it equals the expected one word for word.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from rapid_integrations.config import GenerationOptions
from rapid_integrations.demo import DRAFTER_PATH, OPTIONS, TARGET_PATH
from rapid_integrations.demo.documents import DemoDocument, DemoQuestion, generate_documents
from rapid_integrations.demo.evaluate import CHUNK_TOKENS, share
from rapid_integrations.demo.tokenizer import sentence_encoder
from rapid_integrations.demo.world import KINDS
from rapid_integrations.pipeline import RapidPipeline
from rapid_integrations.retrieval.base import Chunk
from rapid_integrations.retrieval.lexical import LexicalIndex

NUM_CHUNKS = 4


@dataclass
class DocumentSearch:
    """The tool of an agent. It finds passages of one document, and records its calls.

    Attributes:
        document: The document to search.
        queries: The queries of all calls.
        results: The results of all calls.
    """

    document: DemoDocument
    queries: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = sentence_encoder().count
        chunks: list[Chunk] = []
        paragraphs = ""
        for paragraph in self.document.text.split("\n\n"):
            paragraphs = f"{paragraphs}\n\n{paragraph}".strip()
            if count(paragraphs) >= CHUNK_TOKENS:
                chunks.append(Chunk(paragraphs, len(chunks)))
                paragraphs = ""
        self._index = LexicalIndex([*chunks, Chunk(paragraphs, len(chunks))])

    def search(self, query: str) -> str:
        """Search the document for passages."""
        chunks = sorted(self._index.retrieve(query)[:NUM_CHUNKS], key=lambda chunk: chunk.position or 0)
        result = "\n\n".join([*(chunk.text for chunk in chunks), query])
        self.queries.append(query)
        self.results.append(result)
        return result

    def has_found(self, question: DemoQuestion) -> bool:
        """Whether all of a question's evidence was in the results."""
        results = "\n".join(self.results)
        return all(self.document.text[start:end] in results for start, end in question.evidence)


Agent = Callable[[DocumentSearch, str], str]
"""A function that answers a question with the tool."""


def langchain_agent(pipeline: RapidPipeline) -> Agent:
    """An agent of LangChain's ``create_agent`` on ``ChatRapid``."""
    from langchain.agents import create_agent
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import StructuredTool

    from rapid_integrations.langchain.chat_model import ChatRapid

    chat = ChatRapid.from_pretrained(pipeline)

    def answer(search: DocumentSearch, question: str) -> str:
        agent = create_agent(chat, [StructuredTool.from_function(search.search)])
        return str(agent.invoke({"messages": [HumanMessage(question)]})["messages"][-1].text)

    return answer


def llama_index_agent(pipeline: RapidPipeline) -> Agent:
    """An agent of LlamaIndex's ``FunctionAgent`` on ``RapidLLM``."""
    from llama_index.core.agent.workflow import FunctionAgent
    from llama_index.core.tools import FunctionTool

    from rapid_integrations.llm import RapidLLM

    llm = RapidLLM.from_pretrained(pipeline)

    async def run(search: DocumentSearch, question: str) -> str:
        agent = FunctionAgent(tools=[FunctionTool.from_defaults(search.search)], llm=llm)
        return str(await agent.run(question))

    return lambda search, question: asyncio.run(run(search, question))


AGENTS: Mapping[str, Callable[[RapidPipeline], Agent]] = {
    "langchain": langchain_agent,
    "llama_index": llama_index_agent,
}


@dataclass(frozen=True)
class Outcome:
    """The outcome of one question.

    Attributes:
        kind: The kind of the question.
        num_calls: The number of tool calls.
        found: Whether the tool's results contained the evidence.
        right: Whether the answer equals the expected one.
    """

    kind: str
    num_calls: int
    found: bool
    right: bool


def evaluate(
    agent: Agent, *, num_tokens: int, num_questions: int, per_document: int, seed: int
) -> list[Outcome]:
    """Ask an agent about documents that the pair was not trained on."""
    outcomes = []
    for document in generate_documents(
        num_tokens=num_tokens,
        num_documents=-(-num_questions // per_document),
        questions_per_document=per_document,
        seed=seed,
    ):
        for question in document.questions:
            search = DocumentSearch(document)
            answer = agent(search, question.question)
            outcomes.append(
                Outcome(
                    question.kind,
                    len(search.queries),
                    search.has_found(question),
                    answer.strip() == question.answer,
                )
            )
    return outcomes


def table(outcomes: Mapping[str, list[Outcome]]) -> str:
    """The results as a Markdown table: shares, each followed by its number of questions."""
    rows = [
        "| agent | kind | called the tool | found the evidence | right | right where found |",
        "|---" * 6 + "|",
    ]
    for name, all_kinds in outcomes.items():
        by_kind: dict[str, list[Outcome]] = defaultdict(list)
        for outcome in all_kinds:
            by_kind[outcome.kind].append(outcome)
        for kind, selected in [("all", all_kinds), *((k, by_kind[k]) for k in KINDS if by_kind[k])]:
            cells = [
                [outcome.num_calls > 0 for outcome in selected],
                [outcome.found for outcome in selected],
                [outcome.right for outcome in selected],
                [outcome.right for outcome in selected if outcome.found],
            ]
            rows.append(f"| {name} | {kind} | " + " | ".join(map(share, cells)) + " |")
    return "\n".join(rows) + "\n"


def main(arguments: Iterable[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure agents on the demo pair.")
    parser.add_argument("--target", type=Path, default=TARGET_PATH)
    parser.add_argument("--drafter", type=Path, default=DRAFTER_PATH)
    parser.add_argument("--agents", nargs="+", choices=tuple(AGENTS), default=tuple(AGENTS))
    parser.add_argument("--tokens", type=int, default=16384, help="length of a document (default: 16384)")
    parser.add_argument("--questions", type=int, default=100, help="questions for each (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(None if arguments is None else list(arguments))
    outcomes = {}
    generation = GenerationOptions().override(**OPTIONS)
    pipeline = RapidPipeline.from_pretrained(options.target, options.drafter, options=generation)
    with closing(pipeline):
        for name in options.agents:
            outcomes[name] = evaluate(
                AGENTS[name](pipeline),
                num_tokens=options.tokens,
                num_questions=options.questions,
                per_document=10,
                seed=options.seed,
            )
    sys.stdout.write(table(outcomes))


if __name__ == "__main__":
    main()
