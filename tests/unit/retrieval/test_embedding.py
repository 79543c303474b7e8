"""Tests of the adapters from embedding models."""

import sys

import pytest

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.retrieval.embedding import as_embedder


class Encoder:
    def encode(self, texts):
        return [[1.0] for _ in texts]


@pytest.mark.parametrize("embeddings", [None, 3, object(), Encoder])
def test_unsupported_embeddings_raise(embeddings):
    with pytest.raises(ConfigurationError, match="is not allowed"):
        as_embedder(embeddings)


def test_a_model_name_without_sentence_transformers_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigurationError, match=r"rapid-integrations\[embeddings\]"):
        as_embedder("BAAI/bge-m3")
