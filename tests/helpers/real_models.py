"""The real model and embeddings that the tests in ``tests/real`` run on, and texts that they read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from langchain_core.embeddings import Embeddings
from transformers import AutoModel, AutoTokenizer

MODEL = "RAPID_REAL_MODEL"
EMBEDDINGS = "RAPID_REAL_EMBEDDINGS"
FETCH = ".ci/fetch_real_model.py"
# Few tokens for the drafter to read, so that the tests are quick.
OPTIONS: dict[str, Any] = {
    "retrieval_max_tokens": 256,
    "retrieval_chunk_tokens": 64,
    "max_new_tokens": 32,
    "acceptance": "lossless",
    "dtype": "float32",
}

_FACTS = (
    "The ferry to Marlow Island leaves at half past six from pier nine.",
    "The museum's oldest painting was bought in 1911 for forty crowns.",
    "Doctor Amara Lindqvist has directed the observatory since 1998.",
    "The bakery on Lantern Street bakes its rye bread with beer.",
    "The spare key of the boathouse hangs behind the blue cupboard.",
    "The choir meets on Thursday evenings in the old customs house.",
)
_FILLER = (
    "Visitors of the town usually arrive by train and walk along the river to the market square.",
    "In autumn the fog stays in the valley until noon, and the lamps are lit all morning.",
    "The council publishes its minutes every month, and few people read them with attention.",
    "A stone bridge with three arches joins the two halves of the town.",
    "School children paint the fences of the park each spring, in a different colour every year.",
    "The hotel near the station has twelve rooms, and all of them look on the garden.",
    "Fishermen mend their nets on the quay and talk about the weather of the week.",
)


def folder_named_by(variable: str) -> Path:
    """The folder that an environment variable names.

    Raises:
        FileNotFoundError: It names another place.
    """
    folder = Path(os.environ[variable])
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{variable}={folder} is not a folder with a model in transformers' format")
    return folder


def passages(number: int) -> list[str]:
    """``number`` paragraphs of about 60 tokens about a town; the facts are spread evenly over them."""
    places = {round((index + 0.5) * number / len(_FACTS)): fact for index, fact in enumerate(_FACTS)}
    return [
        " ".join([
            f"Note {index + 1}.",
            *(_FILLER[(index * step + step) % len(_FILLER)] for step in (1, 2, 3)),
            *([places[index]] if index in places else []),
        ])
        for index in range(number)
    ]  # fmt: skip


class MiniLM(Embeddings):
    """Sentence embeddings: the mean of the last hidden states, of length 1."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def embed_documents(self, texts: Iterable[str]) -> list[list[float]]:
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        hidden = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]
