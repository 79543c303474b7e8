import json
from pathlib import Path
from typing import Any

import faiss
import pytest
from helpers.compass_embeddings import Compass, compass_store, texts
from langchain_core.embeddings import DeterministicFakeEmbedding

from rapid_integrations import FaissVectorStore, RetrievalError


@pytest.fixture
def store() -> FaissVectorStore:
    return compass_store()


def vectors_of(folder: Path) -> Path:
    (file,) = folder.glob("vectors-*.faiss")
    return file


class TestSaveAndLoad:
    def test_a_loaded_store_equals_the_saved_one(self, store: FaissVectorStore, tmp_path: Path) -> None:
        store.delete(["e"])
        store.save(tmp_path / "store")
        again = FaissVectorStore.load(tmp_path / "store", Compass())
        assert again.similarity_search_with_score("north", k=9) == store.similarity_search_with_score(
            "north", k=9
        )
        assert again.get_by_ids(["ne"]) == store.get_by_ids(["ne"])
        again.add_texts(["east"], ids=["n"])
        assert sorted(texts(again.similarity_search("north", k=9))) == ["east", "north east", "south"]
        again.save(str(tmp_path / "store"))
        assert len(FaissVectorStore.load(tmp_path / "store", Compass())) == 3
        assert sorted((tmp_path / "store").iterdir()) == [
            tmp_path / "store" / "documents.json",
            vectors_of(tmp_path / "store"),
        ]
        assert list(tmp_path.iterdir()) == [tmp_path / "store"]

    @pytest.mark.parametrize("failing", ["write_index", "write_text", "replace"])
    def test_a_failed_save_leaves_the_old_store(
        self, store: FaissVectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
    ) -> None:
        store.save(tmp_path)
        files = {path: path.read_bytes() for path in tmp_path.iterdir()}
        found = store.similarity_search_with_score("north", k=9)
        store.delete(["n"])
        store.add_texts(["north"], ids=["n"])

        def fail(*args: Any, **kwargs: Any) -> None:
            raise OSError("the disk is full")

        with monkeypatch.context() as patched:
            patched.setattr(faiss if failing == "write_index" else Path, failing, fail)
            with pytest.raises(OSError, match="the disk is full"):
                store.save(tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
        assert FaissVectorStore.load(tmp_path, Compass()).similarity_search_with_score("north", k=9) == found

    def test_stores_that_cannot_be_saved(self, tmp_path: Path) -> None:
        store = FaissVectorStore(Compass())
        with pytest.raises(RetrievalError, match="empty"):
            store.save(tmp_path)
        store.add_texts(["north"], [{"when": object()}])
        with pytest.raises(RetrievalError, match="JSON cannot hold a document's metadata"):
            store.save(tmp_path)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 1}, "of version 1; this package reads 2"),
            ({"vectors": "../elsewhere.faiss"}, "is not the name of a vector file"),
            ({"vectors": None}, "holds no readable store"),
            ({"count": 5}, "describes 5 vectors of 2 dimensions"),
            ({"dimension": 3}, "describes 4 vectors of 3 dimensions"),
            ({"documents": []}, "has 0 documents"),
            ({"documents": [{"key": 0}]}, "has 1 documents"),
            ({"documents": [{"key": 0}] * 4}, "holds no readable store"),
            (
                {"documents": [{"key": 0, "id": "n", "text": "north", "metadata": {}}] * 4},
                "the keys of its vectors and documents differ",
            ),
            ({"documents": None}, "holds no readable store"),
        ],
    )
    def test_a_damaged_description(
        self, store: FaissVectorStore, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        store.save(tmp_path)
        file = tmp_path / "documents.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(RetrievalError, match=message):
            FaissVectorStore.load(tmp_path, Compass())

    def test_missing_and_foreign_files(self, store: FaissVectorStore, tmp_path: Path) -> None:
        with pytest.raises(RetrievalError, match="holds no readable store"):
            FaissVectorStore.load(tmp_path / "nowhere", Compass())
        store.save(tmp_path)
        other = FaissVectorStore.from_texts(list("abcd"), DeterministicFakeEmbedding(size=6))
        other.save(tmp_path / "other")
        vectors_of(tmp_path / "other").replace(vectors_of(tmp_path))
        with pytest.raises(RetrievalError, match=r"has 4 of 6\. Build and save it again"):
            FaissVectorStore.load(tmp_path, Compass())
        vectors_of(tmp_path).write_bytes(b"not an index")
        with pytest.raises(RetrievalError, match="holds no readable store"):
            FaissVectorStore.load(tmp_path, Compass())

    def test_another_kind_of_index(self, store: FaissVectorStore, tmp_path: Path) -> None:
        store.save(tmp_path)
        faiss.write_index(faiss.IndexFlatL2(2), str(vectors_of(tmp_path)))
        with pytest.raises(RetrievalError, match="is not an inner-product index with ids"):
            FaissVectorStore.load(tmp_path, Compass())

    def test_other_embeddings(self, store: FaissVectorStore, tmp_path: Path) -> None:
        class Reversed(Compass):
            def embed_documents(self, texts: list[str]) -> list[list[float]]:
                return [[-x, -y] for x, y in super().embed_documents(texts)]

        class Rounded(Compass):
            def embed_documents(self, texts: list[str]) -> list[list[float]]:
                return [[x + 0.1, y + 0.1] for x, y in super().embed_documents(texts)]

        store.save(tmp_path)
        with pytest.raises(RetrievalError, match="use the embeddings that the store was made with"):
            FaissVectorStore.load(tmp_path, DeterministicFakeEmbedding(size=6))
        with pytest.raises(RetrievalError, match=r"Reversed embeds .* another vector .* cosine is -1\.00"):
            FaissVectorStore.load(tmp_path, Reversed())
        assert len(FaissVectorStore.load(tmp_path, Rounded())) == 4

    def test_a_document_with_a_zero_vector_is_recognised(self, tmp_path: Path) -> None:
        class Nowhere(Compass):
            def embed_query(self, text: str) -> list[float]:
                return [0.0, 0.0] if text == "nowhere" else super().embed_query(text)

        FaissVectorStore.from_texts(["nowhere", "north"], Nowhere()).save(tmp_path)
        assert len(FaissVectorStore.load(tmp_path, Nowhere())) == 2
