"""The files of a vector store: vectors in a FAISS file, documents in JSON. Nothing is unpickled."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import faiss

from rapid_integrations.errors import RetrievalError

_DESCRIPTION, _VERSION = "documents.json", 2
# Every save has a vector file of its own, named in the JSON file.
_VECTOR_FILE = re.compile(r"vectors-[0-9a-f]{32}\.faiss")


def write_folder(folder: Path, index: Any, documents: Sequence[Any]) -> None:
    """Write an index and its documents to ``folder``.

    They replace an existing store in one atomic step. A write that fails or is interrupted leaves the
    existing store intact.

    Args:
        folder: Created if it is missing.
        index: A FAISS index.
        documents: JSON data, one for each vector.

    Raises:
        RetrievalError: JSON cannot hold the documents.
    """
    vector_file = f"vectors-{uuid.uuid4().hex}.faiss"
    description = {
        "version": _VERSION,
        "vectors": vector_file,
        "dimension": index.d,
        "count": len(documents),
        "documents": documents,
    }
    try:
        text = json.dumps(description, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RetrievalError(f"JSON cannot hold a document's metadata ({error}).") from error
    folder.mkdir(parents=True, exist_ok=True)
    old_vector_file = None
    with suppress(RetrievalError):  # the folder has no store, or one of another version
        old_vector_file = _read_description(folder).get("vectors")
    new_description = folder / f"{vector_file}.json"
    try:
        faiss.write_index(index, str(folder / vector_file))
        new_description.write_text(text, encoding="utf-8")
        new_description.replace(folder / _DESCRIPTION)
    except Exception:
        for file in (folder / vector_file, new_description):
            file.unlink(missing_ok=True)
        raise
    if old_vector_file is not None and _VECTOR_FILE.fullmatch(str(old_vector_file)):
        (folder / old_vector_file).unlink(missing_ok=True)


def read_folder(folder: Path) -> tuple[Any, list[Any]]:
    """Read the index and the documents that :func:`write_folder` wrote.

    Raises:
        RetrievalError: A file is missing or damaged, the files disagree in count or dimension, or the index
            is not an inner-product index with ids.
    """
    description = _read_description(folder)
    try:
        vector_file, count, dimension = (description[name] for name in ("vectors", "count", "dimension"))
        if not _VECTOR_FILE.fullmatch(vector_file):
            raise ValueError(f"{vector_file!r} is not the name of a vector file")
        documents = list(description["documents"])
        index = faiss.read_index(str(folder / vector_file))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise unreadable(folder, error) from error
    if not isinstance(index, faiss.IndexIDMap2) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise RetrievalError(
            f"{folder / vector_file} is not an inner-product index with ids: build and save it again."
        )
    if not (index.ntotal == count == len(documents) and index.d == dimension):
        raise RetrievalError(
            f"{folder} is damaged: {_DESCRIPTION} describes {count} vectors of {dimension} dimensions and "
            f"has {len(documents)} documents, {vector_file} has {index.ntotal} of {index.d}. Build and save "
            "it again."
        )
    return index, documents


def unreadable(folder: Path, error: Exception) -> RetrievalError:
    """The error for a folder with a file that :func:`write_folder` did not write."""
    return RetrievalError(
        f"{folder} holds no readable store ({error}): it needs {_DESCRIPTION} and the vector file that it "
        "names, as save() writes them."
    )


def _read_description(folder: Path) -> dict[str, Any]:
    """The contents of the JSON file in ``folder``, if its version is supported."""
    try:
        description: dict[str, Any] = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        version = description["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(folder, error) from error
    if version != _VERSION:
        raise RetrievalError(f"{folder} holds a store of version {version!r}; this package reads {_VERSION}.")
    return description
