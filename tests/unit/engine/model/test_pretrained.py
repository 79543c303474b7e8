"""Models and tokenizers from GGUF files: the same as the ones they were made from, or a clear error."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from helpers.gguf_files import gguf_model, write_gguf
from helpers.small_tokenizers import tokenizer_named

from rapid_integrations.engine.cache.fingerprint import fingerprint
from rapid_integrations.engine.model import pretrained
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.model.pretrained import find_gguf, load_model, load_tokenizer
from rapid_integrations.errors import ConfigurationError, UnsupportedModelError

TEXTS = (
    "what is the answer?  The document\n\n says 1234567, don't it",
    "<|im_start|>user\nis <tool_call>{}</tool_call> naïve 你好<|im_end|>",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_the_weights_are_those_that_were_written(path: Path) -> None:
    model, expected = load_model(path), gguf_model()
    weights = model.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.state_dict().items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not model.is_quantized
    assert model.generation_config.eos_token_id == tokenizer_named("chatml").eos_token_id


def test_quantised_weights_are_unpacked_to_the_dtype(tmp_path: Path) -> None:
    packed = write_gguf(tmp_path / "q8.gguf", quantization=GGMLQuantizationType.Q8_0)
    model, expected = load_model(packed, dtype="bfloat16"), gguf_model()
    assert model.dtype == torch.bfloat16
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight").float()
    exact = expected.get_parameter("model.layers.1.mlp.up_proj.weight")
    assert not torch.equal(weight, exact)
    torch.testing.assert_close(weight, exact, rtol=0.01, atol=0.004)


def test_a_gguf_file_has_the_fingerprint_of_the_same_model_in_safetensors(path: Path, tmp_path: Path) -> None:
    model = load_model(path)
    model.save_pretrained(tmp_path)
    again = load_model(path.parent, gguf_file=path.name)
    assert fingerprint(load_model(tmp_path)) == fingerprint(model) == fingerprint(again)
    other = write_gguf(tmp_path / "tiny.gguf", gguf_model(seed=1))
    assert fingerprint(load_model(other)) != fingerprint(model)
    assert CausalModel.load(path).lean, "the engine's own decoder runs it"
    assert CausalModel.load(path.parent, gguf_file=path.name).name == str(path)


def test_the_tokenizer_encodes_as_the_one_that_was_written(path: Path) -> None:
    tokenizer, expected = load_tokenizer(path), tokenizer_named("chatml")
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert tokenizer.chat_template == expected.chat_template
    assert tokenizer.eos_token == expected.eos_token
    for text in TEXTS:
        assert tokenizer(text).input_ids == expected(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_tokens_that_end_an_answer_come_from_the_file(tmp_path: Path) -> None:
    ended = write_gguf(tmp_path / "tiny.gguf", extra=lambda writer: writer.add_eot_token_id(7))
    expected = sorted([7, tokenizer_named("chatml").eos_token_id])
    assert load_model(ended).generation_config.eos_token_id == expected
    assert CausalModel.load(ended).eos_token_ids == frozenset(expected)


def test_a_file_of_the_same_name_in_the_working_folder_is_not_taken(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / path.name, gguf_model(seed=1))
    monkeypatch.chdir(tmp_path)
    weight = load_model(path.parent, gguf_file=path.name).get_input_embeddings().weight
    assert torch.equal(weight, gguf_model().get_input_embeddings().weight)
    assert find_gguf(path.name, None) == tmp_path / path.name


def test_other_sources_name_no_gguf_file(tmp_path: Path) -> None:
    assert find_gguf("some/model", None) is None
    assert find_gguf(tmp_path, None) is None


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_missing_file_is_named_with_those_beside_it(load: Callable[..., object], path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no GGUF file '.*other\.gguf'; its folder has tiny\.gguf"):
        load(path.with_name("other.gguf"))
    with pytest.raises(ConfigurationError, match=r"no GGUF file '.*other\.gguf'; its folder has tiny\.gguf"):
        load(path.parent, gguf_file="other.gguf")
    with pytest.raises(ConfigurationError, match="its folder has no GGUF file"):
        load("no/such/file.gguf")
    with pytest.raises(OSError, match="offline mode"):
        load("some/repository", gguf_file="file.gguf", local_files_only=True)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_without_the_package_the_extra_is_named(
    load: Callable[..., object], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "is_gguf_available", lambda: False)
    with pytest.raises(ConfigurationError, match=r"pip install 'rapid-integrations\[gguf\]'"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip file"])
def test_another_kind_of_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.gguf").write_bytes(content)
    with pytest.raises(ConfigurationError, match="is not a GGUF file: it begins with b"):
        load_model(tmp_path / "file.gguf")


@pytest.mark.parametrize("kept", [4, 23, 300, 9_000, 0.5, 0.999])
def test_a_truncated_file_is_refused(kept: float, path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
    with pytest.raises(ConfigurationError, match=r"short\.gguf' of [\d,]+ bytes is incomplete or damaged"):
        load_model(short)
    with pytest.raises(ConfigurationError, match=r"is incomplete or damaged .*: download it again"):
        load_tokenizer(short)


def test_an_error_of_another_cause_keeps_its_message(path: Path) -> None:
    with pytest.raises(AttributeError, match="fixpoint7"):
        load_model(path, dtype="fixpoint7")


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    unknown = write_gguf(tmp_path / "file.gguf", architecture="perceptron")
    message = r"has the architecture 'perceptron', .*; it supports .*llama, .*qwen3"
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(unknown)
    with pytest.raises(UnsupportedModelError, match=message):
        load_tokenizer(unknown)


def test_a_file_without_a_tokenizer_is_refused_where_one_is_needed(tmp_path: Path) -> None:
    bare = write_gguf(tmp_path / "file.gguf", tokenizer=False)
    with pytest.raises(UnsupportedModelError, match="contains no tokenizer: pass tokenizer="):
        load_tokenizer(bare)
    assert load_model(bare).config.vocab_size == len(tokenizer_named("chatml"))


def test_a_missing_weight_is_not_replaced_by_random_numbers(tmp_path: Path) -> None:
    lacking = write_gguf(tmp_path / "file.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 weights .* model\.layers\.1\.mlp\.up_proj"):
        load_model(lacking)


def _factors(writer: GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", torch.ones(8).numpy())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda writer: writer.add_uint16("split.count", 3), "one of 3 parts of a model: merge them first"),
        (lambda writer: writer.add_string("llama.rope.scaling.type", "yarn"), r"rope\.scaling\.type 'yarn'"),
        (_factors, r"the tensor 'rope_freqs\.weight'"),
    ],
)
def test_what_transformers_would_drop_silently_is_refused(
    extra: Callable[[GGUFWriter], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(write_gguf(tmp_path / "file.gguf", extra=extra))


def test_a_quantisation_of_transformers_is_refused(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="quantization_config was given for the GGUF file"):
        CausalModel.load(path, quantization_config={"load_in_8bit": True})
    assert CausalModel.load(path, quantization_config="int8").name == str(path)
