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

_DOCUMENTS, _VERSION = "documents.json", 2
# Every save has a vector file of its own, named in the JSON file.
_VECTORS = re.compile(r"vectors-[0-9a-f]{32}\.faiss")


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
    vectors = f"vectors-{uuid.uuid4().hex}.faiss"
    described = {
        "version": _VERSION,
        "vectors": vectors,
        "dimension": index.d,
        "count": len(documents),
        "documents": documents,
    }
    try:
        text = json.dumps(described, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RetrievalError(f"JSON cannot hold a document's metadata ({error}).") from error
    folder.mkdir(parents=True, exist_ok=True)
    previous = None
    with suppress(RetrievalError):  # the folder has no store, or one of another version
        previous = _described(folder).get("vectors")
    beside = folder / f"{vectors}.json"
    try:
        faiss.write_index(index, str(folder / vectors))
        beside.write_text(text, encoding="utf-8")
        beside.replace(folder / _DOCUMENTS)
    except Exception:
        for file in (folder / vectors, beside):
            file.unlink(missing_ok=True)
        raise
    if previous is not None and _VECTORS.fullmatch(str(previous)):
        (folder / previous).unlink(missing_ok=True)


def read_folder(folder: Path) -> tuple[Any, list[Any]]:
    """Read the index and the documents that :func:`write_folder` wrote.

    Raises:
        RetrievalError: A file is missing or damaged, the files disagree in count or dimension, or the index
            is not an inner-product index with ids.
    """
    described = _described(folder)
    try:
        vectors, count, dimension = (described[name] for name in ("vectors", "count", "dimension"))
        if not _VECTORS.fullmatch(vectors):
            raise ValueError(f"{vectors!r} is not the name of a vector file")
        documents = list(described["documents"])
        index = faiss.read_index(str(folder / vectors))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise unreadable(folder, error) from error
    if not isinstance(index, faiss.IndexIDMap2) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise RetrievalError(
            f"{folder / vectors} is not an inner-product index with ids: build and save it again."
        )
    if not (index.ntotal == count == len(documents) and index.d == dimension):
        raise RetrievalError(
            f"{folder} is damaged: {_DOCUMENTS} describes {count} vectors of {dimension} dimensions and has "
            f"{len(documents)} documents, {vectors} has {index.ntotal} of {index.d}. Build and save it again."
        )
    return index, documents


def unreadable(folder: Path, error: Exception) -> RetrievalError:
    """The error for a folder with a file that :func:`write_folder` did not write."""
    return RetrievalError(
        f"{folder} holds no readable store ({error}): it needs {_DOCUMENTS} and the vector file that it "
        "names, as save() writes them."
    )


def _described(folder: Path) -> dict[str, Any]:
    """The contents of the JSON file in ``folder``, if its version is supported."""
    try:
        described: dict[str, Any] = json.loads((folder / _DOCUMENTS).read_text(encoding="utf-8"))
        version = described["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(folder, error) from error
    if version != _VERSION:
        raise RetrievalError(f"{folder} holds a store of version {version!r}; this package reads {_VERSION}.")
    return described
