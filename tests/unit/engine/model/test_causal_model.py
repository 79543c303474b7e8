"""Packed passes against each model's own forward pass, and the models that are rejected."""

import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers.tiny_models import _SHAPE, ARCHITECTURES, VOCAB, reference_generate, tiny_model
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from rapid_integrations.engine.attention.packed import PACKED
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.errors import UnsupportedModelError

LENGTH = 60
WINDOWS = {"mistral": (5, 24, 500), "gemma3": (5, 24, 500)}
VARIANTS = [
    *[(name, {"sliding_window": window}) for name, windows in WINDOWS.items() for window in windows],
    *[(name, {}) for name in ARCHITECTURES if name not in WINDOWS],
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1}),
    ("llama", {"head_dim": 24}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "hidden_act": "gelu"}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
]
LEAN = {"llama", "mistral", "qwen2", "qwen3"}


def texts(count: int, length: int = LENGTH) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for _ in range(count)]


def own_logits(model: PreTrainedModel, text: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([text]), use_cache=False).logits[0]


def label(value: Any) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize(("architecture", "overrides"), VARIANTS, ids=label)
def test_ragged_chunks_and_rollbacks_reproduce_the_model_s_own_logits(
    architecture, overrides, checked
) -> None:
    model = CausalModel(tiny_model(architecture, **overrides), check=checked)
    assert model.lean == (checked and architecture in LEAN)
    expected = [own_logits(tiny_model(architecture, **overrides), text) for text in texts(3)]
    rng = random.Random(0)
    caches = [SequenceKV(rng.choice([1, 16, 100])) for _ in expected]
    compared = 0
    tolerance = {"rtol": 1e-3, "atol": 2e-3 * float(expected[0].std())}
    while any(cache.length < LENGTH for cache in caches):
        chosen = [i for i, cache in enumerate(caches) if cache.length < LENGTH and rng.random() < 0.8]
        steps = []
        for index in chosen:
            start = caches[index].length
            count = min(rng.choice([1, 1, 2, 5, 17]), LENGTH - start)
            steps.append(Step(caches[index], texts(3)[index][start : start + count], rng.randint(0, count)))
        if not steps:
            continue
        logits = torch.split(model.forward(steps), [step.num_logits for step in steps])
        for index, step, rows in zip(chosen, steps, logits, strict=True):
            end = caches[index].length
            torch.testing.assert_close(rows, expected[index][end - step.num_logits : end], **tolerance)
            compared += len(rows)
            if rng.random() < 0.4:
                caches[index].rollback(end - rng.randint(1, 6))
    assert compared > LENGTH


def test_logits_are_in_the_order_of_the_steps() -> None:
    model = CausalModel(tiny_model("llama"))
    first, second = texts(2, 6)
    assert model.forward([Step(SequenceKV(8), first, 0)]).shape == (0, VOCAB)
    assert model.forward([Step(SequenceKV(8), first, 0), Step(SequenceKV(8), second, 0)]).shape == (0, VOCAB)
    both = model.forward([Step(SequenceKV(8), first, 1), Step(SequenceKV(8), second, 3)])
    assert both.shape == (4, VOCAB)
    assert both.dtype == torch.float32
    torch.testing.assert_close(both[0], own_logits(tiny_model("llama"), first)[-1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(both[1:], own_logits(tiny_model("llama"), second)[3:], rtol=1e-3, atol=1e-3)


def test_a_failed_pass_does_not_change_the_lengths_of_caches() -> None:
    model = CausalModel(tiny_model("llama"))
    cache = SequenceKV(8)
    model.forward([Step(cache, [5, 6, 7])])
    with pytest.raises(IndexError):
        model.forward([Step(cache, [VOCAB + 5])])
    assert cache.length == 3
    text = [5, 6, 7, 8]
    logits = model.forward([Step(cache, [8])])
    torch.testing.assert_close(logits[0], own_logits(tiny_model("llama"), text)[-1], rtol=1e-3, atol=1e-3)


# The lean forward pass -------------------------------------------------------------------------------------


def lean_and_own_logits(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    text = texts(1)[0]
    checked, unchecked = CausalModel(model), CausalModel(model, check=False)
    assert checked.lean
    assert not unchecked.lean
    lean, own = (m.forward([Step(SequenceKV(80), text, 9)]) for m in (checked, unchecked))
    return lean, own


def test_the_lean_pass_skips_unwanted_tokens_in_the_last_layer() -> None:
    model = CausalModel(tiny_model("qwen3"))
    assert model._lean is not None
    rows: list[list[tuple[str, int]]] = [[] for _ in model._lean._layers]
    for layer, seen in zip(model._lean._layers, rows, strict=True):
        for owner, name in (
            (layer.query_key_value, "concatenated"),
            (layer, "key"),
            (layer, "query"),
            (layer, "down"),
        ):
            projection = getattr(owner, name)

            def counted(hidden, projection=projection, seen=seen, name=name):
                seen.append((name, len(hidden)))
                return projection(hidden)

            setattr(owner, name, counted)
    texts_of_ten = texts(3, 10)
    model.forward([Step(SequenceKV(10), text, n) for text, n in zip(texts_of_ten, (0, 3, 1), strict=True)])
    inner = [("concatenated", 30), ("down", 30)]
    assert rows == [inner, inner, [("key", 30), ("query", 4), ("down", 4)]]


def test_a_lean_pass_that_selects_the_wrong_tokens_is_rejected(monkeypatch) -> None:
    def first(batch, tokens):
        return tokens[: sum(batch.num_logits)]

    monkeypatch.setattr("rapid_integrations.engine.attention.packed.PackedBatch.select_wanted", first)
    assert not CausalModel(tiny_model("llama")).lean


@pytest.mark.parametrize("architecture", sorted(LEAN))
def test_the_lean_pass_rounds_as_the_modelling_code_does(architecture) -> None:
    lean, own = lean_and_own_logits(tiny_model(architecture))
    torch.testing.assert_close(lean, own, rtol=1e-5, atol=1e-5 * float(own.std()))


def test_the_lean_pass_supports_bfloat16() -> None:
    lean, own = lean_and_own_logits(tiny_model("qwen3").to(torch.bfloat16))
    torch.testing.assert_close(lean, own, rtol=0.1, atol=0.1 * float(own.std()))


def test_the_lean_pass_extends_its_table_of_angles() -> None:
    model = tiny_model("llama", max_position_embeddings=8192)
    text = texts(1, 5000)[0]
    checked, unchecked = CausalModel(model), CausalModel(model, check=False)
    caches = SequenceKV(5000), SequenceKV(5000)
    for start in range(0, 5000, 1000):
        lean, own = (
            m.forward([Step(cache, text[start : start + 1000], 3)])
            for m, cache in zip((checked, unchecked), caches, strict=True)
        )
        torch.testing.assert_close(lean, own, rtol=1e-4, atol=1e-4)


def test_angles_are_computed_only_for_blocks_that_are_needed() -> None:
    # As with a prefix from disk.
    model, text = tiny_model("llama", max_position_embeddings=8192), texts(1, 5000)[0]
    known = SequenceKV(5000)
    CausalModel(model).forward([Step(known, text[:4900], 0)])
    later = CausalModel(model)
    assert later._lean is not None
    rotary, asked = later._lean._rotary, []
    compute = rotary._compute

    def counted(like: torch.Tensor, positions: torch.Tensor) -> Any:
        asked.extend(positions[0].tolist())
        return compute(like, positions)

    rotary._compute = counted
    cache = known.copy_prefix(4900, 5000)
    for start in range(4900, 4990, 10):
        found = later.forward([Step(cache, text[start : start + 10], 1), Step(SequenceKV(8), [5, 6], 1)])
    assert asked == list(range(4608, 5120)), "once; the first block is known from the self-check"
    expected = own_logits(model, text[:4990])[-1]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def test_changes_of_weights_in_place_have_effect() -> None:
    model = tiny_model("llama")
    checked = CausalModel(model)
    before = checked.forward([Step(SequenceKV(8), [5, 6, 7])])
    model.load_state_dict(tiny_model("llama", seed=1).state_dict())
    after = checked.forward([Step(SequenceKV(8), [5, 6, 7])])
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after[0], own_logits(model, [5, 6, 7])[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", sorted(LEAN))
def test_replaced_data_of_weights_has_effect(architecture) -> None:
    model, other = tiny_model(architecture), tiny_model(architecture, seed=1)
    checked = CausalModel(model)
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(other.parameters()), model.parameters()
    )
    after = checked.forward([Step(SequenceKV(8), [5, 6, 7], 2)])
    torch.testing.assert_close(after, own_logits(other, [5, 6, 7])[-2:], rtol=1e-4, atol=1e-4)


def test_layers_with_fewer_heads_than_the_config_says_are_run_lean() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    width, kept = attention.head_dim, attention.num_key_value_groups
    for name, heads in (("q_proj", kept), ("k_proj", 1), ("v_proj", 1)):
        linear = getattr(attention, name)
        linear.weight = torch.nn.Parameter(linear.weight.detach()[: heads * width].clone())
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight.detach()[:, : kept * width].clone())
    checked = CausalModel(model)
    assert checked.lean
    logits = checked.forward([Step(SequenceKV(8), [5, 6, 7], 3)])
    torch.testing.assert_close(logits, own_logits(model, [5, 6, 7]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_at_import_does_not_matter(dtype) -> None:
    script = (
        f"import torch; torch.set_default_dtype({dtype})\n"
        "from rapid_integrations.engine.attention.packed import _ZERO\n"
        "assert _ZERO.dtype == torch.float32"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def _hooked(model: PreTrainedModel) -> None:
    model.model.layers[1].register_forward_hook(lambda module, arguments, output: output * 1.5)


class _Adapted(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().forward(input)


def _adapted(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj = _Adapted(64, 128, bias=False)


def _wrapped(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Dropout(0.5))


class _AdaptedHead(torch.nn.Module):
    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 1.5 * torch.nn.functional.linear(hidden, self.weight)


def _adapted_head(model: PreTrainedModel) -> None:
    model.lm_head = _AdaptedHead(model.lm_head)


@pytest.mark.parametrize("change", [_hooked, _adapted, _wrapped, _adapted_head])
def test_models_with_changed_parts_are_run_by_their_own_code(change) -> None:
    model = tiny_model("llama")
    change(model.eval())
    checked = CausalModel(model)
    assert not checked.lean
    logits = checked.forward([Step(SequenceKV(8), [5, 6, 7])])
    torch.testing.assert_close(logits[0], own_logits(model, [5, 6, 7])[-1], rtol=1e-4, atol=1e-4)


def test_a_lean_pass_with_other_results_is_rejected(monkeypatch) -> None:
    monkeypatch.setattr("rapid_integrations.engine.model.decoder._rotate", lambda heads, cos, sin: heads)
    model = CausalModel(tiny_model("llama"))
    assert not model.lean
    logits = model.forward([Step(SequenceKV(8), [5, 6, 7])])
    torch.testing.assert_close(
        logits[0], own_logits(tiny_model("llama"), [5, 6, 7])[-1], rtol=1e-4, atol=1e-4
    )


# Other users of the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adopted_model_generates_for_its_owner_as_before(architecture) -> None:
    prompt = texts(1, 40)[0]
    expected = reference_generate(tiny_model(architecture), prompt, 12)
    adopted = tiny_model(architecture)
    CausalModel(adopted).forward([Step(SequenceKV(8), [5, 6, 7])])
    assert adopted.config._attn_implementation == PACKED
    ids = torch.tensor([prompt, prompt])
    mask = torch.ones_like(ids)
    mask[1, :10] = 0  # left padding, which needs a mask
    output = adopted.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    plain = tiny_model(architecture)
    plain.set_attn_implementation("sdpa")
    wanted = plain.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(output, wanted)
    assert output[0, 40 : 40 + len(expected)].tolist() == expected


# Rejections ------------------------------------------------------------------------------------------------


def test_the_self_check_detects_wrong_attention(monkeypatch) -> None:
    honest = AttentionInterface()[PACKED]

    def forgetful(module, query, key, value, attention_mask, **kwargs):
        output, weights = honest(module, query, key, value, attention_mask, **kwargs)
        return (output * 0.5 if attention_mask is None and query.shape[0] == 1 else output), weights

    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED, forgetful)
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM\) failed the self-check: .* off by"):
        CausalModel(model, name="mine")
    assert model.config._attn_implementation == "eager", "a rejected model is unchanged"


def test_the_self_check_detects_state_that_is_not_rolled_back(monkeypatch) -> None:
    monkeypatch.setattr(SequenceKV, "rollback", lambda self, length: None)
    with pytest.raises(UnsupportedModelError, match="failed the self-check"):
        CausalModel(tiny_model("qwen2"))


def test_a_recurrent_model_is_rejected() -> None:
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(UnsupportedModelError, match=r"'snake' \(MambaForCausalLM\) keeps recurrent state"):
        CausalModel(MambaForCausalLM(config), name="snake")


def gemma2() -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {**_SHAPE, "head_dim": 16, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 1}
    return Gemma2ForCausalLM._from_config(Gemma2Config(**settings), attn_implementation="eager").eval()


def test_a_model_with_a_score_cap_is_rejected_and_unchanged() -> None:
    model = gemma2()
    text = texts(1, 20)[0]
    before = own_logits(model, text)
    with pytest.raises(UnsupportedModelError, match="caps its attention scores"):
        CausalModel(model)
    assert torch.equal(own_logits(model, text), before)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_angles_that_depend_on_the_batch_are_rejected(kind) -> None:
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        model = tiny_model("llama", rope_parameters=rope)
    else:
        rope = {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8, "original_max_position_embeddings": 64,
        }  # fmt: skip
        model = Phi3ForCausalLM(Phi3Config(**{**_SHAPE, "rope_parameters": rope}))
    with pytest.raises(UnsupportedModelError, match=f"uses {kind} rotary scaling"):
        CausalModel(model)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_other_rotary_scalings_are_supported(kind) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    if kind != "linear":
        rope["original_max_position_embeddings"] = 512
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert CausalModel(tiny_model("llama", rope_parameters=rope)).vocab_size == VOCAB


def test_unsupported_layer_types_are_rejected() -> None:
    model = tiny_model("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention", "linear_attention"]
    with pytest.raises(UnsupportedModelError, match="layers of type chunked_attention, linear_attention"):
        CausalModel(model)


# Properties of a model -----------------------------------------------------------------------------------


def test_properties_of_a_model() -> None:
    model = CausalModel(tiny_model("gemma3"), name="mine")
    assert (model.name, model.vocab_size, model.context_window) == ("mine", VOCAB, 2048)
    assert model.eos_token_ids == {2}
    assert CausalModel(tiny_model("llama")).name == "LlamaForCausalLM"


@pytest.mark.parametrize(("configured", "wanted"), [(None, {2}), (7, {7}), ([7, 9], {7, 9})])
def test_end_tokens_come_from_the_generation_config_first(configured, wanted) -> None:
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(eos_token_id=configured)
    assert CausalModel(model, check=False).eos_token_ids == wanted


def test_a_model_in_training_mode_is_switched_to_inference() -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    text = texts(1, 10)[0]
    expected = own_logits(tiny_model("llama"), text)
    logits = CausalModel(model).forward([Step(SequenceKV(16), text, 10)])
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
