"""The encoder of our models, and `embed_captions` and `embed_images`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import llm2clip
from llm2clip import LLM2CLIPModel, LLM2CLIPVisionModelWithProjection, embed_captions, embed_images
from llm2clip.data import DamagedImageError
from llm2clip.encoders.images import ImageList
from llm2clip.encoders.ours import OurEncoder
from llm2clip.models.embeddings import NonFiniteError
from tests.builders import tiny
from tests.llm2clip.encoders import models

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def pictures(count: int) -> list[Image.Image]:
    return [Image.effect_noise((30 + 3 * index, 40), 80).convert("RGB") for index in range(count)]


@pytest.fixture(scope="module")
def model(saved_model: Path) -> LLM2CLIPModel:
    return LLM2CLIPModel.from_pretrained(saved_model)


@pytest.mark.parametrize("fields", [{}, tiny.FROZEN_TOWER], ids=["default", "frozen tower"])
def test_a_folder_and_a_loaded_model_give_the_embeddings_of_the_model(fields: dict[str, Any], tmp_path: Path) -> None:
    model, processor, images = tiny.save(tmp_path, **fields).train(), tiny.processor(), pictures(5)
    found = embed_images(images, model, processor, num_workers=2), embed_captions(tiny.CAPTIONS, model, processor)
    assert not model.training
    rows, texts = model.encode_image(images, processor), model.encode_text(tiny.CAPTIONS, processor)
    encoder = llm2clip.load_encoder(str(tmp_path))
    for other in (found[0], embed_images(images, tmp_path, batch_size=2), encoder.encode_image(images)):
        torch.testing.assert_close(other, rows, **CLOSE)
    by_folder = embed_captions(tiny.CAPTIONS, tmp_path, batch_size=1)
    for other in (found[1], by_folder, encoder.encode_text(tiny.CAPTIONS)):
        torch.testing.assert_close(other, texts, **CLOSE)
    torch.testing.assert_close(embed_captions(tiny.CAPTIONS[0], model, processor.tokenizer), texts[:1], **CLOSE)
    assert embed_images([], tmp_path).shape == embed_captions([], tmp_path).shape == (0, 24)


def test_images_may_be_arrays_files_bytes_and_records(saved_model: Path, tmp_path: Path) -> None:
    (image,) = pictures(1)
    image.save(tmp_path / "a.png")
    content, array = (tmp_path / "a.png").read_bytes(), np.asarray(image)
    images = [image, tmp_path / "a.png", str(tmp_path / "a.png"), content, {"bytes": content}]
    rows = embed_images(images, saved_model)
    torch.testing.assert_close(rows, rows[:1].expand(5, -1))
    for single in (image, array, torch.from_numpy(array.copy())):
        torch.testing.assert_close(embed_images(single, saved_model), rows[:1], **CLOSE)
    assert embed_images(np.stack([array] * 2), saved_model).shape == (2, 24)


def test_a_grey_array_is_the_picture_that_pillow_makes_of_it_at_every_door(saved_model: Path) -> None:
    array = np.asarray(pictures(1)[0].convert("L"))
    model, encoder = LLM2CLIPModel.from_pretrained(saved_model), llm2clip.load_encoder(str(saved_model))
    expected = model.encode_image(Image.fromarray(array))
    for encode in (model.encode_image, encoder.encode_image, partial(embed_images, model=saved_model)):
        for images in (array, torch.from_numpy(array.copy()), [array], [pictures(1)[0], array]):
            torch.testing.assert_close(encode(images)[-1:], expected, **CLOSE)
        with pytest.raises(ValueError):  # noqa: PT011 - it is for the image processor, or has no white point
            encode(array / 255)


def test_a_text_tower_gives_its_own_embeddings(tmp_path: Path) -> None:
    tower, tokenizer = tiny.text_model(), tiny.processor().tokenizer
    tower.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = tower.encode(tiny.CAPTIONS, tokenizer)
    torch.testing.assert_close(embed_captions(tiny.CAPTIONS, tower, tokenizer), expected)
    torch.testing.assert_close(embed_captions([*tiny.CAPTIONS, tiny.CAPTIONS[0]], tmp_path)[3], expected[0])
    encoder = llm2clip.load_encoder(str(tmp_path))
    torch.testing.assert_close(encoder.encode_text(tiny.CAPTIONS), F.normalize(expected, dim=-1), **CLOSE)
    with pytest.raises(ValueError, match="is a text tower, which does not embed images"):
        encoder.encode_image(pictures(1))


def test_a_damaged_image_is_an_error_or_a_row_of_nan(
    saved_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    images = [*pictures(2), tmp_path / "bad.jpg"]
    with pytest.raises(DamagedImageError, match=r"bad\.jpg' cannot be used"):
        embed_images(images, saved_model)
    rows = embed_images(images, saved_model, on_error="skip", batch_size=1)
    assert rows.isnan().all(dim=1).tolist() == [False, False, True]
    assert "bad.jpg: Pillow does not recognize its format" in caplog.text
    with pytest.raises(ValueError, match="on_error is 'drop'"):
        embed_images(images, saved_model, on_error="drop")  # type: ignore[arg-type]


def test_an_embedding_that_is_not_finite_is_an_error_also_where_damaged_images_are_skipped(saved_model: Path) -> None:
    half = LLM2CLIPVisionModelWithProjection.from_pretrained(saved_model)
    torch.nn.init.constant_(half.visual_projection.weight, float("nan"))
    encoder = OurEncoder(half, tiny.processor().image_processor)
    with pytest.raises(NonFiniteError, match=r"2 of 2 images are NaN or infinite: 0, 2\."):
        encoder.encode_image([*pictures(1), b"no image", *pictures(1)], on_error="skip")
    with pytest.raises(NonFiniteError, match="1 of 1 images are NaN or infinite: an upload"):
        encoder.encode_image(pictures(1)[0], names=["an upload"])


def test_rows_are_embedded_in_parts_without_the_skipped_ones(saved_model: Path) -> None:
    images = [*pictures(3), b"no image", *pictures(2)]
    encoder = OurEncoder.load(str(saved_model))
    parts = list(encoder.encode_image_parts(ImageList(images), range(5, -1, -1), batch_size=2, on_error="skip"))
    assert [len(part.rows) for part in parts] == [2, 2, 2]
    assert [[(place, key) for place, key, _ in part.skipped] for part in parts] == [[], [(0, "3")], []]
    assert not parts[1].rows[0].any()
    torch.testing.assert_close(encoder.encode_image(images[:3:2]), torch.stack([parts[2].rows[1], parts[1].rows[1]]))


def test_towers_for_images_of_any_shape_receive_all_their_inputs() -> None:
    model = tiny.joint_model(vision=tiny.other_vision_config("siglip2_vision_model"))
    image_processor = tiny.naflex_processor().image_processor
    images = pictures(3)
    expected = model.encode_image(images, image_processor)
    torch.testing.assert_close(embed_images(images, model, image_processor, batch_size=2), expected, **CLOSE)


def test_an_instruction_reaches_the_llm_of_a_joint_model(model: LLM2CLIPModel) -> None:
    processor, instruction = tiny.processor(), "Find a picture:"
    llm_embeds = model.text_model.encode(tiny.CAPTIONS, processor.tokenizer, instruction=instruction)
    expected = F.normalize(model.get_text_features(llm_embeds=llm_embeds).pooler_output, dim=-1).detach()
    assert not torch.allclose(model.encode_text(tiny.CAPTIONS, processor), expected, atol=1e-3)
    found = model.encode_text(tiny.CAPTIONS, processor, instruction=instruction)
    torch.testing.assert_close(found, expected, **CLOSE)
    found = embed_captions(tiny.CAPTIONS, model, processor, instruction=instruction)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_other_models_and_missing_processors_are_refused(
    model: LLM2CLIPModel, saved_model: Path, tmp_path: Path
) -> None:
    tiny.text_model().save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match=r"contains a text tower"):
        embed_images([], tmp_path / "tower")
    LLM2CLIPVisionModelWithProjection.from_pretrained(saved_model).save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match=r"contains a vision half"):
        embed_captions([], tmp_path / "half")
    for embed in (embed_images, embed_captions):
        with pytest.raises(ValueError, match="a loaded model needs its processor too"):
            embed([], model)


def test_an_encoder_of_images_leaves_out_the_llm(saved_model: Path, tmp_path: Path) -> None:
    half, images = llm2clip.load_encoder(str(saved_model), needs=["image"]), pictures(2)
    assert type(half.model) is LLM2CLIPVisionModelWithProjection
    torch.testing.assert_close(half.encode_image(images), embed_images(images, saved_model), **CLOSE)
    half.model.save_pretrained(tmp_path)
    tiny.processor().image_processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a vision half .* Texts and images need the whole model"):
        llm2clip.load_encoder(str(tmp_path), needs=["image", "text"])


@pytest.mark.parametrize("kind", ["ours", "clip"])
def test_auto_keeps_the_dtype_but_is_not_float16_on_a_cpu(kind: str, tmp_path: Path) -> None:
    model, name = tiny.save(tmp_path) if kind == "ours" else models.save_transformers("clip", tmp_path), str(tmp_path)
    images = pictures(2)
    for saved, expected in ((torch.bfloat16, "bfloat16"), (torch.float16, "float32")):
        model.to(saved).save_pretrained(name)
        for needs in (["image", "text"], ["image"]):
            assert llm2clip.load_encoder(name, dtype="auto", device="cpu", needs=needs).dtype == expected
    automatic, exact = (llm2clip.load_encoder(name, dtype=dtype, device="cpu") for dtype in ("auto", "float32"))
    torch.testing.assert_close(automatic.encode_image(images), exact.encode_image(images), **CLOSE)
    assert llm2clip.load_encoder(name, dtype="float16", device="cpu").dtype == "float16"
