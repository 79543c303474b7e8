"""Embeddings of the points of the compass, for tests of the vector store."""

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

from rapid_integrations import FaissVectorStore

VECTORS = {"north": [0.0, 2.0], "east": [1.0, 0.0], "north east": [1.0, 1.0], "south": [0.0, -1.0]}


class Compass(Embeddings):
    """Directions; some vectors are longer than 1."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return VECTORS[text]


def compass_store() -> FaissVectorStore:
    return FaissVectorStore.from_texts(
        ["north", "east", "north east", "south"],
        Compass(),
        [{"axis": "y", "n": 1}, {"axis": "x", "n": 2}, {"n": 3}, {"axis": "y", "n": 4}],
        ids=["n", "e", "ne", "s"],
    )


def texts(documents: list[Document]) -> list[str]:
    return [document.page_content for document in documents]
