"""Multimodal models of sentence-transformers embed as they do in their own library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from llm2clip.data import decode_image
from llm2clip.encoders.load import load_encoder

from . import multimodal
from .models import IMAGES, TEXTS

WIDTHS = {multimodal.qwen3_vl: 32, multimodal.qwen2_vl: 32, multimodal.embedding_gemma2: 48}


@pytest.fixture(scope="module", params=WIDTHS, ids=lambda build: build.__name__)
def build(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def folder(build: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    multimodal.save_embedder(build, tmp_path_factory.mktemp("plain"), folder)
    return folder


def test_texts_are_queries_and_images_are_documents(build: Any, folder: Path) -> None:
    encoder, model = load_encoder(str(folder), device="cpu"), SentenceTransformer(str(folder), device="cpu")
    texts = [text for text in TEXTS if text]
    expected = torch.from_numpy(model.encode_query(texts))
    torch.testing.assert_close(encoder.encode_text(texts), expected, atol=1e-5, rtol=0)
    images = [decode_image(image) for image in IMAGES]
    expected = torch.from_numpy(model.encode_document(images))
    torch.testing.assert_close(encoder.encode_image(IMAGES, batch_size=3), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, torch.from_numpy(model.encode(images)), atol=1e-3)
    assert encoder.width == WIDTHS[build]
    assert encoder.library.startswith("sentence-transformers ")


def test_worker_processes_prepare_images_and_dimensions_are_cut(folder: Path) -> None:
    encoder = load_encoder(str(folder), device="cpu")
    rows = encoder.encode_image(IMAGES)
    torch.testing.assert_close(encoder.encode_image(IMAGES, 2, num_workers=1), rows, atol=1e-5, rtol=0)
    cut = load_encoder(str(folder), device="cpu", truncate_dim=8)
    first = torch.nn.functional.normalize(rows[:, :8], dim=-1)
    torch.testing.assert_close(cut.encode_image(IMAGES), first, atol=1e-5, rtol=0)


def test_the_prompts_are_part_of_the_fingerprint(folder: Path) -> None:
    encoder = load_encoder(str(folder), device="cpu")
    assert encoder.fingerprint() == load_encoder(str(folder), device="cpu").fingerprint()
    other = load_encoder(str(folder), device="cpu")
    other.model.prompts = {**other.model.prompts, "query": "Find the photo."}
    assert encoder.fingerprint() != other.fingerprint()
    lengths, cut = encoder.text_lengths(["a", "ab" * 300])
    assert (lengths > 1).tolist() == [True, True]
    assert cut.tolist() == [False, True]
