"""A real model in the engine: transformers' own output, long documents, GGUF files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.real_models import OPTIONS, passages
from transformers import AutoModelForCausalLM, PreTrainedModel

from rapid_integrations import PromptParts, RapidLLM, RapidPipeline
from rapid_integrations.config import GenerationOptions
from rapid_integrations.engine.cache.fingerprint import fingerprint
from rapid_integrations.engine.model.pretrained import load_model, load_tokenizer

pytestmark = pytest.mark.real
QUESTIONS = (
    "When does the choir meet, and where?",
    "In which year was the museum's oldest painting bought?",
    "From which pier does the ferry to Marlow Island leave?",
)


@pytest.fixture(scope="module")
def reference(model_folder: Path) -> PreTrainedModel:
    """The model without the engine."""
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


def prompt(document: str, question: str) -> PromptParts:
    return PromptParts.from_text(f"Context: {document}\n\nQuestion: {question}\nAnswer:")


def generate(model: PreTrainedModel, ids: list[int], max_new_tokens: int) -> list[int]:
    tokens = torch.tensor([ids])
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, do_sample=False
    )
    end = model.generation_config.eos_token_id
    answer: list[int] = output[0, len(ids) :].tolist()
    return answer[: answer.index(end)] if end in answer else answer


def test_lossless_answers_are_generate_s_token_for_token(
    llm: RapidLLM, reference: PreTrainedModel, document: str
) -> None:
    pipeline = llm.pipeline
    prompts = [prompt(document, question) for question in QUESTIONS]
    completions = pipeline.generate(prompts, options=llm.options)
    for parts, completion in zip(prompts, completions, strict=True):
        assert list(completion.token_ids) == generate(reference, pipeline.encode(parts), 32)
        assert completion.stats.drafted_tokens > 0
    assert "Thursday" in completions[0].text
    assert "1911" in completions[1].text


def test_a_long_document_is_answered_and_its_cache_reused(llm: RapidLLM, reference: PreTrainedModel) -> None:
    pipeline, text = llm.pipeline, "\n\n".join(passages(98))
    (first,) = pipeline.generate(
        [prompt(text, QUESTIONS[0])], options=llm.options.override(max_new_tokens=12)
    )
    assert first.stats.prompt_tokens > 5_500
    assert first.stats.drafter_prompt_tokens < 600
    assert list(first.token_ids) == generate(reference, pipeline.encode(prompt(text, QUESTIONS[0])), 12)
    (second,) = pipeline.generate(
        [prompt(text, QUESTIONS[1])], options=llm.options.override(acceptance="augmented", max_new_tokens=12)
    )
    assert second.stats.reused_prefix_tokens > 5_500
    assert second.text.strip()


def test_a_gguf_file_is_the_same_model_as_its_folder(
    model_folder: Path, llm: RapidLLM, reference: PreTrainedModel, document: str
) -> None:
    files = sorted([*model_folder.glob("*.gguf"), *model_folder.parent.glob("*.gguf")])
    if not files:
        pytest.skip(f"no GGUF file in {model_folder} or beside it")
    model, tokenizer = load_model(files[0]), load_tokenizer(files[0])
    assert fingerprint(model) == fingerprint(reference)
    expected = llm.pipeline.tokenizer
    for text in (document, "  a\n\n b 1234567 don't <|im_start|>x<|im_end|>", "你好 naïve ₤\t"):
        assert tokenizer(text).input_ids == expected(text).input_ids
    assert tokenizer.chat_template == expected.chat_template
    ids = torch.tensor([expected(document).input_ids[:300]])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, reference(ids).logits)
    del model
    names = {name: value for name, value in OPTIONS.items() if name != "dtype"}
    options = GenerationOptions().override(**names)
    pipeline = RapidPipeline.from_pretrained(files[0], dtype="float32", options=options)
    (answer,) = pipeline.generate([prompt(document, QUESTIONS[0])])
    pipeline.close()
    (same,) = llm.pipeline.generate([prompt(document, QUESTIONS[0])], options=llm.options)
    assert answer.token_ids == same.token_ids
