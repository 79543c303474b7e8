"""FaissVectorStore: LangChain's own test suite, and what it does not ask."""

import json
from pathlib import Path
from typing import Any

import faiss
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from rapid_integrations import ConfigurationError, FaissVectorStore, RetrievalError

VECTORS = {"north": [0.0, 2.0], "east": [1.0, 0.0], "north east": [1.0, 1.0], "south": [0.0, -1.0]}


class Compass(Embeddings):
    """Directions, some of them longer than 1."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return VECTORS[text]


class TestStandard(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self) -> VectorStore:
        return FaissVectorStore(self.get_embeddings())


@pytest.fixture
def store() -> FaissVectorStore:
    return FaissVectorStore.from_texts(
        ["north", "east", "north east", "south"],
        Compass(),
        [{"axis": "y", "n": 1}, {"axis": "x", "n": 2}, {"n": 3}, {"axis": "y", "n": 4}],
        ids=["n", "e", "ne", "s"],
    )


def texts(documents: list[Document]) -> list[str]:
    return [document.page_content for document in documents]


def vectors_of(folder: Path) -> Path:
    (file,) = folder.glob("vectors-*.faiss")
    return file


class TestSearch:
    async def test_scores_are_cosines(self, store: FaissVectorStore) -> None:
        found = store.similarity_search_with_score("north", k=3)
        assert [(d.page_content, score) for d, score in found] == [
            ("north", pytest.approx(1)),
            ("north east", pytest.approx(0.5**0.5)),
            ("east", pytest.approx(0, abs=1e-6)),
        ]
        assert await store.asimilarity_search_with_score("north", k=3) == found
        assert store.similarity_search_with_score_by_vector([0.0, 9.0], k=3) == found
        assert texts(store.similarity_search_by_vector([0.0, 9.0], k=3)) == ["north", "north east", "east"]
        assert len(store.similarity_search("north", k=99)) == len(store) == 4

    async def test_relevance_lies_between_0_and_1(self, store: FaissVectorStore) -> None:
        found = store.similarity_search_with_relevance_scores("north", k=4)
        assert [score for _, score in found] == pytest.approx([1, 0.853553, 0.5, 0], abs=1e-5)
        assert len(store.similarity_search_with_relevance_scores("north", k=4, score_threshold=0.8)) == 2

    async def test_filters(self, store: FaissVectorStore) -> None:
        assert texts(store.similarity_search("north", filter={"axis": "y"})) == ["north", "south"]
        assert texts(store.similarity_search("north", filter={"axis": "y", "n": 4})) == ["south"]
        late = lambda document: document.metadata["n"] > 1  # noqa: E731
        assert texts(store.similarity_search("north", k=2, filter=late)) == ["north east", "east"]
        assert texts(await store.asimilarity_search("north", k=1, filter=late)) == ["north east"]
        assert store.similarity_search("north", filter={"axis": "z"}) == []
        retriever = store.as_retriever(search_kwargs={"k": 1, "filter": {"axis": "x"}})
        assert texts(retriever.invoke("north")) == ["east"]

    async def test_marginal_relevance(self, store: FaissVectorStore) -> None:
        store.add_texts(["north"], ids=["another north"])
        assert texts(store.similarity_search("north", k=2)) == ["north", "north"]
        diverse = {"k": 2, "fetch_k": 4, "lambda_mult": 0.1}
        assert texts(store.max_marginal_relevance_search("north", **diverse)) == ["north", "east"]
        assert texts(await store.amax_marginal_relevance_search("north", **diverse)) == ["north", "east"]
        retriever = store.as_retriever(search_type="mmr", search_kwargs={**diverse, "filter": {"axis": "y"}})
        assert texts(await retriever.ainvoke("north")) == ["north", "south"]
        assert FaissVectorStore(Compass()).max_marginal_relevance_search("north") == []

    def test_what_is_found_is_a_copy(self, store: FaissVectorStore) -> None:
        store.similarity_search("north", k=1)[0].metadata["n"] = 99
        assert store.get_by_ids(["n"])[0].metadata == {"axis": "y", "n": 1}

    def test_what_is_not_allowed(self, store: FaissVectorStore) -> None:
        with pytest.raises(ConfigurationError, match="k=0"):
            store.similarity_search("north", k=0)
        with pytest.raises(RetrievalError, match="a vector has 3 dimensions and the store 2"):
            store.similarity_search_by_vector([1.0, 0.0, 0.0])
        with pytest.raises(TypeError, match="filtr"):
            store.similarity_search("north", filtr={"axis": "y"})
        with pytest.raises(ConfigurationError, match="filtr"):
            store.max_marginal_relevance_search("north", filtr={"axis": "y"})


class TestChange:
    async def test_ids(self) -> None:
        store = await FaissVectorStore.afrom_texts(["north"], Compass())
        (made,) = store.add_documents([Document("east")])
        assert store.add_documents([Document("south", id="own")]) == ["own"]
        assert texts(store.get_by_ids(["own", "none", made])) == ["south", "east"]
        assert (
            store.add_documents([Document("north"), Document("east")], ids=["twice", "twice"])
            == ["twice"] * 2
        )
        assert texts(store.get_by_ids(["twice"])) == ["east"]
        assert len(store) == len(store.similarity_search("north", k=9)) == 4
        assert store.add_documents([]) == []
        with pytest.raises(RetrievalError, match="1 ids were given for 2 documents"):
            store.add_documents([Document("north"), Document("east")], ids=["1"])

    def test_deleting(self, store: FaissVectorStore) -> None:
        assert store.delete(["n", "n", "none"])
        assert texts(store.similarity_search("north", k=9)) == ["north east", "east", "south"]
        store.delete()
        assert (len(store), store.similarity_search("north")) == (0, [])
        store.add_texts(["south"], ids=["n"])
        assert texts(store.similarity_search("north")) == ["south"]

    def test_vectors_that_are_none(self, store: FaissVectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
        for vector, message in (([1.0], "1 dimensions and the store 2"), ([float("nan"), 0.0], "finite")):
            monkeypatch.setitem(VECTORS, "bad", vector)
            with pytest.raises(RetrievalError, match=message):
                store.add_texts(["bad"], ids=["n"])
        assert texts(store.get_by_ids(["n"])) == ["north"]


class TestKeeping:
    def test_a_store_comes_back(self, store: FaissVectorStore, tmp_path: Path) -> None:
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
    def test_a_save_that_fails_leaves_the_store_that_was_there(
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

    def test_a_failed_save_keeps_the_older_one(
        self, store: FaissVectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.save(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        store.delete(["e"])

        def full(*_: object, **__: object) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space left"):
            store.save(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_what_cannot_be_saved(self, tmp_path: Path) -> None:
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

    def test_missing_and_exchanged_files(self, store: FaissVectorStore, tmp_path: Path) -> None:
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

    def test_a_document_without_a_direction_is_known_again(self, tmp_path: Path) -> None:
        class Nowhere(Compass):
            def embed_query(self, text: str) -> list[float]:
                return [0.0, 0.0] if text == "nowhere" else super().embed_query(text)

        FaissVectorStore.from_texts(["nowhere", "north"], Nowhere()).save(tmp_path)
        assert len(FaissVectorStore.load(tmp_path, Nowhere())) == 2
