"""The model of the protocol tests finds embeddings by position, content and key."""

from __future__ import annotations

import pytest
import torch

from llm2clip.evaluation.benchmarks.data import BenchmarkImages
from tests.llm2clip.evaluation.fake_session import FakeSession

IMAGES = BenchmarkImages([b"one", b"two"], names=["a.png", "b.png"])


def test_images_are_found_by_position_content_and_key() -> None:
    expected = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    for table in ([[2, 0], [3, 4]], {b"two": [3, 4], "a.png": [2, 0]}):
        session = FakeSession(table, {})
        assert torch.equal(session.embed_images(IMAGES), expected)
        assert torch.equal(session.embed_features(IMAGES), torch.tensor([[2.0, 0.0], [3.0, 4.0]]))


def test_texts_are_formatted_measured_and_unknown_ones_are_an_error() -> None:
    session = FakeSession([[1, 0]], {"a dog": [0, 5]}, text_format=str.lower, max_words=1)
    encoder = session.encoder
    assert torch.equal(session.embed_texts(["A Dog", "a dog"]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    lengths, cut = session.text_lengths(["A Dog", "dog"])
    assert (lengths.tolist(), cut.tolist()) == ([2, 1], [True, False])
    with pytest.raises(KeyError):
        encoder.encode_text(["A Dog"])
