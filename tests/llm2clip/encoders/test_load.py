"""The encoder of our models, and `embed_captions` and `embed_images`."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import llm2clip
from llm2clip import LLM2CLIPModel, LLM2CLIPVisionModelWithProjection, embed_captions, embed_images
from llm2clip.data import DamagedImageError
from llm2clip.encoders.batches import ImageList
from llm2clip.encoders.ours import OurEncoder
from llm2clip.utils.embeddings import NonFiniteError
from tests.llm2clip.encoders import models
from tests.modeling_llm2clip import tiny

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def pictures(count: int) -> list[Image.Image]:
    return [Image.effect_noise((30 + 3 * index, 40), 80).convert("RGB") for index in range(count)]


@pytest.fixture(scope="module")
def model(saved_model: Path) -> LLM2CLIPModel:
    return LLM2CLIPModel.from_pretrained(saved_model)


def test_model_of_frozen_towers_gives_equal_embeddings_at_every_door(tmp_path: Path) -> None:
    frozen, processor, images = tiny.save(tmp_path, **tiny.FROZEN_TOWER), tiny.processor(), pictures(3)
    torch.testing.assert_close(embed_images(images, tmp_path), frozen.encode_image(images, processor), **CLOSE)
    texts = frozen.encode_text(tiny.CAPTIONS, processor)
    torch.testing.assert_close(embed_captions(tiny.CAPTIONS, tmp_path), texts, **CLOSE)


def test_images_of_a_folder_and_of_a_loaded_model_are_equal_to_encode_image(
    saved_model: Path, model: LLM2CLIPModel
) -> None:
    images = pictures(5)
    expected = model.encode_image(images, tiny.processor())
    torch.testing.assert_close(embed_images(images, saved_model, batch_size=2), expected, **CLOSE)
    torch.testing.assert_close(embed_images(images, str(saved_model), tiny.processor()), expected, **CLOSE)
    torch.testing.assert_close(embed_images(images, model, tiny.processor(), num_workers=2), expected, **CLOSE)
    image_processor = tiny.processor().image_processor
    torch.testing.assert_close(embed_images(images[0], model, image_processor), expected[:1], **CLOSE)
    array = np.asarray(images[0])
    for single in (array, torch.from_numpy(array.copy())):
        torch.testing.assert_close(embed_images(single, model, image_processor), expected[:1], **CLOSE)
    assert embed_images(np.stack([array] * 2), model, image_processor).shape == (2, 24)
    assert embed_images([], model, tiny.processor()).shape == (0, 24)


def test_images_may_be_files_bytes_and_records(saved_model: Path, tmp_path: Path) -> None:
    (image,) = pictures(1)
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    rows = embed_images([image, tmp_path / "a.png", str(tmp_path / "a.png"), content, {"bytes": content}], saved_model)
    torch.testing.assert_close(rows, rows[:1].expand(5, -1))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))


def test_a_damaged_image_is_an_error_or_a_row_of_nan(
    saved_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    images = [*pictures(2), tmp_path / "bad.jpg"]
    with pytest.raises(DamagedImageError, match=r"bad\.jpg' cannot be used"):
        embed_images(images, saved_model)
    with caplog.at_level(logging.WARNING):
        rows = embed_images(images, saved_model, on_error="skip", batch_size=1)
    assert rows.isnan().all(dim=1).tolist() == [False, False, True]
    assert "bad.jpg: Pillow does not recognize its format" in caplog.text
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip', not 'drop'"):
        embed_images(images, saved_model, on_error="drop")  # type: ignore[arg-type]


def test_an_embedding_that_is_not_finite_is_an_error_or_has_a_reason(saved_model: Path) -> None:
    half = LLM2CLIPVisionModelWithProjection.from_pretrained(saved_model)
    torch.nn.init.constant_(half.visual_projection.weight, float("nan"))
    encoder = OurEncoder(half, tiny.processor().image_processor)
    images = ImageList([*pictures(1), b"no image", *pictures(1)])
    with pytest.raises(NonFiniteError, match=r"2 of 2 images are NaN or infinite: 0, 2\. A model gives such values"):
        encoder.encode_image_rows(images, range(3), on_error="skip", on_not_finite="raise")
    with pytest.raises(NonFiniteError, match="1 of 1 images are NaN or infinite: 0"):
        embed_images(pictures(1), half, tiny.processor())
    with pytest.raises(NonFiniteError, match="1 of 1 images are NaN or infinite: an upload"):
        encoder.encode_image(pictures(1)[0], names=["an upload"])
    found = encoder.encode_image_rows(ImageList(pictures(1)), [0], on_error="skip")
    assert found.reasons == ["the model's embedding of it is not finite"]


def test_rows_are_embedded_in_parts_without_the_skipped_ones(saved_model: Path) -> None:
    images = ImageList([*pictures(3), b"no image", *pictures(2)])
    encoder = OurEncoder.load(str(saved_model))
    parts = list(encoder.encode_image_parts(images, range(5, -1, -1), batch_size=2, part_size=4, on_error="skip"))
    assert [part.rows for part in parts] == [[5, 4, 3, 2], [1, 0]]
    assert [reason is None for reason in parts[0].reasons] == [True, True, False, True]
    assert not parts[0].embeds[2].any()
    whole = encoder.encode_image_rows(images, [0, 2])
    torch.testing.assert_close(whole.embeds[1], parts[0].embeds[3])
    assert whole.embeds.shape == (2, encoder.width)


def test_towers_for_images_of_any_shape_receive_all_their_inputs() -> None:
    model = tiny.joint_model(vision=tiny.other_vision_config("siglip2_vision_model"))
    image_processor = tiny.naflex_processor().image_processor
    images = pictures(3)
    expected = model.encode_image(images, image_processor)
    torch.testing.assert_close(embed_images(images, model, image_processor, batch_size=2), expected, **CLOSE)


def test_captions_of_a_joint_model_are_unit_rows_in_the_shared_space(saved_model: Path, model: LLM2CLIPModel) -> None:
    expected = model.encode_text(tiny.CAPTIONS, tiny.processor())
    torch.testing.assert_close(embed_captions(tiny.CAPTIONS, saved_model), expected)
    torch.testing.assert_close(embed_captions(tiny.CAPTIONS, model, tiny.processor(), batch_size=1), expected, **CLOSE)
    tokenizer = tiny.processor().tokenizer
    torch.testing.assert_close(embed_captions(tiny.CAPTIONS[0], model, tokenizer), expected[:1], **CLOSE)
    assert embed_captions([], model, tokenizer).shape == (0, 24)


def test_an_instruction_reaches_the_llm_of_a_joint_model(model: LLM2CLIPModel) -> None:
    processor, instruction = tiny.processor(), "Find a picture:"
    llm_embeds = model.text_model.encode(tiny.CAPTIONS, processor.tokenizer, instruction=instruction)
    expected = F.normalize(model.get_text_features(llm_embeds=llm_embeds).pooler_output, dim=-1).detach()
    assert not torch.allclose(model.encode_text(tiny.CAPTIONS, processor), expected, atol=1e-3)
    found = model.encode_text(tiny.CAPTIONS, processor, instruction=instruction)
    torch.testing.assert_close(found, expected, **CLOSE)
    found = embed_captions(tiny.CAPTIONS, model, processor, instruction=instruction)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_captions_of_a_text_tower_are_the_towers_own_embeddings(tmp_path: Path) -> None:
    tower, tokenizer = tiny.text_model(), tiny.processor().tokenizer
    tower.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = tower.encode(tiny.CAPTIONS, tokenizer)
    torch.testing.assert_close(embed_captions(tiny.CAPTIONS, tower, tokenizer), expected)
    torch.testing.assert_close(embed_captions(tiny.CAPTIONS, str(tmp_path), tokenizer), expected)
    torch.testing.assert_close(embed_captions([*tiny.CAPTIONS, tiny.CAPTIONS[0]], tmp_path)[3], expected[0])


def test_a_loaded_model_is_put_into_evaluation_mode() -> None:
    model = tiny.joint_model().train()
    embed_images(pictures(1), model, tiny.processor())
    assert not model.training


def test_progress_is_shown_by_default_and_can_be_hidden(
    saved_model: Path, model: LLM2CLIPModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        embed_images(pictures(3), model, tiny.processor(), show_progress_bar=False)
        embed_captions(tiny.CAPTIONS, model, tiny.processor(), show_progress_bar=False)
        assert "Embedding" not in caplog.text
        embed_images(pictures(3), model, tiny.processor())
        embed_captions([*tiny.CAPTIONS, tiny.CAPTIONS[0]], model, tiny.processor())
    assert "Embedding images: 3 images in" in caplog.text
    assert "Embedding captions: 3 captions in" in caplog.text


def test_other_models_and_missing_processors_are_refused(
    model: LLM2CLIPModel, saved_model: Path, tmp_path: Path
) -> None:
    tiny.text_model().save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match=r"is not an LLM2CLIP model or a vision half .*: it contains a text tower"):
        embed_images([], tmp_path / "tower")
    LLM2CLIPVisionModelWithProjection.from_pretrained(saved_model).save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match=r"a text tower or an embedding model .*: it contains a vision half"):
        embed_captions([], tmp_path / "half")
    for embed in (embed_images, embed_captions):
        with pytest.raises(ValueError, match="a loaded model needs its processor too"):
            embed([], model)


def test_public_names_are_those_of_the_room() -> None:
    assert llm2clip.embed_images is embed_images
    assert llm2clip.embed_captions is embed_captions


def test_an_encoder_of_images_leaves_out_the_llm_and_auto_keeps_the_dtype(saved_model: Path, tmp_path: Path) -> None:
    half = llm2clip.load_encoder(str(saved_model), needs=["image"])
    assert type(half.model) is LLM2CLIPVisionModelWithProjection
    images = pictures(2)
    torch.testing.assert_close(
        half.encode_image(images), llm2clip.load_encoder(str(saved_model)).encode_image(images), **CLOSE
    )
    half.model.save_pretrained(tmp_path / "half")
    tiny.processor().image_processor.save_pretrained(tmp_path / "half")
    with pytest.raises(
        ValueError, match=r"a vision half of an LLM2CLIP model\. Texts and images need the whole model"
    ):
        llm2clip.load_encoder(str(tmp_path / "half"), needs=["image", "text"])
    saved = {
        str(tmp_path / "ours"): tiny.save(tmp_path / "ours"),
        str(tmp_path / "clip"): models.save_transformers("clip", tmp_path / "clip"),
    }
    for name, model in saved.items():
        model.bfloat16().save_pretrained(name)
        assert [llm2clip.load_encoder(name, dtype=dtype).dtype for dtype in ("auto", "float32")] == [
            "bfloat16",
            "float32",
        ]
    name, weights = models.register_open_clip(tmp_path / "open_clip", "auto-open-clip")
    assert llm2clip.load_encoder(f"open_clip:{name}/{weights}", dtype="auto").dtype == "float32"


def test_auto_is_not_float16_on_a_cpu(tmp_path: Path) -> None:
    saved = {
        str(tmp_path / "ours"): tiny.save(tmp_path / "ours"),
        str(tmp_path / "clip"): models.save_transformers("clip", tmp_path / "clip"),
    }
    images = pictures(2)
    for name, model in saved.items():
        model.half().save_pretrained(name)
        automatic, exact = (llm2clip.load_encoder(name, dtype=dtype, device="cpu") for dtype in ("auto", "float32"))
        assert automatic.dtype == "float32"
        torch.testing.assert_close(automatic.encode_image(images), exact.encode_image(images), **CLOSE)
        assert llm2clip.load_encoder(name, dtype="float16", device="cpu").dtype == "float16"
        half = llm2clip.load_encoder(name, dtype="auto", device="cpu", needs=["image"])
        assert half.dtype == "float32"
