"""Documents put together from a splitter's nodes are the documents, whatever the text and the overlap."""

from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core import Document
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.storage.docstore import SimpleDocumentStore

from rapid_integrations.llama_index.documents import stored_documents

ends = st.sampled_from(["", ",", ".", "!", ".\n", "\n\n", "  "])


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(ends, min_size=1, max_size=60), size=st.integers(50, 70), overlap=st.integers(0, 20))
def test_a_document_comes_back(parts: list[str], size: int, overlap: int) -> None:
    # Six words each, so that there are several nodes; numbered, so that none repeats.
    text = " ".join(f"the word of number {i} is{end}" for i, end in enumerate(parts))
    splitter = SentenceSplitter(
        chunk_size=size, chunk_overlap=overlap, tokenizer=str.split, include_metadata=False
    )
    nodes = splitter([Document(text=text)])
    store = SimpleDocumentStore()
    store.add_documents(nodes)
    (document,) = stored_documents(store).values()
    assert document.split() == text.split()
