"""A model whose towers have been run before embeds as the whole model does."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from llm2clip.data import DamagedImageError
from llm2clip.encoders import OurEncoder
from llm2clip.encoders.image_features import open_features
from llm2clip.encoders.images import ImageList
from llm2clip.encoders.stored import StoredEncoder
from tests.builders import tiny


def test_stored_outputs_of_the_towers_give_the_embeddings_of_the_model(tmp_path: Path) -> None:
    model, processor = tiny.joint_model().eval(), tiny.processor()
    files = [io.BytesIO() for _ in tiny.IMAGES[:2]]
    for file, image in zip(files, tiny.IMAGES, strict=False):
        image.save(file, "PNG")
    images = ImageList([files[0].getvalue(), b"no image", files[1].getvalue()])
    llm, whole = OurEncoder(model.text_model, processor), OurEncoder(model, processor)
    features = open_features(model, processor.image_processor, [images], tmp_path, on_error="skip")
    stored = StoredEncoder(model, processor, lambda texts: llm.embed(texts)[0], features)
    texts = [*tiny.CAPTIONS, tiny.CAPTIONS[0]]
    torch.testing.assert_close(stored.encode_text(texts), whole.encode_text(texts), atol=1e-6, rtol=0)
    found, expected = (
        list(encoder.encode_image_parts(images, [2, 1, 0], batch_size=4, on_error="skip"))
        for encoder in (stored, whole)
    )
    torch.testing.assert_close(found[0].rows, expected[0].rows, atol=1e-2, rtol=0)
    assert not found[0].rows[1].any()
    assert found[0].skipped == expected[0].skipped
    assert [(place, key) for place, key, _ in found[0].skipped] == [(1, "1")]
    with pytest.raises(DamagedImageError, match="'1' cannot be used"):
        list(stored.encode_image_parts(images, [2, 1, 0]))
