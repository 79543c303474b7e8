"""Documents put together from what a docstore keeps of them."""

import pytest
from llama_index.core import Document, MockEmbedding, StorageContext, SummaryIndex, VectorStoreIndex
from llama_index.core.node_parser import HierarchicalNodeParser, SentenceSplitter, get_leaf_nodes
from llama_index.core.schema import ImageNode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore

from rapid_integrations import DocumentError
from rapid_integrations.demo import generate_documents
from rapid_integrations.llama_index.documents import stored_documents

TEXTS = [
    document.text
    for document in generate_documents(num_tokens=512, num_documents=2, questions_per_document=1, seed=3)
]
DOCUMENTS = [Document(id_=f"doc-{i}", text=text) for i, text in enumerate(TEXTS)]


def splitter(chunk_size: int = 60, chunk_overlap: int = 15) -> SentenceSplitter:
    return SentenceSplitter(
        chunk_size=chunk_size, chunk_overlap=chunk_overlap, tokenizer=str.split, include_metadata=False
    )


def texts(store: SimpleDocumentStore) -> list[str]:
    return list(stored_documents(store).values())


def store_of(nodes: list) -> SimpleDocumentStore:
    store = SimpleDocumentStore()
    store.add_documents(nodes)
    return store


@pytest.mark.parametrize("index_type", [VectorStoreIndex, SummaryIndex])
def test_documents_of_an_index_are_restored_in_order(index_type) -> None:
    storage = StorageContext.from_defaults()
    index_type.from_documents(
        DOCUMENTS,
        embed_model=MockEmbedding(embed_dim=4),
        transformations=[splitter()],
        storage_context=storage,
    )
    assert len(storage.docstore.docs) > 10
    assert list(stored_documents(storage.docstore).items()) == [("doc-0", TEXTS[0]), ("doc-1", TEXTS[1])]
    assert stored_documents(storage.docstore, ["doc-1"]) == {"doc-1": TEXTS[1]}


def test_a_persisted_store(tmp_path) -> None:
    store_of(splitter()(DOCUMENTS)).persist(str(tmp_path / "docstore.json"))
    again = SimpleDocumentStore.from_persist_path(str(tmp_path / "docstore.json"))
    assert texts(again) == TEXTS


def test_the_order_of_the_nodes_does_not_matter() -> None:
    nodes = splitter()(DOCUMENTS[:1])
    assert texts(store_of(nodes[::-1])) == TEXTS[:1]


def test_whole_documents_in_the_store_are_used() -> None:
    nodes = splitter()(DOCUMENTS)
    text = "Another version."
    store = store_of([*nodes, Document(id_="doc-0", text=text)])
    assert texts(store) == [text, TEXTS[1]]


def test_nodes_without_a_source_are_documents() -> None:
    store = store_of([TextNode(text="One."), TextNode(text="Two.")])
    assert texts(store) == ["One.", "Two."]


def test_a_document_of_one_node() -> None:
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="doc")}
    store = store_of([TextNode(text="All of it.", relationships=source), ImageNode(relationships=source)])
    assert texts(store) == ["All of it."]


def test_nodes_inside_larger_nodes_add_nothing() -> None:
    parser = HierarchicalNodeParser.from_defaults(
        node_parser_ids=["large", "small"], node_parser_map={"large": splitter(), "small": splitter(20, 4)}
    )
    nodes = parser.get_nodes_from_documents(DOCUMENTS)
    assert texts(store_of(nodes)) == TEXTS
    with pytest.raises(DocumentError, match="has no position in document doc-0"):
        stored_documents(store_of(get_leaf_nodes(nodes)))


def test_whitespace_dropped_by_a_splitter_is_restored() -> None:
    text = "A first sentence here.\n\n\nA second sentence here.   A third one."
    nodes = splitter(4, 0)([Document(text=text)])
    assert len(nodes) > 2
    (document,) = texts(store_of(nodes))
    assert document.split() == text.split()
    assert "here.\n\nA second" in document


def pieces(*spans: tuple[str, int | None]) -> SimpleDocumentStore:
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="doc")}
    return store_of([TextNode(text=t, start_char_idx=start, relationships=source) for t, start in spans])


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([("One.", 0), ("Two.", None)], "has no position in document doc"),
        (
            [("One.", 0), ("Two.", 69)],
            "characters 4 to 69 of document doc are in no node",
        ),
        ([("One two", 0), ("too three", 4)], "their texts differ"),
        ([("One. Yes. Two.", 0), ("Yes.", 5)], "repeats text"),
        ([("  ", 0)], "the nodes of document doc hold no text"),
        ([], "holds no nodes"),
    ],
)
def test_nodes_that_cannot_be_joined_raise(spans, message) -> None:
    with pytest.raises(DocumentError, match=message) as raised:
        stored_documents(pieces(*spans))
    assert "RapidQueryEngine.from_retriever" in str(raised.value)


def test_a_missing_neighbour_raises() -> None:
    nodes = splitter()(DOCUMENTS[:1])
    for kept in (nodes[1:], nodes[:-1], nodes[:2] + nodes[3:]):
        with pytest.raises(DocumentError, match="is not in the docstore"):
            stored_documents(store_of(kept))


def test_a_long_gap_of_whitespace_between_nodes() -> None:
    text = "A first sentence here." + " \n" * 30 + "A second sentence here."
    nodes = splitter(4, 0)([Document(text=text)])
    assert nodes[1].start_char_idx - nodes[0].end_char_idx > 8
    assert texts(store_of(nodes)) == ["A first sentence here.\n\nA second sentence here."]


def test_any_whitespace_may_precede_a_document() -> None:
    text = "\n" * 500 + TEXTS[0]
    nodes = splitter()([Document(text=text)])
    assert nodes[0].start_char_idx == 500
    assert texts(store_of(nodes)) == [TEXTS[0]]
    assert texts(pieces(("Two.", 100))) == ["Two."]


def test_filler_that_repeats_for_longer_than_a_node_raises() -> None:
    text = f"{TEXTS[0]} {'Blank. ' * 400}{TEXTS[1]}"
    store = store_of(splitter(chunk_overlap=0)([Document(text=text)]))
    with pytest.raises(DocumentError, match=r"in no node|repeats text"):
        stored_documents(store)


def test_an_unknown_document_raises() -> None:
    with pytest.raises(DocumentError, match=r"no node of doc-7: it has doc-0, doc-1\."):
        stored_documents(store_of(splitter()(DOCUMENTS)), ["doc-7"])
