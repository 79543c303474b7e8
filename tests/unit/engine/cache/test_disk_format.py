"""Prefix files: exact round trips, and the rejection of damaged files."""

import base64
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rapid_integrations.engine.cache.disk_format import (
    PREFIX_FILE,
    file_name,
    name_start,
    read_prefix,
    read_tokens,
    write_prefix,
)
from rapid_integrations.engine.cache.fingerprint import ModelIdentity
from rapid_integrations.engine.cache.sequence_kv import SequenceKV

FINGERPRINT = "0123456789abcdef" * 4
NUM_TOKENS = 2500
TOKENS = np.random.default_rng(0).integers(0, 50_000, NUM_TOKENS)

# (kv_heads, head_dim) of keys and of values: layers may differ in both.
LAYERS = {0: ((2, 4), (2, 4)), 1: ((1, 6), (1, 3)), 7: ((3, 1), (3, 5))}


def cache(length: int, capacity: int, dtype: torch.dtype = torch.float32) -> SequenceKV:
    generator = torch.Generator().manual_seed(0)
    kv = SequenceKV(capacity)
    for layer, shapes in LAYERS.items():
        kv.write(
            layer, *(torch.randn(heads, length, dim, generator=generator).to(dtype) for heads, dim in shapes)
        )
    kv.length = length
    return kv


def identity(dtype: torch.dtype = torch.float32) -> ModelIdentity:
    return ModelIdentity(FINGERPRINT, cache(1, 1, dtype))


def written(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    path = folder / file_name(FINGERPRINT, TOKENS)
    write_prefix(path, FINGERPRINT, TOKENS, cache(NUM_TOKENS, NUM_TOKENS + 40, dtype))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 2048, 2499, 2500])
def test_every_prefix_is_read_back_exactly(tmp_path, dtype, length) -> None:
    path = written(tmp_path, dtype)
    assert np.array_equal(read_tokens(path, FINGERPRINT), TOKENS)
    read = read_prefix(path, identity(dtype), length=length, capacity=2600)
    assert read.length == length
    assert read.capacity >= 2600
    for found, wanted in zip(read.layers(), cache(NUM_TOKENS, NUM_TOKENS, dtype).layers(), strict=True):
        assert found[0] == wanted[0]
        for one, other in zip(found[1:], wanted[1:], strict=True):
            assert one.dtype == dtype
            assert torch.equal(one, other[:, :length])


def test_the_name_depends_on_model_and_tokens(tmp_path) -> None:
    names = {
        file_name(fingerprint, tokens)
        for fingerprint in (FINGERPRINT, FINGERPRINT[::-1])
        for tokens in (TOKENS, TOKENS[:-1], TOKENS[::-1])
    }
    assert len(names) == 6
    assert all(PREFIX_FILE.fullmatch(name) for name in names)
    assert file_name(FINGERPRINT, TOKENS).startswith(name_start(FINGERPRINT))


def test_it_is_a_safetensors_file_with_metadata(tmp_path) -> None:
    with safe_open(written(tmp_path), "pt") as file:
        assert file.metadata() == {"format": "1", "fingerprint": FINGERPRINT}
        assert file.get_slice("7.values.2").get_shape() == [NUM_TOKENS, 5]
        assert file.get_tensor("tokens").tolist() == TOKENS.tolist()


def test_a_cache_is_written_up_to_its_length(tmp_path) -> None:
    kv = cache(NUM_TOKENS, NUM_TOKENS + 40)
    kv.rollback(1500)
    path = tmp_path / file_name(FINGERPRINT, TOKENS[:1500])
    write_prefix(path, FINGERPRINT, TOKENS[:1500], kv)
    assert read_prefix(path, identity(), length=1500, capacity=1).length == 1500


# A file that an earlier version wrote, compressed: five tokens, one layer with two heads of two
# bfloat16 channels, keys 0, 1/4, 2/4, … and values of the opposite sign.
EARLIER_TOKENS = np.array([5, 17, 50_000, 3, 9])
EARLIER_NAME = "rapid-kv1-0123456789abcdef-646d09381eaf235363ba7ac020cf7085.safetensors"
EARLIER_FILE = (
    "eNqdksFqwkAQhrdID73ZN5A9L7JrY7r10Aw9FHrzLhK3uqmSJgYTCyLCQqF49OjRJzEDfRHfoZdeik3UQopQsHMZZtjvm/+wn2dkV1PquoFOVE8"
    "lynVpY0q94ShQCW1QQRn1BuGTHkWjQZhvuKhdWXX7Wt6ox25Pe6fOdMZot6+7fjwO4vxWL5lEOhM/2FZ2LO6rfGqJNqO7PEPPi3WSvWxxJtsZnA"
    "x9Hf5B1o9Jyawdyqu+nsRVXoTv7oVdpFntmLcks4sCcarAlkweBC/qeaz/kUFKJvhvx8kxMgETtUwyq+QVvb1+lbYf2/P9NyCXh9583/fSYb4gP"
    "2VuiQOOcVYOOhuHQBkqwAGgCR2IwMAcFrAEYsyapJCadJViukkJlrGCHAGb2MEIDc5xgUv8BtFKwfs="
)


def test_a_file_of_an_earlier_version_can_be_read_and_is_written_the_same(tmp_path) -> None:
    keys = torch.arange(20, dtype=torch.float32).reshape(2, 5, 2).bfloat16() / 4
    path = tmp_path / EARLIER_NAME
    path.write_bytes(zlib.decompress(base64.b64decode(EARLIER_FILE)))
    assert np.array_equal(read_tokens(path, FINGERPRINT), EARLIER_TOKENS)
    example = SequenceKV(1)
    example.write(0, keys[:, :1], keys[:, :1])
    example.length = 1
    kv = read_prefix(path, ModelIdentity(FINGERPRINT, example), length=5, capacity=8)
    ((layer, *held),) = kv.layers()
    assert layer == 0
    assert all(torch.equal(found, wanted) for found, wanted in zip(held, (keys, -keys), strict=True))
    again = tmp_path / "again"
    write_prefix(again, FINGERPRINT, EARLIER_TOKENS, kv)
    for name, tensor in load_file(path).items():
        assert torch.equal(load_file(again)[name], tensor)


# Damage --------------------------------------------------------------------------------------------------


def changed(path: Path, **changes: object) -> None:
    """Write the file again with other tensors, or other metadata."""
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **changes.pop("metadata", {})}  # type: ignore[dict-item]
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name, change in changes.items():
        tensors[name.replace("_", ".")] = change(tensors[name.replace("_", ".")])  # type: ignore[operator]
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not a safetensors file, but long enough to look like one")


def zeroed(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-5000] + bytes(5000))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3000] ^= 1
    path.write_bytes(data)


def with_nan(rows: torch.Tensor) -> torch.Tensor:
    rows[70, 0] = float("nan")
    return rows


DAMAGE = {
    "cut": cut,
    "emptied": emptied,
    "text": text,
    "zeroed": zeroed,
    "flipped": flipped,
    "other format": lambda path: changed(path, metadata={"format": "0"}),
    "other model": lambda path: changed(path, metadata={"fingerprint": FINGERPRINT[::-1]}),
    "other tokens": lambda path: changed(path, tokens=lambda tokens: tokens.flip(0)),
    "fewer tokens": lambda path: changed(path, tokens=lambda tokens: tokens[:-1].clone()),
    "tokens of another type": lambda path: changed(path, tokens=lambda tokens: tokens.int()),
    "no tokens": lambda path: changed(path, tokens=lambda tokens: None),
    "no checksums": lambda path: changed(path, checksums=lambda sums: None),
    "few checksums": lambda path: changed(path, checksums=lambda sums: sums[:1].clone()),
    "a layer less": lambda path: changed(path, **{"7_keys_1": lambda rows: None}),
    "another shape": lambda path: changed(path, **{"7_keys_1": lambda rows: rows.repeat(1, 2)}),
    "another dtype": lambda path: changed(path, **{"7_keys_1": lambda rows: rows.half()}),
    "fewer rows": lambda path: changed(path, **{"1_values_0": lambda rows: rows[:2000].clone()}),
    "not finite": lambda path: changed(path, **{"1_values_0": with_nan}),
    "another number": lambda path: changed(path, **{"0_keys_1": lambda rows: rows + 1}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_and_foreign_files_are_rejected(tmp_path, damage) -> None:
    path = written(tmp_path)
    damage(path)
    with pytest.raises(ValueError, match=r"\S"):  # noqa: PT012 - either call may find it
        read_tokens(path, FINGERPRINT)
        read_prefix(path, identity(), length=NUM_TOKENS, capacity=NUM_TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan"), -float("nan"), None])
def test_numbers_that_are_not_finite_are_rejected(tmp_path, dtype, number) -> None:
    kv = cache(NUM_TOKENS, NUM_TOKENS, dtype)
    # The last one is the largest finite number.
    next(kv.layers())[1][0, 5, 0] = torch.finfo(dtype).min if number is None else number
    path = tmp_path / file_name(FINGERPRINT, TOKENS)
    write_prefix(path, FINGERPRINT, TOKENS, kv)
    assert read_prefix(path, identity(dtype), length=5, capacity=10).length == 5
    if number is None:
        assert read_prefix(path, identity(dtype), length=10, capacity=10).length == 10
        return
    with pytest.raises(ValueError, match="not finite"):
        read_prefix(path, identity(dtype), length=10, capacity=10)


def test_damage_after_the_requested_prefix_has_no_effect(tmp_path) -> None:
    path = written(tmp_path)
    changed(path, **{"1_values_0": lambda rows: torch.cat([rows[:2100], rows[2100:] + 1])})
    assert read_prefix(path, identity(), length=2048, capacity=2048).length == 2048
    with pytest.raises(ValueError, match="checksum"):
        read_prefix(path, identity(), length=2049, capacity=2049)


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path) -> None:
    with pytest.raises(OSError, match=r"\S"):
        write_prefix(tmp_path / "no" / "x.safetensors", FINGERPRINT, TOKENS, cache(NUM_TOKENS, NUM_TOKENS))


def test_a_missing_file_is_an_os_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        read_tokens(tmp_path / file_name(FINGERPRINT, TOKENS), FINGERPRINT)
    with pytest.raises(FileNotFoundError):
        read_prefix(tmp_path / "x.safetensors", identity(), length=1, capacity=1)
