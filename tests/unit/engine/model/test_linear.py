"""Small linear maps with the same input are joined into one product without copies of the weights."""

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
from rapid_integrations.engine.model.linear import LinearGroup, LinearMap
from rapid_integrations.engine.model.quantized import Int8Linear, quantize_linears


def layers(*outputs: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    torch.manual_seed(sum(outputs))
    return [nn.Linear(16, size, bias=bias, dtype=dtype) for size in outputs]


def check(group: LinearGroup, modules: list[nn.Module], dtype: torch.dtype = torch.float32) -> None:
    hidden = torch.randn(5, 16, dtype=dtype)
    expected = [module(hidden) for module in modules]
    torch.testing.assert_close(group.concatenated(hidden), torch.cat(expected, -1))
    for found in (group.separate(hidden), [part(hidden) for part in group.parts]):
        for output, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(output, wanted)


def joined(group: LinearGroup) -> LinearMap:
    joined_map = group._valid_join()
    assert joined_map is not None
    return joined_map


def num_storages(*tensors: torch.Tensor) -> int:
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [(24, 8), (8, 8, 24)])
def test_weights_are_joined_in_one_storage(bias, outputs) -> None:
    modules = layers(*outputs, bias=bias)
    before = [parameter for module in modules for parameter in module.parameters()]
    values = [parameter.detach().clone() for parameter in before]
    group = LinearGroup(*modules)
    check(group, modules)
    assert num_storages(joined(group).weight, *(module.weight for module in modules)) == 1
    after = [parameter for module in modules for parameter in module.parameters()]
    assert all(old is new for old, new in zip(before, after, strict=True))
    assert all(torch.equal(parameter, value) for parameter, value in zip(after, values, strict=True))
    assert all(parameter.requires_grad for parameter in after)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_changes_of_the_parameters_have_effect(name) -> None:
    modules = layers(8, 8, bias=True)
    group = LinearGroup(*modules)
    with torch.no_grad():
        modules[1].weight.mul_(3)
        modules[1].bias.add_(1)
    check(group, modules)
    assert num_storages(joined(group).weight, *(module.weight for module in modules)) == 1
    parameter = getattr(modules[1], name)
    parameter.data = torch.randn_like(parameter)
    for _ in range(2):
        check(group, modules)
    assert group._valid_join() is None, "from then on the maps are computed separately"


def test_two_groups_of_the_same_layers_give_correct_results() -> None:
    modules = layers(8, 8, 24, bias=True)
    first, second, last = LinearGroup(*modules), LinearGroup(*modules), LinearGroup(*modules[1:])
    for _ in range(2):
        check(first, modules)
        check(last, modules[1:])
        check(second, modules)


def test_groups_that_share_a_parameter_give_correct_results() -> None:
    left, right, shared = layers(8, 8, 8)
    first, second = LinearGroup(left, shared), LinearGroup(shared, right)
    with torch.no_grad():
        shared.weight.mul_(2)
    for _ in range(2):
        check(first, [left, shared])
        check(second, [shared, right])


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_only_float32_layers_are_joined(kind) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    modules: list[nn.Module] = list(layers(8, 24, bias=True, dtype=dtype))
    if kind == "int8":
        modules = [Int8Linear(layer) for layer in modules]
    addresses = [module.weight.data_ptr() for module in modules]
    group = LinearGroup(*modules)
    check(group, modules, dtype)
    assert group._valid_join() is None
    assert [module.weight.data_ptr() for module in modules] == addresses


def test_large_layers_are_not_joined(monkeypatch) -> None:
    modules = layers(8, 24)
    monkeypatch.setattr(linear, "_MAX_JOINED", 32 * 16 - 1)
    before = [module.weight.data_ptr() for module in modules]
    group = LinearGroup(*modules)
    check(group, modules)
    assert [module.weight.data_ptr() for module in modules] == before
    monkeypatch.setattr(linear, "_MAX_JOINED", 32 * 16)
    check(LinearGroup(*modules), modules)
    assert num_storages(*(module.weight for module in modules)) == 1


class _Quantised(torch.Tensor):
    pass


def test_layers_of_different_kinds_are_not_joined() -> None:
    plain, other = layers(8, 24)
    (with_bias,), (half,) = layers(8, bias=True), layers(8, dtype=torch.bfloat16)
    quantised = layers(8)[0]
    quantised.weight = nn.Parameter(quantised.weight.detach().as_subclass(_Quantised), requires_grad=False)
    hidden = torch.randn(3, 16)
    for modules in ([plain, with_bias], [plain, Int8Linear(other)], [plain, quantised]):
        group = LinearGroup(*modules)
        expected = torch.cat([module(hidden) for module in modules], -1).as_subclass(torch.Tensor)
        torch.testing.assert_close(group.concatenated(hidden).as_subclass(torch.Tensor), expected)
        assert num_storages(*(module.weight for module in modules)) == 2
    LinearGroup(plain, half)
    assert num_storages(plain.weight, half.weight) == 2


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("int8", [False, True])
def test_an_adopted_model_takes_no_more_memory_and_is_saved_as_before(
    architecture, int8, tmp_path: Path
) -> None:
    def tensors(model: nn.Module) -> list[torch.Tensor]:
        return [*model.parameters(), *model.buffers()]

    def num_bytes(*used: torch.Tensor) -> int:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in used}
        return sum(storage.nbytes() for storage in storages.values())

    model, untouched = tiny_model(architecture), tiny_model(architecture)
    if int8:
        quantize_linears(model)
        quantize_linears(untouched)
    adopted = CausalModel(model)
    adopted.forward([Step(SequenceKV(8), [5, 6, 7])])
    assert adopted._lean is not None
    groups = [group for layer in adopted._lean._layers for group in (layer.query_key_value, layer.gate_up)]
    assert all((group._valid_join() is None) == int8 for group in groups)
    read = [] if int8 else [tensor for group in groups for tensor in linear._tensors(joined(group))]
    assert num_bytes(*tensors(model), *read) == num_bytes(*tensors(untouched))
    assert all(torch.equal(one, other) for one, other in zip(tensors(model), tensors(untouched), strict=True))
    if not int8:
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        for name, value in untouched.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


def test_a_copy_of_an_adopted_model_is_independent() -> None:
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
