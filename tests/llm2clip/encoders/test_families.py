"""Every CLIP-like family of transformers embeds as its own model and processor do, or is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoProcessor

from llm2clip.data import decode_image
from llm2clip.encoders.load import load_encoder
from modeling_llm2clip import with_pillow

from . import families
from .models import IMAGES, LENGTH, TEXTS, save, save_transformers, stacked

# Whether the family was trained with texts of full length.
FAMILIES: dict[Any, bool] = {
    "clip": False,
    "siglip": True,
    "siglip2": True,
    "chinese_clip": False,
    families.altclip: False,
    families.align: True,
    families.blip: False,
    families.clipseg: False,
    families.groupvit: False,
    families.metaclip_2: False,
    families.tipsv2: True,
    families.owlvit: True,
    families.dual_encoder: False,
}


def call(folder: Path, model: Any, full_length: bool) -> Any:
    """Call a model as its documentation does: with what its processor makes of images and texts."""
    processor = AutoProcessor.from_pretrained(folder)
    padding = "max_length" if full_length else "longest"
    inputs = processor(text=TEXTS, padding=padding, truncation=True, max_length=LENGTH, return_tensors="pt")
    pixels = with_pillow(processor.image_processor)([decode_image(image) for image in IMAGES], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs, **pixels)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: getattr(family, "__name__", family))
def test_embeddings_are_those_of_the_model_itself(family: Any, tmp_path: Path) -> None:
    saved = save_transformers(family, tmp_path) if isinstance(family, str) else save(family, tmp_path)
    expected = call(tmp_path, getattr(saved, "clip", saved), FAMILIES[family])
    encoder = load_encoder(str(tmp_path))
    # TIPSv2 has no token for an empty text, and divides its zeros by their length: that row is zero here.
    texts = normalize(expected.text_embeds.nan_to_num(), dim=-1)
    images = normalize(expected.image_embeds, dim=-1)
    torch.testing.assert_close(encoder.encode_text(TEXTS), texts, atol=1e-6, rtol=0)
    # Each alone, so that it would be padded otherwise than in a batch.
    torch.testing.assert_close(torch.cat([encoder.encode_text([text]) for text in TEXTS]), texts, atol=1e-6, rtol=0)
    assert encoder.encode_text([]).shape == (0, encoder.width)
    inputs = stacked(encoder, IMAGES)
    torch.testing.assert_close(encoder.forward_images(inputs), images, atol=1e-5, rtol=0)
    assert encoder.forward_features(inputs).ndim == 2
    lengths, cut = encoder.text_lengths(TEXTS)
    assert cut.tolist() == (lengths > LENGTH).tolist()
    assert encoder.fingerprint() == load_encoder(str(tmp_path)).fingerprint()


def test_a_retrieval_model_of_blip_scores_as_its_contrastive_head(tmp_path: Path) -> None:
    model = save(families.blip_retrieval, tmp_path)
    processor, encoder = AutoProcessor.from_pretrained(tmp_path), load_encoder(str(tmp_path))
    texts = processor(text=TEXTS, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    pixels = with_pillow(processor.image_processor)([decode_image(image) for image in IMAGES], return_tensors="pt")
    with torch.no_grad():
        scores = model(
            texts["input_ids"], pixels["pixel_values"], use_itm_head=False, attention_mask=texts["attention_mask"]
        ).itm_score
    inputs = stacked(encoder, IMAGES)
    found = encoder.forward_images(inputs)
    torch.testing.assert_close(found @ encoder.encode_text(TEXTS).T, scores, atol=1e-5, rtol=0)
    # Features for probes are what is projected, normalised once.
    projected = normalize(model.vision_proj(encoder.forward_features(inputs)), dim=-1).detach()
    torch.testing.assert_close(projected, found, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (families.xclip, r"\(xclip\) is .*: XCLIPModel has no get_image_features, but get_video_features"),
        (families.blip_2, r"\(Blip2Model\) does not embed texts as one vector each"),
        (families.unequal, r"\(AlignModel\) embeds images as vectors of 8 values, but texts of 24"),
    ],
    ids=["xclip", "blip_2", "unequal"],
)
def test_what_has_no_common_space_is_refused(family: Callable[[], Any], reason: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    with pytest.raises(ValueError, match=reason):
        load_encoder(str(tmp_path)).encode_image(IMAGES)
