"""A folder of prefixes that outlives the process: an index, a byte budget, and a thread that writes.

Any number of processes may use one folder. A file appears under its name when it is whole, and never
changes; the ones used least recently are deleted when all together take more than the budget. A file that
fails a check is reported and deleted, and its text is written anew when it has been read again. What goes
wrong with files fails no request: it costs reading the prompt.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
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
from rapid_integrations.engine.cache.fingerprint import ModelIdentity
from rapid_integrations.engine.cache.sequence_kv import SequenceKV, common_prefix_length
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.errors import ConfigurationError

logger = logging.getLogger(__name__)

_TEMPORARY_START = ".rapid-kv-"
_TEMPORARY_LIFE_S = 3600.0


@dataclass(frozen=True, slots=True)
class _Entry:
    """What is to be written.

    Attributes:
        fingerprint: The model's.
        tokens: The tokens in the cache, ``[tokens]`` int64.
        kv: The cache.
        superseded: Files whose whole text this one begins with.
    """

    fingerprint: str
    tokens: np.ndarray
    kv: SequenceKV
    superseded: tuple[str, ...]


class DiskPrefixCache:
    """Keeps the KV of long prefixes in a folder.

    Looking, saving and withdrawing belong to one thread, the engine's; loading, which takes long, may be done
    in any. Writing has a thread of its own, which lives while there is something to write.

    Args:
        path: The folder; made, for its owner only, where it does not exist.
        models: The models whose prefixes it is asked for.
        budget_bytes: The most that the files of all models may take.
        waiting_bytes: The most KV that is held in memory to be written.

    Raises:
        ConfigurationError: The folder cannot be written to, or a model's weights are not in memory.
    """

    # Fewer tokens are not worth a file: a 7B model on a GPU computes a thousand about as fast as a disk gives
    # their KV (60 MB).
    MIN_TOKENS = 1024
    # Nor is a smaller share of what is to be read or written for it: a second question on a document would
    # write all of the document again.
    MIN_SHARE = 0.1

    def __init__(
        self, path: str, models: Iterable[CausalModel], *, budget_bytes: int, waiting_bytes: int
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
        self._identities = {model: ModelIdentity.of(model) for model in models}
        self._texts: dict[str, np.ndarray] = {}
        self._unusable: set[str] = set()
        # Of the index and of what is to be written; entered again where files of the index are checked.
        self._lock = threading.RLock()
        # The writer's side.
        self._waiting: deque[_Entry] = deque()
        self._writing: _Entry | None = None
        self._thread: threading.Thread | None = None

    def length_of(self, model: CausalModel, tokens: np.ndarray, *, known_tokens: int) -> int:
        """How many tokens :meth:`load` would come back with, if what it reads is usable; 0 for none."""
        return max((length for _, length in self._worthwhile(model, tokens, known_tokens)), default=0)

    def load(
        self, model: CausalModel, tokens: np.ndarray, *, known_tokens: int, capacity: int
    ) -> SequenceKV | None:
        """A cache with the longest prefix of ``tokens`` in the folder. Usable from any thread.

        Args:
            model: One of the folder's models.
            tokens: The prompt, ``[tokens]`` int64.
            known_tokens: How much of it there is without the folder.
            capacity: Tokens the caller will need room for.

        Returns:
            The cache, or ``None`` where the folder has too little more than is known.
        """
        for name, length in self._worthwhile(model, tokens, known_tokens):
            with self._checking(name):
                identity = self._identities[model]
                kv = read_prefix(self._path / name, identity, length=length, capacity=capacity)
                self._touch(name)
                return kv
        return None

    def _worthwhile(self, model: CausalModel, tokens: np.ndarray, known_tokens: int) -> list[tuple[str, int]]:
        """The files that are worth reading, with how much of ``tokens`` each begins with; most first."""
        if not self._worth(tokens.size, known_tokens):
            return []
        texts = self._list(self._identities[model].fingerprint)
        lengths = [(name, common_prefix_length(text, tokens)) for name, text in texts.items()]
        worthwhile = [(name, length) for name, length in lengths if self._worth(length, known_tokens)]
        return sorted(worthwhile, key=lambda found: found[1], reverse=True)

    def save(self, model: CausalModel, tokens: np.ndarray, kv: SequenceKV) -> None:
        """Have a prefix written soon, unless nearly all of it is in the folder already.

        Args:
            model: One of the folder's models.
            tokens: The ``kv.length`` tokens in the cache, int64.
            kv: The cache. It must not change before :meth:`withdraw` says that it may.
        """
        if not self._worth(tokens.size, 0):
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
        texts = self._list(fingerprint)
        with self._lock:
            for entry in (self._writing, *self._waiting):
                if entry is not None and entry.fingerprint == fingerprint:
                    texts[file_name(fingerprint, entry.tokens)] = entry.tokens
            shared = {name: common_prefix_length(text, tokens) for name, text in texts.items()}
            longest = max(shared, key=shared.__getitem__, default=None)
            if longest is not None and not self._worth(tokens.size, shared[longest]):
                self._touch(longest)
                return
            superseded = tuple(name for name, length in shared.items() if length == texts[name].size)
            self._queue(_Entry(fingerprint, tokens, kv, superseded))

    def withdraw(self, kv: SequenceKV) -> bool:
        """Give up writing ``kv`` if it still waits. False: it is just being written, and must not change."""
        with self._lock:
            self._waiting = deque(entry for entry in self._waiting if entry.kv is not kv)
            return self._writing is None or self._writing.kv is not kv

    def close(self) -> None:
        """Wait until everything is written. Idempotent."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _worth(self, length: int, known: int) -> bool:
        """Whether reading or writing ``length`` tokens pays where ``known`` ones are there already."""
        return length - known >= max(self.MIN_TOKENS, self.MIN_SHARE * length)

    # The index -------------------------------------------------------------------------------------------

    def _list(self, fingerprint: str) -> dict[str, np.ndarray]:
        """The texts of a model's files, by the files' names."""
        try:
            names = {entry.name for entry in os.scandir(self._path) if PREFIX_FILE.fullmatch(entry.name)}
        except OSError as error:
            logger.warning("the prefixes in '%s' are not used: %s.", self._path, error)
            return {}
        start = name_start(fingerprint)
        with self._lock:
            for name in self._texts.keys() - names:
                del self._texts[name]
            self._unusable &= names
            for name in sorted(names - self._texts.keys() - self._unusable):
                if name.startswith(start):
                    with self._checking(name):
                        self._texts[name] = read_tokens(self._path / name, fingerprint)
            return {name: text for name, text in self._texts.items() if name.startswith(start)}

    @contextmanager
    def _checking(self, name: str) -> Iterator[None]:
        """Go on behind the block where a file turns out not to be usable in it, and say why."""
        try:
            yield
        except FileNotFoundError:  # another process has deleted it
            with self._lock:
                self._texts.pop(name, None)
        except (OSError, ValueError) as error:
            with self._lock:
                self._texts.pop(name, None)
                self._unusable.add(name)
            path = self._path / name
            logger.warning("the prefix in '%s' is not used, its text will be read anew: %s.", path, error)
            if isinstance(error, ValueError):
                with suppress(OSError):
                    path.unlink()

    def _touch(self, name: str) -> None:
        """Mark a file as used now."""
        with suppress(FileNotFoundError):  # another process has deleted it, or it is still to be written
            os.utime(self._path / name)

    # The writer ------------------------------------------------------------------------------------------

    def _queue(self, entry: _Entry) -> None:
        if self._writing is None:
            self._writing = entry
            self._thread = threading.Thread(target=self._write_all, args=(entry,), name="rapid-prefixes")
            self._thread.start()
            return
        self._waiting.append(entry)
        while len(self._waiting) > 1 and sum(e.kv.num_bytes for e in self._waiting) > self._waiting_bytes:
            dropped = self._waiting.popleft()
            logger.warning(
                "the KV of %s tokens is not kept in '%s': files are written more slowly than requests end.",
                f"{dropped.tokens.size:,}", self._path,
            )  # fmt: skip

    def _write_all(self, entry: _Entry | None) -> None:
        while entry is not None:
            try:
                self._write(entry)
            except Exception as error:
                size = f"{entry.tokens.size:,}"
                logger.warning("the KV of %s tokens is not kept in '%s': %s.", size, self._path, error)
            with self._lock:
                self._writing = entry = self._waiting.popleft() if self._waiting else None

    def _write(self, entry: _Entry) -> None:
        name = file_name(entry.fingerprint, entry.tokens)
        temporary = _temporary_file(self._path)
        try:
            write_prefix(temporary, entry.fingerprint, entry.tokens, entry.kv)
            temporary.replace(self._path / name)
        except BaseException:
            temporary.unlink()
            raise
        for superseded in entry.superseded:
            (self._path / superseded).unlink(missing_ok=True)
        self._trim(name)

    def _trim(self, newest: str) -> None:
        """Delete what was used least recently until the budget is met, and what ended processes left."""
        files = []
        for found in os.scandir(self._path):
            with suppress(FileNotFoundError):  # another process has deleted it
                status = found.stat()
                left_behind = time.time() - status.st_mtime > _TEMPORARY_LIFE_S
                if PREFIX_FILE.fullmatch(found.name):
                    files.append((status.st_mtime_ns, status.st_size, found.name))
                elif found.name.startswith(_TEMPORARY_START) and left_behind:
                    os.unlink(found.path)
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
