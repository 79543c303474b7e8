"""Whole documents, assembled from the nodes in a LlamaIndex docstore.

A docstore holds nodes, and usually not the documents. A splitter records the position of each node in its
document (``start_char_idx``), lets neighbours overlap, and drops whitespace between nodes and at the
document's start. For text that occurs several times it records the first position after the previous node.
Filler that repeats for longer than a node therefore comes back shorter, or raises an error.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llama_index.core.schema import BaseNode, MetadataMode, TextNode
from llama_index.core.storage.docstore.types import BaseDocumentStore

from rapid_integrations.errors import DocumentError

# Upper limit on whitespace that a splitter drops between two nodes; a larger gap is missing text.
_MAX_DROPPED_CHARS = 64
_REMEDY = "Pass the documents themselves: RapidQueryEngine.from_retriever(index.as_retriever(), documents)."


def stored_documents(
    docstore: BaseDocumentStore, ref_doc_ids: Collection[str] | None = None
) -> dict[str, str]:
    """The texts of whole documents by id, in the order in which they were added.

    A node without a source document is a document of its own.

    Args:
        docstore: Holds the nodes.
        ref_doc_ids: The ids of the wanted documents; ``None`` for all.

    Raises:
        DocumentError: A document is missing, or cannot be assembled from its nodes.
    """
    stored = docstore.docs
    groups: dict[str, list[BaseNode]] = {}
    for node in stored.values():
        groups.setdefault(node.ref_doc_id or node.node_id, []).append(node)
    if ref_doc_ids is not None:
        if missing := sorted(set(ref_doc_ids) - set(groups)):
            raise DocumentError(
                f"the docstore has no node of {', '.join(missing)}: it has "
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
    # A node inside a larger stored node adds nothing, and its offsets may be relative to it.
    outer = [n for n in nodes if n.parent_node is None or n.parent_node.node_id not in stored]
    pieces = [node for node in outer if _text(node).strip()]
    if not pieces:
        raise DocumentError(f"the nodes of document {name} hold no text. {_REMEDY}")
    alone = len(pieces) == 1 and not (pieces[0].parent_node or pieces[0].prev_node or pieces[0].next_node)
    if alone and _start(pieces[0]) is None:
        return _text(pieces[0])
    return _join(name, _positions(name, pieces, stored))


def _start(node: BaseNode) -> int | None:
    return node.start_char_idx if isinstance(node, TextNode) else None


def _positions(name: str, nodes: Sequence[BaseNode], stored: Collection[str]) -> list[tuple[int, BaseNode]]:
    """The nodes with their offsets in the document, in document order.

    Raises:
        DocumentError: A node has no position, or its neighbour is not in the docstore.
    """
    positions: list[tuple[int, BaseNode]] = []
    for node in nodes:
        start = _start(node)
        if start is None or node.parent_node is not None:
            raise DocumentError(
                f"node {node.node_id} has no position in document {name}, so the document cannot be "
                f"assembled. {_REMEDY}"
            )
        for near in (node.prev_node, node.next_node):
            if near is not None and near.node_id not in stored:
                raise DocumentError(
                    f"node {near.node_id} of document {name}, next to node {node.node_id}, is not in the "
                    f"docstore. {_REMEDY}"
                )
        positions.append((start, node))
    return sorted(positions, key=lambda item: item[0])


def _join(name: str, positions: Sequence[tuple[int, BaseNode]]) -> str:
    """Join the nodes' texts by their offsets; overlaps appear once."""
    text = ""
    end = 0  # end of the joined nodes, as an offset in the document
    shift = 0  # from an offset in the document to one in the text
    for start, node in positions:
        piece = _text(node)
        if start > end:
            # Before a document's first node, whitespace of any length may be missing.
            if start - end > _MAX_DROPPED_CHARS and (text or node.prev_node is not None):
                raise DocumentError(
                    f"characters {end:,} to {start:,} of document {name} are in no node, more than the "
                    f"{_MAX_DROPPED_CHARS} of whitespace that a splitter may drop: nodes are missing, "
                    f"or the text of node {node.node_id} or of the one before it occurs elsewhere too. "
                    f"{_REMEDY}"
                )
            dropped = "" if not text else " " if start - end == 1 else "\n\n"
            text += dropped
            shift += len(dropped) - (start - end)
            end = start
        if start + len(piece) <= end:
            raise DocumentError(
                f"node {node.node_id} repeats text of the node before it, so its position in document "
                f"{name} is unknown. {_REMEDY}"
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
