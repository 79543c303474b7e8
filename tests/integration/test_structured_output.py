"""Constrained speculation equals constrained plain decoding, gives valid answers, and is still faster.

A case is one answer in a ragged batch. ``RAPID_STRUCTURED_CASES`` sets the number of cases on random models
and on the demo pair each; the default is 60 and 24::

    RAPID_STRUCTURED_CASES=200 pytest tests/integration/test_structured_output.py
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import re
from typing import Any, Literal

import pytest
import torch
from helpers.small_tokenizers import tokenizer_named
from helpers.tiny_models import run_all, tiny_model
from llama_index.core import PromptTemplate
from llama_index.core.llms import ChatMessage
from pydantic import BaseModel, Field
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from rapid_integrations import (
    Completion,
    ConfigurationError,
    PromptParts,
    RapidLLM,
    RapidPipeline,
    RapidPromptTemplate,
)
from rapid_integrations.config import EngineLimits, SamplingParams, SpeculationParams
from rapid_integrations.demo import PROMPT_TEMPLATE, generate_documents
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.requests import Request
from rapid_integrations.structured.grammar import OutputConstraints, _compile
from rapid_integrations.structured.output_format import OutputFormat
from rapid_integrations.structured.vocabulary import vocabulary_of
from rapid_integrations.tokenization.streaming import TextAssembler

CASES = int(os.environ.get("RAPID_STRUCTURED_CASES", "0"))
NEW_TOKENS = 48
DRAFT_LENGTHS = (*range(1, 9), None)


class Place(BaseModel):
    town: str = Field(max_length=8)
    code: int = Field(ge=0, le=9999)


class Record(BaseModel):
    kind: Literal["harbour", "light house"]
    ratio: float = Field(ge=0, le=1)
    open: bool
    places: list[Place] = Field(max_length=2)
    note: str | None = Field(max_length=5)


FORMATS: dict[str, dict[str, Any]] = {
    "record": {"json_schema": Record},
    "list": {"json_schema": {"type": "array", "items": {"enum": ["a", "bb", 3, None]}, "maxItems": 4}},
    "code": {"regex": r"[A-Z]{2}-\d{3,6}(/[a-z]+){0,2}"},
    "sentence": {"regex": r"(The|An?) [a-z]{2,9}( and [a-z]{1,4})* (is|was) [a-z ]{3,12}\."},
    "choice": {"choices": ["yes", "no", "perhaps", "the document does not say"]},
}


def check(text: str, asked: dict[str, Any]) -> None:
    """Raise unless ``text`` has the requested format."""
    if "regex" in asked:
        assert re.fullmatch(asked["regex"], text), text
    elif "choices" in asked:
        assert text in asked["choices"]
    elif isinstance(asked["json_schema"], dict):
        value = json.loads(text)
        assert len(value) <= 4
        assert all(item in asked["json_schema"]["items"]["enum"] for item in value)
    else:
        assert asked["json_schema"].model_validate(json.loads(text))


class MaskingProcessor(LogitsProcessor):
    """Applies llguidance in the ``generate()`` of transformers, with one matcher and without rollback."""

    def __init__(self, asked: dict[str, Any], tokenizer: Any, eos: int, prompt_tokens: int) -> None:
        self.matcher = _compile(OutputFormat(**asked), vocabulary_of(tokenizer, frozenset({eos})))
        self.consumed = prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for token in input_ids[0, self.consumed :].tolist():
            assert self.matcher.consume_token(token)
        self.consumed = input_ids.shape[1]
        bits = self.matcher.compute_bitmask()
        allowed = torch.tensor([bits[i // 8] >> (i % 8) & 1 for i in range(8 * len(bits))][: scores.shape[1]])
        scores = scores.clone()
        scores[0, : len(allowed)][allowed == 0] = -torch.inf
        scores[0, len(allowed) :] = -torch.inf
        return scores  # type: ignore[return-value]


def reference(
    model: PreTrainedModel, prompt: list[int], asked: dict[str, Any], tokenizer: Any, max_new_tokens: int
) -> list[int]:
    """Return the greedy answer of ``generate()`` under the masks, including the end-of-sequence token."""
    eos = tokenizer.eos_token_id
    ids = torch.tensor([prompt])
    processors = LogitsProcessorList([MaskingProcessor(asked, tokenizer, eos, len(prompt))])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
        logits_processor=processors, pad_token_id=eos, eos_token_id=eos,
    )  # fmt: skip
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def text_of(tokens: list[int], tokenizer: Any) -> str:
    assembler = TextAssembler(tokenizer)
    return assembler.feed(tokens) + assembler.flush()


@pytest.mark.parametrize("drafter_kind", ["self", "smaller"])
@pytest.mark.parametrize(
    ("family", "architecture"), [("chatml", "qwen3"), ("llama2", "llama"), ("gemma", "gemma3")]
)
def test_speculation_equals_constrained_generate(family: str, architecture: str, drafter_kind: str) -> None:
    rng = random.Random(f"{family} {drafter_kind}")
    lengths = itertools.cycle(DRAFT_LENGTHS)
    wanted = -(-(CASES or 60) // 6)
    cases = finished_cases = 0
    for seed in itertools.count():
        if cases >= wanted:
            break
        done = compare(family, architecture, drafter_kind, seed, lengths, rng)
        cases, finished_cases = cases + done[0], finished_cases + done[1]
    assert finished_cases > cases / 3, "most answers must end by themselves"


def compare(family, architecture, drafter_kind, seed, lengths, rng) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    tokenizer = tokenizer_named(family)
    eos = tokenizer.eos_token_id
    ids = {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}
    # The vocabularies are padded to different sizes.
    shape = {**ids, "vocab_size": len(tokenizer) + 20}
    smaller = {**ids, "vocab_size": len(tokenizer) + 7, "num_hidden_layers": 1}
    target = CausalModel(tiny_model(architecture, seed, **shape))
    drafter = target
    if drafter_kind == "smaller":
        drafter = CausalModel(tiny_model("llama", seed + 1000, **smaller))
    engine = Engine(target, drafter, limits=EngineLimits(prefill_chunk_tokens=37))
    constraints = OutputConstraints(tokenizer, target.eos_token_ids, engine.vocab_size)
    prompts = [[rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 120))] for _ in FORMATS]
    free = SamplingParams(max_new_tokens=NEW_TOKENS)
    requests, expected = [], []
    model = tiny_model(architecture, seed, **shape)
    model.set_attn_implementation("sdpa")
    for prompt, (name, asked) in zip(prompts, FORMATS.items(), strict=True):
        answer = reference(model, prompt, asked, tokenizer, NEW_TOKENS)
        for _ in range(2):
            speculation = SpeculationParams("lossless", num_draft_tokens=next(lengths))
            constraint = constraints.make(OutputFormat(**asked))
            drafter_prompt = prompt[-rng.randint(1, 30) :]
            requests.append(Request(prompt, drafter_prompt, free, speculation, constraint=constraint))
            expected.append((name, answer))
    unconstrained = Request(prompts[0], prompts[0], free, SpeculationParams("lossless"))
    answered = run_all(engine, [*requests, unconstrained])
    # The unconstrained request gives the same answer without the constrained ones.
    assert run_all(engine, [unconstrained])[0][0] == answered.pop()[0]
    engine.close()
    ended = 0
    for (tokens, finished), (name, answer) in zip(answered, expected, strict=True):
        assert tokens == [token for token in answer if token != eos], (seed, name)
        assert finished.reason == ("stop" if answer[-1] == eos else "length")
        if finished.reason == "stop":
            check(text_of(tokens, tokenizer), FORMATS[name])
            ended += 1
    return len(requests), ended


# The demo pair


class Found(BaseModel):
    answer: str = Field(pattern=r"^[A-Z][a-z]{1,11}( [A-Za-z0-9]{1,12}){2,12}\.$")


@functools.cache
def demo_cases() -> list[tuple[str, dict[str, Any]]]:
    """Return prompts with formats: sentences, an object with the answer, a choice of sentences."""
    asked: list[tuple[str, dict[str, Any]]] = []
    documents = generate_documents(num_tokens=640, num_documents=2, questions_per_document=3, seed=5)
    for document in documents:
        sentences = re.findall(r"[A-Z][^.]*\.", document.text)
        for question in document.questions:
            prompt = PROMPT_TEMPLATE.format(context=document.text, question=question.question)
            asked += [
                (prompt, {"regex": r"[A-Z][a-z]+( [A-Za-z0-9]+)*\.( [A-Z][a-z]+( [A-Za-z0-9]+)*\.)*"}),
                (prompt, {"json_schema": Found}),
                (prompt, {"choices": [question.answer, *sentences[:20]]}),
            ]
    return asked


@pytest.fixture(scope="module", params=[False, True], ids=["small drafter", "self"])
def pipeline(request: pytest.FixtureRequest) -> RapidPipeline:
    return RapidPipeline.demo(self_speculation=request.param, max_new_tokens=64)


def answers(
    pipeline: RapidPipeline, asked: list[tuple[str, dict[str, Any]]], **options: Any
) -> list[Completion]:
    """Answer all prompts in one batch, each under its own format."""
    requests = [
        pipeline._prepare(prompt, pipeline.options.override(**options, **output_format), None).request
        for prompt, output_format in asked
    ]
    return [
        Completion(text_of(tokens, pipeline.tokenizer), finished.reason, finished.stats, tuple(tokens))
        for tokens, finished in run_all(pipeline.engine, requests)
    ]


def test_the_demo_pair_equals_constrained_generate(pipeline: RapidPipeline) -> None:
    rng = random.Random(len(pipeline.name))
    wanted = -(-(CASES or 24) // 2)
    target = pipeline.engine.target
    expected = [
        reference(target.model, pipeline.encode(PromptParts.from_text(prompt)), asked, pipeline.tokenizer, 64)
        for prompt, asked in (demo_cases() if CASES else demo_cases()[:6])
    ]
    cases = ended = 0
    for length in itertools.cycle((0, *DRAFT_LENGTHS)):
        if cases >= wanted:
            break
        chosen = sorted(rng.sample(range(len(expected)), rng.randint(2, min(8, len(expected)))))
        asked = [demo_cases()[index] for index in chosen]
        for index, (_, output_format), completion in zip(
            chosen,
            asked,
            answers(pipeline, asked, acceptance="lossless", num_draft_tokens=length),
            strict=True,
        ):
            answer = [token for token in expected[index] if token not in target.eos_token_ids]
            assert list(completion.token_ids) == answer, (index, length)
            if completion.finish_reason == "stop":
                check(completion.text, output_format)
                ended += 1
            cases += 1
    assert ended > cases / 2


@pytest.mark.parametrize(
    ("acceptance", "temperature"), [("lossless", 1.0), ("augmented", 0.0), ("augmented", 1.0), ("paper", 1.0)]
)
def test_complete_answers_are_valid_under_every_acceptance_rule(
    pipeline: RapidPipeline, acceptance: str, temperature: float
) -> None:
    asked = demo_cases()[:6]
    options = {"acceptance": acceptance, "temperature": temperature, "transfer_strength": 5.0}
    completions = answers(pipeline, asked, seed=1, **options)
    ended = [pair for pair in zip(completions, asked, strict=True) if pair[0].finish_reason == "stop"]
    assert len(ended) > len(asked) / 2
    for completion, (_, output_format) in ended:
        check(completion.text, output_format)


def test_a_round_accepts_several_tokens_under_a_constraint(pipeline: RapidPipeline) -> None:
    completions = answers(pipeline, demo_cases()[:9], num_draft_tokens=6)
    for index, name in enumerate(("regex", "json_schema", "choices")):
        stats = [completion.stats for completion in completions[index::3]]
        assert sum(s.completion_tokens for s in stats) / sum(s.rounds for s in stats) > 2, name


def test_a_truncated_answer_has_the_finish_reason_length(pipeline: RapidPipeline) -> None:
    prompt = demo_cases()[0][0]
    options = pipeline.options.override(json_schema=Found, max_new_tokens=6)
    (completion,) = pipeline.generate([prompt], options=options)
    assert completion.finish_reason == "length"
    assert completion.text.startswith("{")
    with pytest.raises(json.JSONDecodeError):
        json.loads(completion.text)


def test_an_unsupported_format_raises_before_the_prefill(pipeline: RapidPipeline) -> None:
    options = pipeline.options.override(regex="(?=a)")
    with pytest.raises(ConfigurationError, match="regex cannot be honoured"):
        next(iter(pipeline.stream("Question: who?", options=options)))
    assert pipeline.engine.num_running == 0


# Both frameworks


@pytest.fixture(scope="module")
def llm() -> RapidLLM:
    return RapidLLM.demo(max_new_tokens=80)


PROMPT = demo_cases()[0][0]
CONTEXT, QUESTION = PROMPT.removeprefix("Context: ").removesuffix(" Answer:").split(" Question: ")
TEMPLATE = PromptTemplate(PROMPT_TEMPLATE.format(context="{context_str}", question="{query_str}"))
VALUES = {"context_str": CONTEXT, "query_str": QUESTION}


async def test_every_call_accepts_a_format(llm: RapidLLM) -> None:
    digits = {"regex": "[0-9]{6}"}
    expected = llm.invoke(PROMPT, **digits)
    assert re.fullmatch("[0-9]{6}", expected)
    assert llm.complete(PROMPT, **digits).text == expected
    assert (await llm.acomplete(PROMPT, **digits)).text == expected
    assert llm.bind(**digits).invoke(PROMPT) == expected
    assert "".join(llm.stream(PROMPT, **digits)) == expected
    configured = llm.model_copy(update=digits)
    assert configured.invoke(PROMPT) == expected
    assert configured.invoke(PROMPT, choices=["Yes.", "No."]) in ("Yes.", "No.")
    assert not re.fullmatch("[0-9]{6}", configured.invoke(PROMPT, regex=None))


async def test_llama_index_structured_prediction(llm: RapidLLM) -> None:
    found = llm.structured_predict(Found, TEMPLATE, **VALUES)
    assert isinstance(found, Found)
    assert await llm.astructured_predict(Found, TEMPLATE, **VALUES) == found
    *partial, last = llm.stream_structured_predict(Found, TEMPLATE, **VALUES)
    assert last == found
    assert len({str(part.answer) for part in partial}) > 3  # type: ignore[union-attr]
    parts = [part async for part in await llm.astream_structured_predict(Found, TEMPLATE, **VALUES)]
    assert parts[-1] == found

    structured = llm.as_structured_llm(Found)
    response = structured.complete(PROMPT)
    assert isinstance(response.raw, Found)
    assert Found.model_validate_json(response.text) == response.raw
    chat = await structured.achat([ChatMessage(role="user", content=PROMPT)])
    assert isinstance(chat.raw, Found)


async def test_langchain_structured_output(llm: RapidLLM) -> None:
    chain = llm.with_structured_output(Found)
    found = chain.invoke(PROMPT)
    assert isinstance(found, Found)
    assert await chain.ainvoke(PROMPT) == found
    assert chain.batch([PROMPT, PROMPT]) == [found, found]
    as_dict = llm.with_structured_output({**Found.model_json_schema(), "additionalProperties": False}).invoke(
        PROMPT
    )
    assert as_dict == found.model_dump()
    template = RapidPromptTemplate.from_template(PROMPT_TEMPLATE)
    values = {"context": CONTEXT, "question": QUESTION}
    assert isinstance((template | chain).invoke(values), Found)
    raw = llm.with_structured_output(Found, include_raw=True).invoke(PROMPT)
    assert raw == {"raw": raw["raw"], "parsed": found, "parsing_error": None}
    assert Found.model_validate_json(raw["raw"]) == found
