"""The documents that a LlamaIndex docstore's nodes were cut from, put together again.

A docstore keeps nodes; the documents themselves are in it only if somebody put them there. Splitters note
where in its document each node stands (``start_char_idx``), let neighbours overlap, and drop the whitespace
between them, and at the document's start. Of text that occurs several times they note the first place after
the node before, so that filler that repeats for longer than a node comes back shorter, or is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llama_index.core.schema import BaseNode, MetadataMode, TextNode
from llama_index.core.storage.docstore.types import BaseDocumentStore

from rapid_integrations.errors import DocumentError

_MAX_DROPPED_CHARS = 64  # between two nodes; more than that is text, not the whitespace that splitters drop
_REMEDY = "Pass the documents themselves: RapidQueryEngine.from_retriever(index.as_retriever(), documents)."


def stored_documents(
    docstore: BaseDocumentStore, ref_doc_ids: Collection[str] | None = None
) -> dict[str, str]:
    """The texts of the whole documents behind a docstore's nodes, by id, in the order of their addition.

    A node without a source is a document of its own.

    Args:
        docstore: Where the nodes are.
        ref_doc_ids: Which documents; ``None`` is all.

    Raises:
        DocumentError: A document is not there, or its nodes do not give its text.
    """
    stored = docstore.docs
    groups: dict[str, list[BaseNode]] = {}
    for node in stored.values():
        groups.setdefault(node.ref_doc_id or node.node_id, []).append(node)
    if ref_doc_ids is not None:
        if missing := sorted(set(ref_doc_ids) - set(groups)):
            raise DocumentError(
                f"the docstore has no node of {', '.join(missing)}: it knows "
                f"{', '.join(sorted(groups)) or 'no document'}."
            )
        groups = {name: nodes for name, nodes in groups.items() if name in ref_doc_ids}
    if not groups:
        raise DocumentError(
            f"the index's docstore holds no nodes (its vector store may keep the text itself). {_REMEDY}"
        )
    return {name: _restore(name, nodes, stored) for name, nodes in groups.items()}


def _restore(name: str, nodes: Sequence[BaseNode], stored: Collection[str]) -> str:
    whole = next((node for node in nodes if node.node_id == name), None)
    if whole is not None:
        return _text(whole)
    # A node with a larger one around it adds nothing; its offsets may count from there.
    outer = [n for n in nodes if n.parent_node is None or n.parent_node.node_id not in stored]
    pieces = [node for node in outer if _text(node).strip()]
    if not pieces:
        raise DocumentError(f"the nodes of document {name} hold no text. {_REMEDY}")
    alone = len(pieces) == 1 and not (pieces[0].parent_node or pieces[0].prev_node or pieces[0].next_node)
    return _text(pieces[0]) if alone and _start(pieces[0]) is None else _join(name, pieces, stored)


def _start(node: BaseNode) -> int | None:
    return node.start_char_idx if isinstance(node, TextNode) else None


def _join(name: str, nodes: Sequence[BaseNode], stored: Collection[str]) -> str:
    """The nodes' text by their offsets, overlaps once."""
    placed: list[tuple[int, BaseNode]] = []
    for node in nodes:
        start = _start(node)
        if start is None or node.parent_node is not None:
            raise DocumentError(
                f"node {node.node_id} does not say where in document {name} it stands, so that the document "
                f"cannot be put together. {_REMEDY}"
            )
        for near in (node.prev_node, node.next_node):
            if near is not None and near.node_id not in stored:
                raise DocumentError(
                    f"node {near.node_id} of document {name}, next to node {node.node_id}, is not in the "
                    f"docstore. {_REMEDY}"
                )
        placed.append((start, node))
    placed.sort(key=lambda item: item[0])
    text = ""
    end = 0  # offset in the document of what comes next
    shift = 0  # from an offset in the document to one in the text
    for start, node in placed:
        piece = _text(node)
        if start > end:
            # What precedes a node that nothing precedes is whitespace too, of any length.
            if start - end > _MAX_DROPPED_CHARS and (text or node.prev_node is not None):
                raise DocumentError(
                    f"characters {end:,} to {start:,} of document {name} are in no node, more than the "
                    f"{_MAX_DROPPED_CHARS} of whitespace that may be dropped between two: nodes are missing, "
                    f"or node {node.node_id} or the one before it has a text that stands elsewhere too. "
                    f"{_REMEDY}"
                )
            dropped = "" if not text else " " if start - end == 1 else "\n\n"
            text += dropped
            shift += len(dropped) - (start - end)
            end = start
        if start + len(piece) <= end:
            raise DocumentError(
                f"node {node.node_id} repeats text of the node before it, so that its place in document "
                f"{name} is not known. {_REMEDY}"
            )
        overlap = text[start + shift :] if start < end else ""
        if not piece.startswith(overlap):
            raise DocumentError(
                f"node {node.node_id} overlaps its neighbour in document {name}, and their texts differ. "
                f"{_REMEDY}"
            )
        text += piece[len(overlap) :]
        end = start + len(piece)
    return text


def _text(node: BaseNode) -> str:
    return node.get_content(metadata_mode=MetadataMode.NONE)
