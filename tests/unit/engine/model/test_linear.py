"""Small float32 maps of one input are one product over the memory of the modules' parameters."""

import copy
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.model import linear
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.model.linear import LinearGroup
from rapid_integrations.engine.model.quantized import Int8Linear, quantize_linears

TOKENS = [5, 6, 7]


def layers(*outputs: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    torch.manual_seed(sum(outputs))
    return [nn.Linear(16, size, bias=bias, dtype=dtype) for size in outputs]


def check(group: LinearGroup, modules: list[nn.Module], dtype: torch.dtype = torch.float32) -> None:
    """A group computes what its modules compute, together and one by one."""
    hidden = torch.randn(5, 16, dtype=dtype)
    expected = [module(hidden) for module in modules]
    torch.testing.assert_close(group.concatenated(hidden), torch.cat(expected, -1))
    for outputs in (group.separate(hidden), [part(hidden) for part in group.parts]):
        for output, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, wanted)


def num_storages(*tensors: torch.Tensor) -> int:
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors})


def is_joined(group: LinearGroup, modules: list[nn.Module]) -> bool:
    joined = group._valid_join()
    if joined is None:
        return False
    assert num_storages(joined.weight, *(module.weight for module in modules)) == 1
    return True


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [(24, 8), (8, 8, 24)])
def test_joined_parameters_keep_identity_and_values(bias, outputs) -> None:
    modules = layers(*outputs, bias=bias)
    before = [parameter for module in modules for parameter in module.parameters()]
    values = [parameter.detach().clone() for parameter in before]
    group = LinearGroup(*modules)
    check(group, modules)
    assert is_joined(group, modules)
    after = [parameter for module in modules for parameter in module.parameters()]
    assert all(left is right for left, right in zip(before, after, strict=True))
    assert all(torch.equal(parameter, value) for parameter, value in zip(after, values, strict=True))
    assert all(parameter.requires_grad for parameter in after)


def test_changes_in_place_have_effect() -> None:
    modules = layers(8, 8, bias=True)
    group = LinearGroup(*modules)
    with torch.no_grad():
        modules[1].weight.mul_(3)
        modules[1].bias.add_(1)
    check(group, modules)
    assert is_joined(group, modules)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_with_other_memory_separates_the_maps(name) -> None:
    modules = layers(8, 8, bias=True)
    group = LinearGroup(*modules)
    parameter = getattr(modules[1], name)
    parameter.data = torch.randn(parameter.shape)
    check(group, modules)
    assert not is_joined(group, modules)
    with torch.no_grad():
        modules[0].weight.mul_(3)
    check(group, modules)


def test_groups_that_share_layers_stay_correct() -> None:
    modules = layers(8, 8, 24, bias=True)
    groups = [(LinearGroup(*chosen), chosen) for chosen in (modules, modules, modules[1:])]
    with torch.no_grad():
        modules[1].weight.mul_(2)
    for group, chosen in groups:
        check(group, chosen)


def test_the_memory_of_large_layers_does_not_move(monkeypatch) -> None:
    modules = layers(8, 24)
    monkeypatch.setattr(linear, "_MAX_JOINED", 32 * 16 - 1)
    before = [module.weight.data_ptr() for module in modules]
    group = LinearGroup(*modules)
    check(group, modules)
    assert not is_joined(group, modules)
    assert [module.weight.data_ptr() for module in modules] == before
    monkeypatch.setattr(linear, "_MAX_JOINED", 32 * 16)
    assert is_joined(LinearGroup(*modules), modules)


class _Quantised(torch.Tensor):
    pass


def _quantised() -> nn.Linear:
    (layer,) = layers(8)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(_Quantised), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers(8, 24, dtype=torch.bfloat16),
        lambda: [Int8Linear(layer) for layer in layers(8, 24)],
        lambda: [*layers(8), *layers(8, bias=True)],
        lambda: [*layers(8), Int8Linear(layers(24)[0])],
        lambda: [*layers(24), _quantised()],
    ],
    ids=["bfloat16", "int8", "one bias", "one int8", "one quantised"],
)
def test_other_layers_are_not_joined(make) -> None:
    modules = make()
    group = LinearGroup(*modules)
    assert not is_joined(group, modules)
    assert num_storages(*(module.weight for module in modules)) == 2
    hidden = torch.randn(3, 16).to(torch.bfloat16 if modules[0].weight.dtype == torch.bfloat16 else None)
    expected = torch.cat([module(hidden) for module in modules], -1).as_subclass(torch.Tensor)
    torch.testing.assert_close(group.concatenated(hidden).as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("int8", [False, True])
def test_an_adopted_model_takes_no_more_memory_and_is_saved_as_before(
    architecture, int8, tmp_path: Path
) -> None:
    def tensors(model: nn.Module) -> list[torch.Tensor]:
        return [*model.parameters(), *model.buffers()]

    def num_bytes(*held: torch.Tensor) -> int:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in held}
        return sum(storage.nbytes() for storage in storages.values())

    model, untouched = tiny_model(architecture), tiny_model(architecture)
    if int8:
        quantize_linears(model)
        quantize_linears(untouched)
    adopted = CausalModel(model)
    adopted.forward([Step(SequenceKV(8), TOKENS)])
    assert adopted.lean_decoder is not None
    groups = [
        group for layer in adopted.lean_decoder._layers for group in (layer.query_key_value, layer.gate_up)
    ]
    joined = [group._joined.weight for group in groups if group._joined is not None]
    assert len(joined) == (0 if int8 else len(groups))
    assert num_bytes(*tensors(model), *joined) == num_bytes(*tensors(untouched))
    assert all(
        torch.equal(left, right) for left, right in zip(tensors(model), tensors(untouched), strict=True)
    )
    if not int8:
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        for name, value in untouched.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


def test_a_copy_of_an_adopted_model_is_independent() -> None:
    adopted = CausalModel(tiny_model("llama"))
    copied = copy.deepcopy(adopted)
    expected = adopted.forward([Step(SequenceKV(8), TOKENS)])
    with torch.no_grad():
        for parameter in copied.model.parameters():
            parameter.mul_(2)
    assert not torch.allclose(copied.forward([Step(SequenceKV(8), TOKENS)]), expected)
    assert torch.equal(adopted.forward([Step(SequenceKV(8), TOKENS)]), expected)


def test_a_model_adopted_in_inference_mode_can_be_trained() -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        adopted = CausalModel(model)
    assert adopted.lean
    model(torch.tensor([TOKENS]), use_cache=False).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_made_in_inference_mode_is_adopted() -> None:
    with torch.inference_mode():
        model = tiny_model("llama")
    assert CausalModel(model).lean
