"""A folder of prefixes: writing, finding and deleting files; damaged files; the writer thread."""

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import VOCAB, tiny_model

from rapid_integrations.engine.cache import disk_cache
from rapid_integrations.engine.cache.disk_cache import DiskPrefixCache
from rapid_integrations.engine.cache.prefix_cache import PrefixCache
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.errors import ConfigurationError

PATIENCE_S = 60.0
GENEROUS = 2**40


def text(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, length)


DOCUMENT = text(0, 1500)


@pytest.fixture(scope="module")
def model() -> CausalModel:
    return CausalModel(tiny_model("llama", num_hidden_layers=1, max_position_embeddings=8192))


@pytest.fixture(scope="module")
def other_model() -> CausalModel:
    return CausalModel(tiny_model("llama", seed=1, num_hidden_layers=1, max_position_embeddings=8192))


def kv_of(model: CausalModel, tokens: np.ndarray) -> SequenceKV:
    kv = SequenceKV(tokens.size + 10)
    model.forward([Step(kv, tokens.tolist(), 0)])
    return kv


def same(left: SequenceKV, right: SequenceKV, length: int) -> bool:
    pairs = zip(rows_of(left, length), rows_of(right, length), strict=True)
    return left.length == length and all(torch.equal(one, other) for one, other in pairs)


def rows_of(kv: SequenceKV, length: int) -> list[torch.Tensor]:
    return [rows[:, :length] for _, *both in kv.layers() for rows in both]


class Opened:
    """A folder that is opened by a new cache for every call, as by another process."""

    def __init__(self, path: Path, models: list[CausalModel]) -> None:
        self.path = path
        self.models = models

    def open(self, *, budget_bytes: int = GENEROUS, waiting_bytes: int = GENEROUS) -> DiskPrefixCache:
        return DiskPrefixCache(
            str(self.path), self.models, budget_bytes=budget_bytes, waiting_bytes=waiting_bytes
        )

    def save(self, tokens: np.ndarray, *, model: CausalModel | None = None, **limits: int) -> SequenceKV:
        model = model or self.models[0]
        kv = kv_of(model, tokens)
        folder = self.open(**limits)
        folder.save(model, tokens, kv)
        folder.close()
        return kv

    def load(self, tokens: np.ndarray, *, known: int = 0, model: CausalModel | None = None) -> Any:
        folder = self.open()
        return folder.load(model or self.models[0], tokens, known_tokens=known, capacity=tokens.size + 5)

    @property
    def files(self) -> list[str]:
        return sorted(os.listdir(self.path))


@pytest.fixture
def folder(tmp_path, model, other_model) -> Opened:
    return Opened(tmp_path / "prefixes", [model, other_model])


# Writing and finding --------------------------------------------------------------------------------------


def test_another_process_finds_a_written_prefix(folder) -> None:
    kv = folder.save(DOCUMENT)
    found = folder.load(np.append(DOCUMENT, text(1, 40)))
    assert same(found, kv, DOCUMENT.size)
    assert found.capacity >= DOCUMENT.size + 45


def test_the_longest_common_prefix_is_loaded(folder) -> None:
    folder.save(DOCUMENT)
    longer = np.append(DOCUMENT, text(1, 1500))
    kv = folder.save(longer)
    folder.save(text(2, 1500))
    assert same(folder.load(np.append(longer[:2800], text(3, 90))), kv, 2800)
    assert same(folder.load(np.append(DOCUMENT[:1200], text(3, 90))), kv, 1200)


@pytest.mark.parametrize(
    ("wanted", "known"),
    [
        (DOCUMENT[: DiskPrefixCache.MIN_TOKENS - 1], 0),
        (np.append(DOCUMENT[: DiskPrefixCache.MIN_TOKENS - 1], text(1, 900)), 0),
        (DOCUMENT, DOCUMENT.size - DiskPrefixCache.MIN_TOKENS + 1),
        (text(1, 1500), 0),
    ],
    ids=["short", "little shared", "already available", "another text"],
)
def test_a_prefix_that_gains_too_little_is_not_loaded(folder, wanted, known) -> None:
    folder.save(DOCUMENT)
    assert folder.load(wanted, known=known) is None


def test_new_tokens_must_be_a_minimum_share_of_the_prefix(folder) -> None:
    long = text(0, 12_000)
    folder.save(long)
    assert folder.load(long, known=10_850) is None
    assert folder.load(long, known=10_750).length == 12_000


def test_short_texts_are_not_written(folder) -> None:
    folder.save(DOCUMENT[: DiskPrefixCache.MIN_TOKENS - 1])
    assert folder.files == []


def test_models_do_not_use_each_other_s_files(folder, model, other_model) -> None:
    folder.save(DOCUMENT, model=other_model)
    assert folder.load(DOCUMENT, model=model) is None
    kv = folder.save(DOCUMENT, model=model)
    assert len(folder.files) == 2
    assert same(folder.load(DOCUMENT, model=model), kv, DOCUMENT.size)


def test_a_second_question_on_a_document_is_not_written_again(folder) -> None:
    folder.save(np.append(DOCUMENT, text(1, 60)))
    files = folder.files
    folder.save(np.append(DOCUMENT, text(2, 60)))
    assert folder.files == files


def test_concurrent_questions_about_a_document_are_written_once(folder, model) -> None:
    opened = folder.open()
    for seed in range(1, 5):
        tokens = np.append(DOCUMENT, text(seed, 60))
        opened.save(model, tokens, kv_of(model, tokens))
    opened.close()
    assert len(folder.files) == 1


def test_a_longer_text_replaces_its_prefix(folder) -> None:
    folder.save(DOCUMENT)
    kept = text(9, 1500)
    folder.save(kept)
    grown = np.append(DOCUMENT, text(1, 1500))
    folder.save(grown)
    assert len(folder.files) == 2
    assert folder.load(grown).length == 3000
    assert folder.load(kept).length == 1500


def test_only_the_owner_can_read_files_and_folder(folder) -> None:
    folder.save(DOCUMENT)
    assert folder.path.stat().st_mode & 0o077 == 0
    assert (folder.path / folder.files[0]).stat().st_mode & 0o077 == 0


# The budget ----------------------------------------------------------------------------------------------


def age(folder: Opened, seconds: float) -> None:
    """Set all modification times back."""
    for name in folder.files:
        path = folder.path / name
        used = path.stat().st_mtime - seconds
        os.utime(path, (used, used))


def test_the_least_recently_used_files_are_deleted_beyond_the_budget(folder, model) -> None:
    texts = [text(seed, 1500) for seed in range(3)]
    folder.save(texts[0])
    size = (folder.path / folder.files[0]).stat().st_size
    age(folder, 100)
    folder.save(texts[1])
    age(folder, 100)
    assert folder.load(texts[0]) is not None
    folder.save(texts[2], budget_bytes=2 * size)
    assert folder.load(texts[1]) is None
    assert folder.load(texts[0]) is not None
    assert folder.load(texts[2]) is not None


def test_saving_a_stored_text_again_counts_as_use(folder) -> None:
    folder.save(DOCUMENT)
    age(folder, 1000)
    before = (folder.path / folder.files[0]).stat().st_mtime
    folder.save(DOCUMENT)
    assert (folder.path / folder.files[0]).stat().st_mtime > before + 500


def test_a_prefix_larger_than_the_budget_is_logged_and_not_written(folder, caplog) -> None:
    folder.save(DOCUMENT, budget_bytes=1000)
    assert folder.files == []
    assert "more than prefix_cache_dir_bytes=1,000 allows" in caplog.text


def test_other_files_in_the_folder_are_kept(folder) -> None:
    folder.save(DOCUMENT)
    size = (folder.path / folder.files[0]).stat().st_size
    for name in ("model.safetensors", "notes.txt", "rapid-kv1-x.safetensors"):
        (folder.path / name).write_bytes(bytes(size))
    folder.save(text(1, 1500), budget_bytes=size)
    assert len(folder.files) == 4
    assert {"model.safetensors", "notes.txt", "rapid-kv1-x.safetensors"} < set(folder.files)


def test_old_temporary_files_are_deleted(folder) -> None:
    folder.open()
    (folder.path / ".rapid-kv-old").write_bytes(b"x")
    age(folder, 7200)
    (folder.path / ".rapid-kv-new").write_bytes(b"x")
    folder.save(DOCUMENT)
    assert ".rapid-kv-old" not in folder.files
    assert ".rapid-kv-new" in folder.files


# Damage --------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_reported_deleted_and_written_again(folder, caplog) -> None:
    kv = folder.save(DOCUMENT)
    (name,) = folder.files
    path = folder.path / name
    data = bytearray(path.read_bytes())
    data[-3000] ^= 1
    path.write_bytes(data)
    assert folder.load(DOCUMENT) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"'{path}' is not used, its text is computed again: its checksum is wrong" in record.getMessage()
    assert folder.files == []
    folder.save(DOCUMENT)
    assert folder.files == [name]
    assert same(folder.load(DOCUMENT), kv, DOCUMENT.size)


def test_after_a_damaged_file_the_next_best_one_is_loaded(folder, caplog) -> None:
    folder.save(DOCUMENT)
    (shorter,) = folder.files
    folder.save(np.append(DOCUMENT[:1400], text(1, 1400)))
    (longer,) = set(folder.files) - {shorter}
    data = (folder.path / shorter).read_bytes()
    (folder.path / shorter).write_bytes(data[:-4] + b"\1\1\1\1")
    assert folder.load(DOCUMENT).length == 1400
    assert folder.files == [longer]
    assert len(caplog.records) == 1


def test_another_model_s_file_under_a_wrong_name_is_not_used(folder, model, other_model, caplog) -> None:
    folder.save(DOCUMENT, model=other_model)
    (theirs,) = folder.files
    folder.save(DOCUMENT, model=model)
    (ours,) = set(folder.files) - {theirs}
    (folder.path / ours).write_bytes((folder.path / theirs).read_bytes())
    assert folder.load(DOCUMENT, model=model) is None
    assert "its format or model differs from its name" in caplog.text


def test_a_file_without_read_permission_is_not_deleted(folder, caplog, monkeypatch) -> None:
    folder.save(DOCUMENT)

    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("denied")

    monkeypatch.setattr(disk_cache, "read_prefix", denied)
    assert folder.load(DOCUMENT) is None
    assert "denied" in caplog.text
    monkeypatch.undo()
    assert folder.load(DOCUMENT) is not None


def test_a_file_that_another_process_deletes_is_no_error(folder, model, caplog, monkeypatch) -> None:
    folder.save(DOCUMENT)
    opened = folder.open()
    read_prefix = disk_cache.read_prefix

    def late(path: Path, *args: Any, **kwargs: Any) -> SequenceKV:
        path.unlink()
        return read_prefix(path, *args, **kwargs)

    monkeypatch.setattr(disk_cache, "read_prefix", late)
    assert opened.load(model, DOCUMENT, known_tokens=0, capacity=1) is None
    opened.save(model, DOCUMENT, kv_of(model, DOCUMENT))
    opened.close()
    assert len(folder.files) == 1
    assert caplog.records == []


def test_a_deleted_folder_is_no_error(folder, model, caplog) -> None:
    opened = folder.open()
    folder.path.rmdir()
    assert opened.load(model, DOCUMENT, known_tokens=0, capacity=1) is None
    opened.save(model, DOCUMENT, kv_of(model, DOCUMENT))
    opened.close()
    assert "is not kept in" in caplog.text


def test_a_full_disk_leaves_no_temporary_file(folder, caplog, monkeypatch) -> None:
    def full(path: Path, *args: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(disk_cache, "write_prefix", full)
    folder.save(DOCUMENT)
    assert "the KV of 1,500 tokens is not kept in" in caplog.text
    assert "No space left on device" in caplog.text
    assert folder.files == []


def test_an_unusable_folder_is_rejected(tmp_path, model) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            ConfigurationError, match=r"^prefix_cache_dir='.*' cannot be used: .*Name a folder"
        ):
            DiskPrefixCache(str(path), [model], budget_bytes=1, waiting_bytes=1)


# The writer ----------------------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Writing blocks. The events: writing has begun; writing may continue."""
    begun, go_on = threading.Event(), threading.Event()
    write_prefix = disk_cache.write_prefix

    def slowly(*args: Any) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        write_prefix(*args)

    monkeypatch.setattr(disk_cache, "write_prefix", slowly)
    yield begun, go_on
    go_on.set()


def test_queued_caches_can_be_withdrawn_but_not_the_one_being_written(folder, model, slow_disk) -> None:
    begun, go_on = slow_disk
    opened = folder.open()
    texts = [text(seed, 1500) for seed in range(3)]
    caches = [kv_of(model, tokens) for tokens in texts]
    for tokens, kv in zip(texts, caches, strict=True):
        opened.save(model, tokens, kv)
    assert begun.wait(PATIENCE_S)
    assert [opened.withdraw(kv) for kv in (caches[0], caches[1], kv_of(model, texts[0]))] == [
        False,
        True,
        True,
    ]
    go_on.set()
    opened.close()
    assert [folder.load(tokens) is not None for tokens in texts] == [True, False, True]


def test_the_prefix_cache_hands_over_a_copy_of_a_cache_that_is_being_written(
    folder, model, slow_disk
) -> None:
    begun, go_on = slow_disk
    opened = folder.open()
    store = PrefixCache(GENEROUS, opened)
    kv = kv_of(model, DOCUMENT)
    store.put(model, DOCUMENT, kv)
    assert begun.wait(PATIENCE_S)
    taken = store.take(model, DOCUMENT, capacity=1600)
    assert taken is not kv
    assert same(taken, kv, DOCUMENT.size)
    taken.rollback(10)
    model.forward([Step(taken, text(5, 500).tolist(), 0)])
    go_on.set()
    store.close()
    assert same(folder.load(DOCUMENT), kv_of(model, DOCUMENT), DOCUMENT.size)
    assert store.take(model, DOCUMENT, capacity=1600) is kv


def test_the_prefix_cache_offers_longer_prefixes_on_disk(folder, model) -> None:
    long = np.append(DOCUMENT, text(1, 1500))
    folder.save(long)
    store = PrefixCache(GENEROUS, folder.open())

    def found(tokens: np.ndarray, known_tokens: int = 0) -> Any:
        return store.find_on_disk(model, tokens, known_tokens=known_tokens, capacity=3100)

    assert found(DOCUMENT).load().length == found(DOCUMENT).length == 1500
    assert found(long, known_tokens=1900).length == 3000
    assert found(long, known_tokens=2000) is None, "too little more"
    store.put(model, DOCUMENT, kv_of(model, DOCUMENT))
    assert found(DOCUMENT) is None
    assert found(text(2, 1500)) is None
    assert PrefixCache(GENEROUS).find_on_disk(model, long, known_tokens=0, capacity=1) is None
    loaded = found(long).load()
    assert loaded.length == 3000
    assert loaded.capacity >= 3100
    assert store.take(model, DOCUMENT, capacity=1).length == 1500  # type: ignore[union-attr]


def test_many_threads_may_load_while_others_write_and_delete(folder, model) -> None:
    texts = [text(seed, 1500) for seed in range(4)]
    caches = [kv_of(model, tokens) for tokens in texts]
    opened = folder.open()
    failures: list[BaseException] = []

    def load(tokens: np.ndarray, kv: SequenceKV) -> None:
        try:
            for _ in range(15):
                found = opened.load(model, tokens, known_tokens=0, capacity=1)
                assert found is None or same(found, kv, tokens.size)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=load, args=pair) for pair in zip(texts, caches, strict=True)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        for tokens, kv in zip(texts, caches, strict=True):
            opened.save(model, tokens, kv)
        opened.close()
        for name in folder.files[:2]:
            (folder.path / name).unlink(missing_ok=True)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert failures == []
    for tokens, kv in zip(texts, caches, strict=True):
        opened.save(model, tokens, kv)
    opened.close()
    assert all(opened.length_of(model, tokens, known_tokens=0) == tokens.size for tokens in texts)


def test_queued_writes_are_dropped_and_logged_when_the_disk_is_slow(folder, model, slow_disk, caplog) -> None:
    _, go_on = slow_disk
    texts = [text(seed, 1500) for seed in range(4)]
    caches = [kv_of(model, tokens) for tokens in texts]
    opened = folder.open(waiting_bytes=caches[0].num_bytes)
    for tokens, kv in zip(texts, caches, strict=True):
        opened.save(model, tokens, kv)
    go_on.set()
    opened.close()
    assert [folder.load(tokens) is not None for tokens in texts] == [True, False, False, True]
    assert caplog.text.count("more slowly than requests end") == 2


def test_close_waits_for_writes_and_is_idempotent(folder, model, slow_disk) -> None:
    begun, go_on = slow_disk
    opened = folder.open()
    opened.save(model, DOCUMENT, kv_of(model, DOCUMENT))
    assert begun.wait(PATIENCE_S)
    closer = threading.Thread(target=opened.close)
    closer.start()
    assert closer.is_alive()
    go_on.set()
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
    opened.close()
    assert folder.load(DOCUMENT) is not None
