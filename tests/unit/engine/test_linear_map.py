"""Linear maps of one input are one product over the modules' own memory."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from rapid_integrations.engine.int8 import Int8Linear, quantize_linears
from rapid_integrations.engine.kv import SequenceKV
from rapid_integrations.engine.linear_map import linear_map
from rapid_integrations.engine.model import CausalModel, Step


def layers(*outputs: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    torch.manual_seed(sum(outputs))
    return [nn.Linear(16, size, bias=bias, dtype=dtype) for size in outputs]


def side_by_side(modules: list[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
    return torch.cat([module(hidden) for module in modules], -1)


def memory(*tensors: torch.Tensor) -> int:
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [(24,), (24, 8), (8, 8, 24)])
def test_outputs_lie_side_by_side_and_weights_one_below_the_other(bias, dtype, outputs) -> None:
    modules = layers(*outputs, bias=bias, dtype=dtype)
    before = [parameter for module in modules for parameter in module.parameters()]
    values = [parameter.detach().clone() for parameter in before]
    hidden = torch.randn(5, 16, dtype=dtype)
    expected = side_by_side(modules, hidden)
    joined = linear_map(*modules)
    torch.testing.assert_close(joined(hidden), expected)
    assert memory(*(module.weight for module in modules)) == 1
    after = [parameter for module in modules for parameter in module.parameters()]
    assert all(one is other for one, other in zip(before, after, strict=True)), "parameters stay who they are"
    assert all(torch.equal(parameter, value) for parameter, value in zip(after, values, strict=True))
    assert all(parameter.requires_grad for parameter in after)


def test_what_changes_in_a_module_changes_in_the_map() -> None:
    modules = layers(8, 8, bias=True)
    joined = linear_map(*modules)
    with torch.no_grad():
        modules[1].weight.mul_(3)
        modules[1].bias.add_(1)
    hidden = torch.randn(2, 16)
    torch.testing.assert_close(joined(hidden), side_by_side(modules, hidden))


def test_another_map_of_the_same_layers_holds_nothing_more() -> None:
    modules = layers(8, 8, 24, bias=True)
    every = linear_map(*modules)
    again, last = linear_map(*modules), linear_map(*modules[1:])
    assert memory(every.weight, again.weight, last.weight, *(module.weight for module in modules)) == 1
    assert memory(every.bias, again.bias, last.bias, *(module.bias for module in modules)) == 1
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(last(hidden), every(hidden)[:, 8:])


def test_8_bit_layers_are_joined_too() -> None:
    modules = [Int8Linear(layer) for layer in layers(8, 24, bias=True)]
    hidden = torch.randn(5, 16)
    expected = side_by_side(modules, hidden)
    joined = linear_map(*modules)
    assert torch.equal(joined(hidden), expected)
    assert torch.equal(side_by_side(modules, hidden), expected)
    assert memory(*(module.weight for module in modules)) == 1


class _Quantised(torch.Tensor):
    pass


def test_layers_of_different_kinds_stay_apart() -> None:
    plain, other = layers(8, 24)
    (with_bias,), (half,) = layers(8, bias=True), layers(8, dtype=torch.bfloat16)
    quantised = layers(8)[0]
    quantised.weight = nn.Parameter(quantised.weight.detach().as_subclass(_Quantised), requires_grad=False)
    hidden = torch.randn(3, 16)
    for modules in ([plain, with_bias], [plain, Int8Linear(other)], [plain, quantised]):
        joined = linear_map(*modules)
        torch.testing.assert_close(joined(hidden), side_by_side(modules, hidden).as_subclass(torch.Tensor))
        assert memory(*(module.weight for module in modules)) == 2
    linear_map(plain, half)
    assert memory(plain.weight, half.weight) == 2


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("int8", [False, True])
def test_an_adopted_model_takes_no_more_memory_and_is_saved_as_before(
    architecture, int8, tmp_path: Path
) -> None:
    def tensors(model: nn.Module) -> list[torch.Tensor]:
        return [*model.parameters(), *model.buffers()]

    def num_bytes(model: nn.Module) -> int:
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors(model)}
        return sum(storage.nbytes() for storage in storages.values())

    model, untouched = tiny_model(architecture), tiny_model(architecture)
    if int8:
        quantize_linears(model)
        quantize_linears(untouched)
    adopted = CausalModel(model)
    assert adopted.lean
    adopted.forward([Step(SequenceKV(8), [5, 6, 7])])
    assert num_bytes(model) == num_bytes(untouched)
    assert all(torch.equal(one, other) for one, other in zip(tensors(model), tensors(untouched), strict=True))
    if not int8:
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        for name, value in untouched.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


def test_a_model_made_for_inference_only_is_adopted() -> None:
    with torch.inference_mode():
        model = tiny_model("llama")
    assert CausalModel(model).lean
