import pytest
from helpers.compass_embeddings import VECTORS, Compass, compass_store, texts
from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from rapid_integrations import ConfigurationError, FaissVectorStore, RetrievalError


@pytest.fixture
def store() -> FaissVectorStore:
    return compass_store()


class TestStandard(VectorStoreIntegrationTests):
    """LangChain's own tests."""

    @pytest.fixture
    def vectorstore(self) -> VectorStore:
        return FaissVectorStore(self.get_embeddings())


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

    def test_results_are_copies(self, store: FaissVectorStore) -> None:
        store.similarity_search("north", k=1)[0].metadata["n"] = 99
        assert store.get_by_ids(["n"])[0].metadata == {"axis": "y", "n": 1}

    def test_errors_of_arguments(self, store: FaissVectorStore) -> None:
        with pytest.raises(ConfigurationError, match="k=0"):
            store.similarity_search("north", k=0)
        with pytest.raises(RetrievalError, match="a vector has 3 dimensions and the store 2"):
            store.similarity_search_by_vector([1.0, 0.0, 0.0])
        with pytest.raises(TypeError, match="filtr"):
            store.similarity_search("north", filtr={"axis": "y"})
        with pytest.raises(ConfigurationError, match="filtr"):
            store.max_marginal_relevance_search("north", filtr={"axis": "y"})


class TestAddAndDelete:
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

    def test_invalid_vectors_change_nothing(
        self, store: FaissVectorStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for vector, message in (([1.0], "1 dimensions and the store 2"), ([float("nan"), 0.0], "finite")):
            monkeypatch.setitem(VECTORS, "bad", vector)
            with pytest.raises(RetrievalError, match=message):
                store.add_texts(["bad"], ids=["n"])
        assert texts(store.get_by_ids(["n"])) == ["north"]
