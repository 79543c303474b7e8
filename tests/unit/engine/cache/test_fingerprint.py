"""A fingerprint depends on everything that changes a model's results, and on nothing else."""

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import tiny_model
from torch.testing._internal.two_tensor import TwoTensor
from transformers import LlamaForCausalLM, PreTrainedModel

from rapid_integrations.engine.cache.fingerprint import fingerprint
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.errors import ConfigurationError


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


def test_it_does_not_depend_on_where_the_model_was_loaded_from(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert fingerprint(again) == fingerprint(model) == fingerprint(tiny_model("llama"))


def test_the_engine_s_own_attention_does_not_change_it(model) -> None:
    before = fingerprint(model)
    identity = CausalModel(model).identity()
    assert fingerprint(model) == identity.fingerprint
    assert identity.fingerprint == CausalModel(tiny_model("llama")).identity().fingerprint
    assert len(before) == 64


@pytest.mark.parametrize("place", [0, 1, 777, -2, -1])
def test_every_weight_changes_it(model, place) -> None:
    before = fingerprint(model)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        flat = model.get_parameter(name).data.reshape(-1)
        place = place % flat.numel()
        previous = flat[place].item()
        flat[place] += 1e-3
        assert fingerprint(model) != before, (name, place)
        flat[place] = previous
    assert fingerprint(model) == before


def test_swapped_rows_change_it(model) -> None:
    before = fingerprint(model)
    weight = model.get_parameter("lm_head.weight").data
    weight[[3, 200]] = weight[[200, 3]]
    assert fingerprint(model) != before


def test_settings_and_dtypes_change_it(model) -> None:
    prints = {
        fingerprint(model),
        fingerprint(tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
        fingerprint(tiny_model("llama", seed=1)),
        fingerprint(tiny_model("qwen2")),
        fingerprint(model, torch.bfloat16),
        fingerprint(model, torch.float16),
        fingerprint(model.to(torch.bfloat16)),
    }
    assert len(prints) == 7


def test_the_dtype_of_keys_and_values_changes_it(model) -> None:
    identities = {
        name: CausalModel(model, kv_dtype=name).identity() for name in (None, "float32", "bfloat16")
    }
    assert (
        identities[None].fingerprint
        == identities["float32"].fingerprint
        != identities["bfloat16"].fingerprint
    )
    assert {keys.dtype for _, keys, _ in identities["bfloat16"].example.layers()} == {torch.bfloat16}


def test_it_covers_the_tensors_inside_wrapper_subclasses() -> None:
    class Quantised(torch.nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.config = tiny_model("llama").config
            self.weight = torch.nn.Parameter(TwoTensor(torch.ones(9, 5), torch.full((9, 5), scale)))

    assert fingerprint(Quantised(1.0)) == fingerprint(Quantised(1.0)) != fingerprint(Quantised(2.0))


def test_offloaded_weights_are_rejected(model) -> None:
    model.lm_head.to("meta")
    with pytest.raises(ConfigurationError, match=r"'lm_head.weight' is offloaded"):
        fingerprint(model)


def test_odd_sizes_are_hashed_to_the_last_byte() -> None:
    class Odd(torch.nn.Module):
        def __init__(self, last: float) -> None:
            super().__init__()
            self.config = tiny_model("llama").config
            values = torch.zeros(20_003, dtype=torch.bfloat16)
            values[-1] = last
            self.weight = torch.nn.Parameter(values[1:])

    assert fingerprint(Odd(0.0)) == fingerprint(Odd(0.0)) != fingerprint(Odd(1.0))
