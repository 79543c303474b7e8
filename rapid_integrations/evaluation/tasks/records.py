"""Files of questions as JSON objects. Each keeps its position in the file for error messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rapid_integrations.errors import ConfigurationError, DocumentError


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object of a file.

    Attributes:
        place: The file, with the line or the number of the entry.
        fields: The object's fields.
    """

    place: str
    fields: Mapping[str, Any]

    def text(self, name: str) -> str:
        """A field that must be text with other characters than whitespace.

        Raises:
            DocumentError: The field is missing or something else.
        """
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{name!r} must be text that is not blank, not {_shown(value)}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that must be a list of at least one such text.

        Raises:
            DocumentError: The field is missing or something else.
        """
        value = self.fields.get(name)
        if not isinstance(value, list) or not value:
            raise self.error(f"{name!r} must be a list of texts, at least one, not {_shown(value)}")
        if bad := [item for item in value if not isinstance(item, str) or not item.strip()]:
            raise self.error(f"{name!r} holds {_shown(bad[0])}: texts that are not blank are allowed")
        return tuple(value)

    def error(self, problem: str) -> DocumentError:
        """Make an error that names the place."""
        return DocumentError(f"{self.place}: {problem}.")


def read_records(path: Path, *, max_records: int | None = None) -> list[Record]:
    """Read a file of JSON objects, one per line (JSONL) or in one JSON list.

    Args:
        path: The file, in UTF-8. Blank lines are skipped.
        max_records: Read at most this many, from the start.

    Returns:
        The records, at least one.

    Raises:
        DocumentError: The file cannot be read, is not JSON, is empty, or has an entry that is not an object.
    """
    try:
        # Lines end at line feeds only: JSON strings may contain U+2028 and similar characters.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            is_list = file.read(1) == "["
            file.seek(0)
            entries = _listed(file.read(), path) if is_list else _lines(file, path)
            records = list(islice(entries, max_records))
    except UnicodeDecodeError as error:
        raise DocumentError(f"'{path}' is not UTF-8 text: {error}.") from None
    except OSError as error:
        raise DocumentError(f"'{path}' cannot be read: {error.strerror}.") from error
    if not records:
        raise DocumentError(f"'{path}' has no questions: one JSON object per line is expected.")
    return records


def _listed(text: str, path: Path) -> Iterator[Record]:
    for number, item in enumerate(_parsed(text, str(path)), start=1):
        yield _record(f"{path}, entry {number}", item)


def _lines(lines: Iterable[str], path: Path) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield _record(place, _parsed(line, place))


def _record(place: str, item: object) -> Record:
    if not isinstance(item, dict):
        raise DocumentError(f"{place}: a JSON object is expected, not {_shown(item)}.")
    return Record(place, item)


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DocumentError(f"{place}: this is not JSON: {error.msg}, {where}.") from None


def _shown(value: object) -> str:
    return "missing" if value is None else brief(value)


def brief(value: object) -> str:
    """JSON data as text for a message, of at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def hub_file(dataset: str, name: str) -> Path:
    """Find a file of a data set on the Hugging Face hub. It is downloaded once.

    Args:
        dataset: The data set's id.
        name: The file's name in the data set.

    Raises:
        ConfigurationError: The file cannot be fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(dataset, name, repo_type="dataset"))
    except (OSError, HfHubHTTPError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConfigurationError(
            f"'{name}' of the data set {dataset} cannot be fetched from the hub ({reason}): download it "
            "on another machine and give its path with --data."
        ) from error
