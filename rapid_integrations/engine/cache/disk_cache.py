"""A folder of prefixes that outlives the process: an index, a byte budget, and a writer thread.

Any number of processes may use one folder. A file is renamed to its final name when it is complete and never
changes afterwards. If all files together exceed the budget, the least recently used are deleted. A file that
fails a check is reported and deleted; its text is written again after it has been computed again. A problem
with a file never fails a request: the prompt is computed instead.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rapid_integrations.engine.cache.disk_format import (
    PREFIX_FILE,
    file_name,
    name_start,
    read_prefix,
    read_tokens,
    write_prefix,
)
from rapid_integrations.engine.cache.fingerprint import IdentifiedModel, ModelIdentity
from rapid_integrations.engine.cache.sequence_kv import SequenceKV, common_prefix_length
from rapid_integrations.errors import ConfigurationError

logger = logging.getLogger(__name__)

_TEMPORARY_START = ".rapid-kv-"
# An older temporary file belongs to a process that has ended.
_MAX_TEMPORARY_AGE_S = 3600.0


@dataclass(frozen=True, slots=True)
class _PendingWrite:
    """A cache to be written.

    Attributes:
        fingerprint: The model's.
        tokens: The tokens in the cache, ``[tokens]`` int64.
        kv: The cache.
        superseded: Names of files whose whole text is a prefix of this one. They are deleted afterwards.
    """

    fingerprint: str
    tokens: np.ndarray
    kv: SequenceKV
    superseded: tuple[str, ...]


class DiskPrefixCache:
    """Keeps the KV of long prefixes in a folder.

    :meth:`length_of`, :meth:`save` and :meth:`withdraw` are called by one thread, the engine's. :meth:`load`
    takes long and may be called in any thread. Files are written by a thread of this class, which exists
    while there is something to write.

    Args:
        path: The folder; created with access for its owner only if it does not exist.
        models: The models whose prefixes are stored.
        budget_bytes: The maximum size of all files, of all models.
        waiting_bytes: The maximum KV that is held in memory until it is written.

    Raises:
        ConfigurationError: The folder cannot be written to, or a model's weights are not in memory.
    """

    # Shorter prefixes are not stored: a 7B model on a GPU computes a thousand tokens about as fast as a disk
    # reads their KV (60 MB).
    MIN_TOKENS = 1024
    # The minimum share of new tokens in a file that is read or written. Without it a second question about a
    # document would write the whole document again.
    MIN_SHARE = 0.1

    def __init__(
        self, path: str, models: Iterable[IdentifiedModel], *, budget_bytes: int, waiting_bytes: int
    ) -> None:
        self._path = Path(path)
        self._budget_bytes = budget_bytes
        self._waiting_bytes = waiting_bytes
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _temporary_file(self._path).unlink()
        except OSError as error:
            raise ConfigurationError(
                f"prefix_cache_dir='{path}' cannot be used: {error}. Name a folder that can be written to, "
                "or leave prefix_cache_dir out."
            ) from error
        self._identities: dict[Hashable, ModelIdentity] = {model: model.identity() for model in models}
        # The index: the tokens of each file by its name, and the names of files that failed a check.
        self._tokens: dict[str, np.ndarray] = {}
        self._unusable: set[str] = set()
        # Guards the index and the writer's queue; reentrant because _check takes it inside _index.
        self._lock = threading.RLock()
        self._waiting: deque[_PendingWrite] = deque()
        self._writing: _PendingWrite | None = None
        self._thread: threading.Thread | None = None

    def length_of(self, model: Hashable, tokens: np.ndarray, *, known_tokens: int) -> int:
        """The number of tokens that :meth:`load` would return if the files are usable; 0 for none."""
        return max((length for _, length in self._candidates(model, tokens, known_tokens)), default=0)

    def load(
        self, model: Hashable, tokens: np.ndarray, *, known_tokens: int, capacity: int
    ) -> SequenceKV | None:
        """A cache with the longest stored prefix of a prompt. Thread-safe.

        Args:
            model: One of the folder's models.
            tokens: The prompt, ``[tokens]`` int64.
            known_tokens: The length of the prefix that the caller has already.
            capacity: The number of tokens that the caller needs room for.

        Returns:
            The cache, or ``None`` if no stored prefix is sufficiently longer than ``known_tokens``.
        """
        for name, length in self._candidates(model, tokens, known_tokens):
            with self._check(name):
                identity = self._identities[model]
                kv = read_prefix(self._path / name, identity, length=length, capacity=capacity)
                self._touch(name)
                return kv
        return None

    def _candidates(self, model: Hashable, tokens: np.ndarray, known_tokens: int) -> list[tuple[str, int]]:
        """Files worth reading for a prompt, each with its common prefix length, longest first."""
        if not self._is_worthwhile(tokens.size, known_tokens):
            return []
        index = self._index(self._identities[model].fingerprint)
        lengths = [(name, common_prefix_length(stored, tokens)) for name, stored in index.items()]
        candidates = [(name, length) for name, length in lengths if self._is_worthwhile(length, known_tokens)]
        return sorted(candidates, key=lambda candidate: candidate[1], reverse=True)

    def save(self, model: Hashable, tokens: np.ndarray, kv: SequenceKV) -> None:
        """Queue a prefix for writing, unless nearly all of it is stored already.

        Args:
            model: One of the folder's models.
            tokens: The ``kv.length`` tokens in the cache, int64.
            kv: The cache. It must not change until :meth:`withdraw` has returned true for it.
        """
        if not self._is_worthwhile(tokens.size, 0):
            return
        num_bytes = kv.prefix_bytes
        if num_bytes > self._budget_bytes:
            logger.warning(
                "the KV of %s tokens is not kept in '%s': it takes %s bytes, more than "
                "prefix_cache_dir_bytes=%s allows for all files. Raise it to keep texts of this length.",
                f"{tokens.size:,}", self._path, f"{num_bytes:,}", f"{self._budget_bytes:,}",
            )  # fmt: skip
            return
        fingerprint = self._identities[model].fingerprint
        index = self._index(fingerprint)
        with self._lock:
            for pending in (self._writing, *self._waiting):
                if pending is not None and pending.fingerprint == fingerprint:
                    index[file_name(fingerprint, pending.tokens)] = pending.tokens
            shared = {name: common_prefix_length(stored, tokens) for name, stored in index.items()}
            longest = max(shared, key=shared.__getitem__, default=None)
            if longest is not None and not self._is_worthwhile(tokens.size, shared[longest]):
                self._touch(longest)
                return
            superseded = tuple(name for name, length in shared.items() if length == index[name].size)
            self._enqueue(_PendingWrite(fingerprint, tokens, kv, superseded))

    def withdraw(self, kv: SequenceKV) -> bool:
        """Cancel writing ``kv`` if it is still queued. False if it is being written and must not change."""
        with self._lock:
            self._waiting = deque(pending for pending in self._waiting if pending.kv is not kv)
            return self._writing is None or self._writing.kv is not kv

    def close(self) -> None:
        """Wait until everything is written. Idempotent."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _is_worthwhile(self, length: int, known_tokens: int) -> bool:
        """Whether reading or writing ``length`` tokens pays if ``known_tokens`` are available already."""
        return length - known_tokens >= max(self.MIN_TOKENS, self.MIN_SHARE * length)

    # The index -------------------------------------------------------------------------------------------

    def _index(self, fingerprint: str) -> dict[str, np.ndarray]:
        """The tokens of a model's files by file name, as the folder is now."""
        try:
            names = {entry.name for entry in os.scandir(self._path) if PREFIX_FILE.fullmatch(entry.name)}
        except OSError as error:
            logger.warning("the prefixes in '%s' are not used: %s.", self._path, error)
            return {}
        start = name_start(fingerprint)
        with self._lock:
            for name in self._tokens.keys() - names:
                del self._tokens[name]
            self._unusable &= names
            for name in sorted(names - self._tokens.keys() - self._unusable):
                if name.startswith(start):
                    with self._check(name):
                        self._tokens[name] = read_tokens(self._path / name, fingerprint)
            return {name: tokens for name, tokens in self._tokens.items() if name.startswith(start)}

    @contextmanager
    def _check(self, name: str) -> Iterator[None]:
        """Suppress and log errors of a file in the block, and take the file out of the index."""
        try:
            yield
        except FileNotFoundError:  # another process has deleted it
            with self._lock:
                self._tokens.pop(name, None)
        except (OSError, ValueError) as error:
            with self._lock:
                self._tokens.pop(name, None)
                self._unusable.add(name)
            path = self._path / name
            logger.warning("the prefix in '%s' is not used, its text is computed again: %s.", path, error)
            if isinstance(error, ValueError):
                with suppress(OSError):
                    path.unlink()

    def _touch(self, name: str) -> None:
        """Mark a file as used now."""
        with suppress(FileNotFoundError):  # another process has deleted it, or it is not written yet
            os.utime(self._path / name)

    # The writer ------------------------------------------------------------------------------------------

    def _enqueue(self, pending: _PendingWrite) -> None:
        if self._writing is None:
            self._writing = pending
            self._thread = threading.Thread(target=self._write_all, args=(pending,), name="rapid-prefixes")
            self._thread.start()
            return
        self._waiting.append(pending)
        while len(self._waiting) > 1 and sum(p.kv.num_bytes for p in self._waiting) > self._waiting_bytes:
            dropped = self._waiting.popleft()
            logger.warning(
                "the KV of %s tokens is not kept in '%s': files are written more slowly than requests end.",
                f"{dropped.tokens.size:,}", self._path,
            )  # fmt: skip

    def _write_all(self, pending: _PendingWrite | None) -> None:
        while pending is not None:
            try:
                self._write(pending)
            except Exception as error:
                size = f"{pending.tokens.size:,}"
                logger.warning("the KV of %s tokens is not kept in '%s': %s.", size, self._path, error)
            with self._lock:
                self._writing = pending = self._waiting.popleft() if self._waiting else None

    def _write(self, pending: _PendingWrite) -> None:
        name = file_name(pending.fingerprint, pending.tokens)
        temporary = _temporary_file(self._path)
        try:
            write_prefix(temporary, pending.fingerprint, pending.tokens, pending.kv)
            temporary.replace(self._path / name)
        except BaseException:
            temporary.unlink()
            raise
        for superseded in pending.superseded:
            (self._path / superseded).unlink(missing_ok=True)
        self._trim(name)

    def _trim(self, newest: str) -> None:
        """Delete the least recently used files beyond the budget, and temporary files of ended processes."""
        files = []
        for entry in os.scandir(self._path):
            with suppress(FileNotFoundError):  # another process has deleted it
                status = entry.stat()
                abandoned = time.time() - status.st_mtime > _MAX_TEMPORARY_AGE_S
                if PREFIX_FILE.fullmatch(entry.name):
                    files.append((status.st_mtime_ns, status.st_size, entry.name))
                elif entry.name.startswith(_TEMPORARY_START) and abandoned:
                    os.unlink(entry.path)
        excess = sum(size for _, size, _ in files) - self._budget_bytes
        for _, size, name in sorted(files):
            if excess <= 0:
                break
            if name != newest:
                (self._path / name).unlink(missing_ok=True)
                excess -= size


def _temporary_file(folder: Path) -> Path:
    """A new, empty file in ``folder`` that only its owner can read."""
    handle, name = tempfile.mkstemp(prefix=_TEMPORARY_START, dir=folder)
    os.close(handle)
    return Path(name)
