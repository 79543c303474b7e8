"""The answers of a run on disk, each written when it is complete, so that an interrupted run can continue.

``answers.jsonl`` has a header with the run's identity (see ``identity.py``), then a line for every answer.
Lines are only appended, and are on disk before the next question is asked. A killed process may leave an
incomplete line, which is dropped; its question is asked again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from rapid_integrations.errors import ConfigurationError, DocumentError
from rapid_integrations.evaluation.methods.settings import Setting
from rapid_integrations.evaluation.results.answer_record import AnswerRecord
from rapid_integrations.evaluation.results.identity import differences
from rapid_integrations.evaluation.tasks.sources import content_digest
from rapid_integrations.evaluation.tasks.task import Task

JOURNAL_FILE = "answers.jsonl"
_LOCK_FILE = ".answers.lock"
_FORMAT = 1
_MARKER = b'{"rapid_eval_answers": '

_Key = tuple[int, int, str, Setting]


class Journal:
    """The stored answers, and a file for more.

    Args:
        file: Open for appending.
        records: Answers by document, question, method and setting.
        digests: Digests of the documents' tasks.
        elapsed_s: Time of earlier processes.

    Attributes:
        elapsed_s: As the argument.
    """

    def __init__(
        self, file: BinaryIO, records: dict[_Key, AnswerRecord], digests: dict[int, str], elapsed_s: float
    ) -> None:
        self._file = file
        self._records = records
        self._digests = digests
        self.elapsed_s = elapsed_s

    def begin(self, document: int, task: Task) -> None:
        """Check that stored answers about a document belong to this document.

        Args:
            document: The task's number in the run.
            task: The task.

        Raises:
            ConfigurationError: The document's text, questions or format have changed.
        """
        digest = content_digest(task)
        if self._digests.setdefault(document, digest) != digest:
            raise ConfigurationError(
                f"'{self._file.name}' has answers about document {document + 1}, but its text, its questions "
                "or their prompts have changed since: evaluate into another folder."
            )

    def find(self, document: int, question_number: int, method: str, setting: Setting) -> AnswerRecord | None:
        """The stored answer; ``None`` if there is none yet."""
        return self._records.get((document, question_number, method, setting))

    def add(self, record: AnswerRecord, elapsed_s: float) -> None:
        """Write an answer. It is on disk when this returns.

        Args:
            record: An answer about a document that was begun.
            elapsed_s: Time of this process so far.

        Raises:
            OSError: For example, the disk is full. The question is then asked again in the next run.
        """
        line = {
            "answer": record.as_dict(),
            "task_digest": self._digests[record.document],
            "elapsed_s": self.elapsed_s + elapsed_s,
        }
        _append(self._file, line)
        self._records[_key(record)] = record


@contextmanager
def open_journal(folder: Path, identity: Mapping[str, Any]) -> Iterator[Journal]:
    """Begin a journal in a folder or continue the one in it, and lock the folder until it is closed.

    Args:
        folder: Created if it does not exist.
        identity: See :func:`~rapid_integrations.evaluation.results.identity.run_identity`.

    Raises:
        ConfigurationError: The journal belongs to another run, another process is writing to it, or the
            folder cannot be used.
        DocumentError: The file is damaged, or is not a journal.
    """
    path = folder / JOURNAL_FILE
    with _locked(folder):
        lines, length = _whole_lines(path)
        if lines:
            _check_header(lines[0], identity, path)
        records: dict[_Key, AnswerRecord] = {}
        digests: dict[int, str] = {}
        elapsed_s = 0.0
        for number, line in enumerate(lines[1:], start=2):
            try:
                record = AnswerRecord.from_dict(line["answer"])
                digests[record.document], elapsed_s = line["task_digest"], line["elapsed_s"]
            except (KeyError, TypeError, ConfigurationError) as error:
                raise DocumentError(
                    f"'{path}', line {number}: this is not an answer of this version of rapid eval. "
                    "Evaluate into another folder."
                ) from error
            records[_key(record)] = record
        with path.open("ab") as file:
            file.truncate(length)
            if not lines:
                _append(file, {"rapid_eval_answers": _FORMAT, "run": identity})
            yield Journal(file, records, digests, elapsed_s)


def make_folder(folder: Path) -> None:
    """Create a folder for a report, and check that it can be written to.

    Raises:
        ConfigurationError: The folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"the folder '{folder}' for the report cannot be written to: {error.strerror}. Name another one."
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    make_folder(folder)
    lock = FileLock(folder / _LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigurationError(
            f"another process is evaluating into '{folder}': wait until it has ended, or name another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise ConfigurationError(f"'{folder}' cannot be locked: {error}. Name another folder.") from error
    try:
        yield
    finally:
        lock.release()


def _whole_lines(path: Path) -> tuple[list[Any], int]:
    """The contents of the file's complete lines, and their length in bytes."""
    data = path.read_bytes() if path.exists() else b""
    if data[: len(_MARKER)] != _MARKER[: len(data)]:
        raise DocumentError(
            f"'{path}' exists, but rapid eval has not written it: evaluate into another folder."
        )
    *whole, _ = data.split(b"\n")
    lines: list[Any] = []
    for number, line in enumerate(whole, start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            # After a loss of power, a line's end may be on disk without the line.
            if number == len(whole) > 1:
                return lines, sum(len(each) + 1 for each in whole[:-1])
            raise DocumentError(
                f"'{path}', line {number}: this is not JSON, so the file is damaged. Remove the line to have "
                "its question asked again, or evaluate into another folder."
            ) from error
    return lines, sum(len(line) + 1 for line in whole)


def _check_header(header: Any, identity: Mapping[str, Any], path: Path) -> None:
    if header.get("rapid_eval_answers") != _FORMAT or not isinstance(header.get("run"), dict):
        raise DocumentError(
            f"'{path}' was written by another version of rapid eval: evaluate into another folder."
        )
    if found := differences(header["run"], identity):
        raise ConfigurationError(
            f"'{path}' has the answers of another run: {'; '.join(found)}. Use the same settings to continue "
            "it, or evaluate into another folder."
        )


def _key(record: AnswerRecord) -> _Key:
    return record.document, record.question_number, record.method, record.setting


def _append(file: BinaryIO, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
