"""Tests of the BM25 index."""

from __future__ import annotations

from rapid_integrations.retrieval.base import Chunk, Retriever
from rapid_integrations.retrieval.lexical import LexicalIndex, words

CHUNKS = [
    Chunk("The harbour was full of ships.", 0),
    Chunk("Captain Éowyn sold 42 barrels of salt.", 1),
    Chunk("   ", 2),
    Chunk("Salt and tar were kept in the harbour store.", 3),
    Chunk("The harbour was full of ships.", 4),
]


def test_chunks_that_share_words_best_first():
    found = LexicalIndex(CHUNKS).retrieve("Who sold the SALT, captain éowyn?")
    assert found[0] == Chunk(CHUNKS[1].text, 1, found[0].score)
    scores = [chunk.score for chunk in found]
    assert scores == sorted(scores, reverse=True)
    assert all(score > 0 for score in scores)


def test_ties_keep_document_order():
    assert [chunk.position for chunk in LexicalIndex(CHUNKS).retrieve("ships")] == [0, 4]


def test_nothing_in_common_finds_nothing():
    index = LexicalIndex(CHUNKS)
    assert index.retrieve("zebra") == []
    assert index.retrieve("?!") == []
    assert LexicalIndex([]).retrieve("salt") == []
    assert LexicalIndex([Chunk(" "), Chunk("...")]).retrieve("salt") == []


def test_words_are_lower_case_and_unicode():
    assert words("Der Große—Éowyn's 42!") == ["der", "große", "éowyn", "s", "42"]
    assert words("港口有42艘船") == ["港", "口", "有", "42", "艘", "船"]


def test_the_index_is_a_retriever_and_logs_nothing(capfd, caplog):
    caplog.set_level("DEBUG")
    index = LexicalIndex(CHUNKS)
    index.retrieve("salt")
    assert isinstance(index, Retriever)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
