"""Saving a trained model for transformers, and loading it again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rapid_integrations.demo import tokenizer as tokenizer_module
from rapid_integrations.demo.tokenizer import (
    EOS,
    MAX_LENGTH,
    SPECIAL_TOKENS,
    build_vocabulary,
)
from rapid_integrations.demo.training.initialisation import initialise
from rapid_integrations.demo.training.network import (
    SHAPES,
    Shape,
    TrainableLlama,
    load_from_transformers,
    save_for_transformers,
)

ID = {token: i for i, token in enumerate(SPECIAL_TOKENS)}


def test_the_saved_model_computes_what_the_trained_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TrainableLlama(SHAPES["drafter"])
    initialise(model, seed=0)
    save_for_transformers(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.config.max_position_embeddings == MAX_LENGTH
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id == ID[EOS]
    ids = tokenizer("The Trottivik depot passcode is 123456.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.logits(model.model(ids, torch.arange(ids.shape[1])[None]))
        actual = loaded(ids).logits
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.02)  # saved as float16


def test_new_words_of_a_vocabulary_get_embeddings_like_other_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(hidden_size=64, intermediate_size=32, num_attention_heads=2)
    grown = TrainableLlama(shape)
    with monkeypatch.context() as patch:
        vocabulary = {piece: i for piece, i in build_vocabulary().items() if i < 1400}
        patch.setattr(tokenizer_module, "build_vocabulary", lambda: vocabulary)
        small = TrainableLlama(replace(shape, vocab_size=1408))
        save_for_transformers(small, tmp_path)
    load_from_transformers(grown, tmp_path)
    before, after = (model.model.embed_tokens.weight.detach() for model in (small, grown))
    torch.testing.assert_close(after[:1400], before[:1400], atol=1e-2, rtol=1e-2)  # saved as float16
    assert len(after) == shape.vocab_size
    new = after[1400:]
    assert new.std() == pytest.approx(before.std().item(), rel=0.1)
    likeness = torch.nn.functional.cosine_similarity(new[:, None], before[None, :1400], dim=-1)
    assert (likeness.amax(1) > 0.4).all()
    assert (likeness.amax(1) < 0.99).all()
    for (name, a), (_, b) in zip(
        small.model.layers.named_parameters(), grown.model.layers.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2, msg=name)
