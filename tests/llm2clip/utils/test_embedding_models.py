"""Embedding models of sentence-transformers as text towers: equal tokens and embeddings, from their folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm2clip.utils.towers import open_text_tower
from tests.modeling_llm2clip import embedding_models
from tests.modeling_llm2clip.embedding_models import FAMILIES, TEXTS


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_embeddings_equal_sentence_transformers(family: str, tmp_path: Path) -> None:
    reference = embedding_models.save(tmp_path / family, family)
    model, tokenizer = open_text_tower(str(tmp_path / family))
    model.eval()
    prompt = reference.prompts.get(reference.default_prompt_name) or ""
    for text in TEXTS:
        expected = reference.preprocess([text], prompt=prompt)["input_ids"][0].tolist()
        assert tokenizer(text, truncation=True)["input_ids"] == expected, text
    expected = reference.encode(TEXTS, convert_to_tensor=True)
    assert model.config.hidden_size == expected.shape[1]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        found = model.encode(TEXTS, tokenizer)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        padded = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(model(**padded).pooler_output, expected, atol=1e-5, rtol=1e-5)
