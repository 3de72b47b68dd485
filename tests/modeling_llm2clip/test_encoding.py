"""Encoding of captions: batches of similar length, repeated captions once, results in input order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llm2clip.encoders import embed_captions
from modeling_llm2clip import with_prompt
from modeling_llm2clip.modeling_llm2clip_utils import CPU_BATCH_TOKENS
from tests.modeling_llm2clip import tiny


def tokenizer() -> Any:
    return with_prompt(tiny.plain_tokenizer(), tiny.PREFIX, tiny.SUFFIX, max_length=64)[0]


def batches_of(model: Any, texts: list[str], **options: Any) -> tuple[torch.Tensor, list[torch.Size]]:
    shapes = []
    forward = model.forward

    def counting(**inputs: Any) -> Any:
        shapes.append(inputs["input_ids"].shape)
        return forward(**inputs)

    model.forward = counting
    rows = model.encode(texts, tokenizer(), **options)
    model.forward = forward
    return rows, shapes


def test_repeated_captions_are_encoded_once_and_share_the_result() -> None:
    model = tiny.text_model()
    texts = ["a red bus", "a dog", "a red bus", "two children in a park", "a dog", "a dog"]
    rows, shapes = batches_of(model, texts)
    assert sum(captions for captions, _ in shapes) == 3
    expected = torch.cat([model.encode(text, tokenizer()) for text in texts])
    torch.testing.assert_close(rows, expected, atol=2e-5, rtol=1e-4)


def test_cpu_batches_respect_the_token_budget_and_batch_size() -> None:
    model = tiny.text_model()
    texts = [" ".join(["dog"] * (1 + number % 9)) + f" {number}" for number in range(150)]
    _, shapes = batches_of(model, texts)
    assert len(shapes) > 2
    assert all(captions * tokens <= CPU_BATCH_TOKENS and captions <= 64 for captions, tokens in shapes)
    _, shapes = batches_of(model, texts, batch_size=3)
    assert max(captions for captions, _ in shapes) == 3


def test_bfloat16_llm_returns_float32_embeddings_close_to_float32() -> None:
    model = tiny.text_model()
    expected = model.encode(tiny.CAPTIONS, tokenizer())
    rows = model.to(torch.bfloat16).encode(tiny.CAPTIONS, tokenizer())
    assert rows.dtype == torch.float32
    assert F.cosine_similarity(rows, expected).min() > 0.99


def test_embeddings_that_are_not_finite_are_an_error() -> None:
    model, processor = tiny.joint_model(), tiny.processor()
    torch.nn.init.constant_(model.text_adapter.proj.weight, float("nan"))
    torch.nn.init.constant_(model.visual_projection.weight, float("inf"))
    with pytest.raises(ValueError, match=r"3 of 3 captions are NaN or infinite, first that of item 0"):
        model.encode_text(["a dog", "a cat", "a dog"], processor)
    with pytest.raises(ValueError, match=r"\d of \d images are NaN or infinite"):
        model.encode_image(tiny.IMAGES, processor)
    torch.nn.init.constant_(model.text_model.decoder.norm.weight, float("nan"))
    with pytest.raises(ValueError, match=r"1 of 1 captions are NaN or infinite: a dog\."):
        embed_captions("a dog", model.text_model, processor)
