"""Logits processors as transformers' generate() has them, and random numbers that belong to positions."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from rapid_integrations.config import SamplingParams
from rapid_integrations.engine.decoding.sampling import ACCEPT, CORRECT, DRAFT, Sampler

LOGITS = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_k": 500},
        {"temperature": 1.4, "top_p": 0.6},
        {"temperature": 1.4, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 9, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.3},
        {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 0.8},
    ],
)
def test_processors_are_those_of_generate(settings) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    prefix, draft = [3, 3, 7], [1, 9, 4]
    theirs = model._get_logits_processor(config, input_ids_seq_length=3, device="cpu")
    processed = Sampler(SamplingParams(**settings)).process(LOGITS, prefix, draft)
    for row in range(4):
        seen = torch.tensor([[*prefix, *draft[:row]]])
        torch.testing.assert_close(processed[row : row + 1], theirs(seen, LOGITS[row : row + 1].clone()))


def test_greedy_leaves_logits_alone_but_for_the_repetition_penalty() -> None:
    assert Sampler(SamplingParams(top_k=1)).process(LOGITS, [1]) is LOGITS
    penalised = Sampler(SamplingParams(repetition_penalty=2.0)).process(LOGITS, [0], [5, 6, 7])
    changed = [(penalised[row] != LOGITS[row]).nonzero()[:, 0].tolist() for row in range(4)]
    assert changed == [[0], [0, 5], [0, 5, 6], [0, 5, 6, 7]]


def test_fewer_rows_count_from_the_end() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0))
    every = sampler.process(LOGITS, [0], [5, 6, 7])
    torch.testing.assert_close(sampler.process(LOGITS[2:], [0], [5, 6, 7]), every[2:])


def test_processing_does_not_change_its_input() -> None:
    before = LOGITS.clone()
    Sampler(SamplingParams(temperature=0.5, top_k=2, repetition_penalty=3.0)).process(
        LOGITS, [1, 2], [3, 4, 5]
    )
    assert torch.equal(LOGITS, before)


def test_random_numbers_are_a_function_of_seed_and_position() -> None:
    short = Sampler(SamplingParams(temperature=1.0, seed=5, max_new_tokens=3))
    long = Sampler(SamplingParams(temperature=0.3, seed=5, max_new_tokens=4000, top_k=3))
    for purpose in (DRAFT, ACCEPT, CORRECT):
        assert torch.equal(short.uniforms(0, 3, purpose), long.uniforms(0, 3, purpose))
    apart = torch.cat([long.uniforms(i, 1, ACCEPT) for i in range(10, 20)])
    assert torch.equal(apart, long.uniforms(10, 10, ACCEPT))
    drawn = torch.cat([long.uniforms(0, 4000, purpose) for purpose in (DRAFT, ACCEPT, CORRECT)])
    assert drawn.unique().numel() == 12_000, "no number serves twice"
    assert drawn.dtype == torch.float64
    assert drawn.min() >= 0
    assert drawn.max() < 1


def test_seeds_differ_and_no_seed_is_a_fresh_one() -> None:
    def numbers(seed: int | None) -> torch.Tensor:
        return Sampler(SamplingParams(temperature=1.0, seed=seed)).uniforms(0, 8, DRAFT)

    assert torch.equal(numbers(1), numbers(1))
    assert not torch.equal(numbers(1), numbers(2))
    assert not torch.equal(numbers(None), numbers(None))


def test_a_seed_leaves_torch_s_own_random_numbers_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Sampler(SamplingParams(temperature=1.0, seed=9))
    assert torch.equal(torch.rand(3), expected)
