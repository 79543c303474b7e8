"""Small linear maps of one input are one product over the modules' own memory."""

import copy
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.model import linear as linear_map
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.model.linear import LinearMap, LinearMaps
from rapid_integrations.engine.model.quantized import Int8Linear, quantize_linears


def layers(*outputs: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    torch.manual_seed(sum(outputs))
    return [nn.Linear(16, size, bias=bias, dtype=dtype) for size in outputs]


def check(maps: LinearMaps, modules: list[nn.Module], dtype: torch.dtype = torch.float32) -> None:
    hidden = torch.randn(5, 16, dtype=dtype)
    expected = [module(hidden) for module in modules]
    torch.testing.assert_close(maps.side_by_side(hidden), torch.cat(expected, -1))
    for found in (maps.apart(hidden), [part(hidden) for part in maps.parts]):
        for one, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(one, wanted)


def joined(maps: LinearMaps) -> LinearMap:
    one = maps._one()
    assert one is not None
    return one


def num_storages(*tensors: torch.Tensor) -> int:
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [(24, 8), (8, 8, 24)])
def test_outputs_lie_side_by_side_and_weights_one_below_the_other(bias, dtype, outputs) -> None:
    modules = layers(*outputs, bias=bias, dtype=dtype)
    before = [parameter for module in modules for parameter in module.parameters()]
    values = [parameter.detach().clone() for parameter in before]
    maps = LinearMaps(*modules)
    check(maps, modules, dtype)
    assert num_storages(joined(maps).weight, *(module.weight for module in modules)) == 1
    after = [parameter for module in modules for parameter in module.parameters()]
    assert all(one is other for one, other in zip(before, after, strict=True)), "parameters stay who they are"
    assert all(torch.equal(parameter, value) for parameter, value in zip(after, values, strict=True))
    assert all(parameter.requires_grad for parameter in after)


def test_what_changes_in_a_module_changes_in_the_map() -> None:
    modules = layers(8, 8, bias=True)
    maps = LinearMaps(*modules)
    with torch.no_grad():
        modules[1].weight.mul_(3)
        modules[1].bias.add_(1)
    check(maps, modules)
    modules[0].weight.data = torch.randn(8, 16)
    check(maps, modules)
    modules[1].bias.data = torch.randn(8)
    check(maps, modules)
    assert num_storages(joined(maps).weight, *(module.weight for module in modules)) == 1


def test_two_maps_of_the_same_layers_stay_right() -> None:
    modules = layers(8, 8, 24, bias=True)
    every, again, last = LinearMaps(*modules), LinearMaps(*modules), LinearMaps(*modules[1:])
    for _ in range(2):
        check(every, modules)
        check(last, modules[1:])
        check(again, modules)


def test_a_parameter_that_two_groups_share_stays_right() -> None:
    one, two, shared = layers(8, 8, 8)
    first, second = LinearMaps(one, shared), LinearMaps(shared, two)
    with torch.no_grad():
        shared.weight.mul_(2)
    for _ in range(2):
        check(first, [one, shared])
        check(second, [shared, two])


def test_8_bit_layers_are_joined_too() -> None:
    modules = [Int8Linear(layer) for layer in layers(8, 24, bias=True)]
    maps = LinearMaps(*modules)
    check(maps, modules)
    assert num_storages(joined(maps).weight, *(module.weight for module in modules)) == 1


def test_the_memory_of_large_layers_stays_where_it_is(monkeypatch) -> None:
    modules = layers(8, 24)
    monkeypatch.setattr(linear_map, "_MAX_JOINED", 32 * 16 - 1)
    before = [module.weight.data_ptr() for module in modules]
    maps = LinearMaps(*modules)
    check(maps, modules)
    assert [module.weight.data_ptr() for module in modules] == before
    monkeypatch.setattr(linear_map, "_MAX_JOINED", 32 * 16)
    check(LinearMaps(*modules), modules)
    assert num_storages(*(module.weight for module in modules)) == 1


class _Quantised(torch.Tensor):
    pass


def test_layers_of_different_kinds_stay_apart() -> None:
    plain, other = layers(8, 24)
    (with_bias,), (half,) = layers(8, bias=True), layers(8, dtype=torch.bfloat16)
    quantised = layers(8)[0]
    quantised.weight = nn.Parameter(quantised.weight.detach().as_subclass(_Quantised), requires_grad=False)
    hidden = torch.randn(3, 16)
    for modules in ([plain, with_bias], [plain, Int8Linear(other)], [plain, quantised]):
        maps = LinearMaps(*modules)
        expected = torch.cat([module(hidden) for module in modules], -1).as_subclass(torch.Tensor)
        torch.testing.assert_close(maps.side_by_side(hidden).as_subclass(torch.Tensor), expected)
        assert num_storages(*(module.weight for module in modules)) == 2
    LinearMaps(plain, half)
    assert num_storages(plain.weight, half.weight) == 2


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("int8", [False, True])
def test_an_adopted_model_takes_no_more_memory_and_is_saved_as_before(
    architecture, int8, tmp_path: Path
) -> None:
    def tensors(model: nn.Module) -> list[torch.Tensor]:
        return [*model.parameters(), *model.buffers()]

    def num_bytes(*held: torch.Tensor) -> int:
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in held}
        return sum(storage.nbytes() for storage in storages.values())

    model, untouched = tiny_model(architecture), tiny_model(architecture)
    if int8:
        quantize_linears(model)
        quantize_linears(untouched)
    adopted = CausalModel(model)
    adopted.forward([Step(SequenceKV(8), [5, 6, 7])])
    assert adopted._lean is not None
    read = [
        tensor
        for layer in adopted._lean._layers
        for maps in (layer.query_key_value, layer.gate_up)
        for tensor in joined(maps).tensors()
        if tensor is not None
    ]
    assert num_bytes(*tensors(model), *read) == num_bytes(*tensors(untouched))
    assert all(torch.equal(one, other) for one, other in zip(tensors(model), tensors(untouched), strict=True))
    if not int8:
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        for name, value in untouched.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


def test_a_copy_of_an_adopted_model_is_its_own() -> None:
    adopted = CausalModel(tiny_model("llama"))
    copied = copy.deepcopy(adopted)
    expected = adopted.forward([Step(SequenceKV(8), [5, 6, 7])])
    with torch.no_grad():
        for parameter in copied.model.parameters():
            parameter.mul_(2)
    assert not torch.allclose(copied.forward([Step(SequenceKV(8), [5, 6, 7])]), expected)
    assert torch.equal(adopted.forward([Step(SequenceKV(8), [5, 6, 7])]), expected)


def test_a_model_adopted_in_inference_mode_can_be_trained() -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        adopted = CausalModel(model)
    assert adopted.lean
    model(torch.tensor([[5, 6, 7]]), use_cache=False).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_made_in_inference_mode_is_adopted() -> None:
    with torch.inference_mode():
        model = tiny_model("llama")
    assert CausalModel(model).lean
