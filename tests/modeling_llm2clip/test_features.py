"""Pooled vision features, their standardisation, the gated head, and the centre of the LLM's embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPVisionModelWithProjection
from tests.builders import tiny

PIXELS = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
PLAIN = {**tiny.SIZES, "image_size": 28, "patch_size": 7}
# Towers, and what of their last hidden state is not a patch; None where the tower's own output is the mean.
TOWERS: dict[str, tuple[dict[str, Any], int | None]] = {
    "eva02_vision_model": ({}, 1),
    "clip_vision_model": (PLAIN, 1),
    "siglip_vision_model": (PLAIN, 0),
    "dinov2_with_registers": ({**PLAIN, "num_register_tokens": 4}, 5),
    "deit": (PLAIN, 2),
    "swin": ({"image_size": 28, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}, 0),
    "convnext": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, None),
}


def model_of(model_type: str, **fields: Any) -> LLM2CLIPModel:
    options, _ = TOWERS[model_type]
    config = AutoConfig.for_model(model_type, **options) if options else tiny.vision_config()
    torch.manual_seed(0)
    return tiny.joint_model(vision=config, **fields)


@pytest.mark.parametrize("model_type", TOWERS)
def test_features_are_the_pooled_token_the_mean_of_the_patches_or_both(model_type: str) -> None:
    model, (_, first) = model_of(model_type), TOWERS[model_type]
    torch.manual_seed(0)
    for values in model.vision_model.parameters():
        torch.nn.init.normal_(values, 0.3, 0.3)
    output = model.vision_model(pixel_values=PIXELS)
    own, states = output.pooler_output, output.last_hidden_state
    if model_type == "clip_vision_model":
        tower = model.vision_model
        states = getattr(tower, "vision_model", tower).post_layernorm(states)
        torch.testing.assert_close(states[:, 0], own)
    mean = states.mean(dim=(2, 3)) if first is None else states[:, first:].mean(dim=1)
    expected = {"cls": own, "mean": mean, "cls_mean": torch.cat([own, mean], dim=1)}
    for pooling, features in expected.items():
        model.config.vision_pooling = pooling
        found = model.get_vision_features(PIXELS)
        torch.testing.assert_close(found, features)
        assert found.shape == (3, model.config.vision_width)


def test_the_mean_leaves_out_patches_that_are_dropped_in_training() -> None:
    model = tiny.joint_model(vision=tiny.vision_config(patch_dropout=0.5), vision_pooling="mean").train()
    torch.manual_seed(0)
    expected = model.vision_model(PIXELS).last_hidden_state[:, 1:].mean(dim=1)
    torch.manual_seed(0)
    torch.testing.assert_close(model.get_vision_features(PIXELS), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_pooling": "max"}, "vision_pooling 'max' is unknown"),
        ({"visual_head": "gated", "visual_projection": False}, "'gated' is a visual projection"),
        ({"text": {"pooling": "max"}}, "pooling 'max' is unknown"),
        (
            {"vision": tiny.other_vision_config("siglip2_vision_model"), "vision_pooling": "mean"},
            r"Siglip2VisionModel pads them .*; use .* 'cls'",
        ),
        ({"vision": AutoConfig.for_model("ijepa", **PLAIN)}, "IJepaModel has no pooled output; use .* 'mean'"),
        ({"visual_projection": False}, "width 32 has to be projection_dim 24"),
    ],
)
def test_impossible_fields_are_rejected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.joint_model(**fields).get_vision_features(PIXELS)


def test_a_tower_without_projection_gives_its_own_output() -> None:
    model = tiny.joint_model(visual_projection=False, projection_dim=32)
    assert model.get_image_features(PIXELS).pooler_output.equal(model.vision_model(PIXELS).pooler_output)


def frozen_tower_model() -> LLM2CLIPModel:
    return tiny.with_statistics(tiny.joint_model(**tiny.FROZEN_TOWER))


def test_images_pass_through_standardisation_and_gated_head() -> None:
    model = frozen_tower_model()
    statistics, head = model.visual_standardization, model.visual_projection
    assert statistics is not None
    states = (model.get_vision_features(PIXELS) - statistics.mean) / statistics.std
    expected = head.g(head.f1(states).clamp(0, 6) * head.f2(states))
    torch.testing.assert_close(model.get_image_features(PIXELS).pooler_output, expected)


def test_the_centre_is_subtracted_before_normalisation() -> None:
    model, embeds = frozen_tower_model(), torch.randn(3, tiny.HIDDEN)
    adapter = model.text_adapter
    assert adapter.center is not None
    states = F.normalize(embeds - adapter.center, dim=-1)
    expected = adapter.proj(adapter.norm(adapter.blocks(states)))
    torch.testing.assert_close(model.get_text_features(llm_embeds=embeds).pooler_output, expected)


@pytest.mark.parametrize("fields", [{}, tiny.FROZEN_TOWER], ids=["default", "frozen tower"])
def test_stored_features_replace_the_pixels(fields: dict[str, Any]) -> None:
    model, embeds = tiny.joint_model(**fields), torch.randn(3, tiny.HIDDEN)
    half = LLM2CLIPVisionModelWithProjection(model.config).eval()
    half.load_state_dict(model.state_dict(), strict=False)
    stored = model.get_vision_features(PIXELS)
    expected = model(pixel_values=PIXELS, llm_embeds=embeds)
    output = model(vision_features=stored, llm_embeds=embeds)
    torch.testing.assert_close(output.logits_per_image, expected.logits_per_image)
    torch.testing.assert_close(half(vision_features=stored).pooler_output, half(pixel_values=PIXELS).pooler_output)
    for inputs in ({}, {"pixel_values": PIXELS, "vision_features": stored}):
        with pytest.raises(ValueError, match="either pixel_values or vision_features"):
            half(**inputs)
    with pytest.raises(ValueError, match=rf"takes \(batch, {model.config.vision_width}\)"):
        model(vision_features=stored[:, :7])


def test_feature_dropout_is_active_in_training_only() -> None:
    model = tiny.joint_model(feature_dropout=0.5)
    expected = model.get_image_features(PIXELS).pooler_output
    torch.testing.assert_close(expected, model.visual_projection(model.get_vision_features(PIXELS)))
    model.train()
    assert not torch.allclose(model.get_image_features(PIXELS).pooler_output, expected)
    assert model.get_vision_features(PIXELS).equal(model.eval().get_vision_features(PIXELS)), "before dropout"


def test_statistics_of_a_16_bit_model_stay_in_float32(tmp_path: Path) -> None:
    names = ("visual_standardization.mean", "visual_standardization.std", "text_adapter.center")
    model = frozen_tower_model()
    expected = {name: model.get_buffer(name).clone() for name in names}
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    models = [model, *(LLM2CLIPModel.from_pretrained(tmp_path, dtype=dtype) for dtype in ("auto", torch.float16))]
    for found in (*models, LLM2CLIPVisionModelWithProjection.from_pretrained(tmp_path)):
        for name in names if hasattr(found, "text_adapter") else names[:2]:
            assert found.get_buffer(name).dtype == torch.float32
            assert found.get_buffer(name).equal(expected[name])
        assert found.visual_projection.g.weight.dtype == found.dtype != torch.float32
        assert found(pixel_values=PIXELS.to(found.dtype)).pooler_output.isfinite().all()


def test_patches_are_embedded_as_the_features_are() -> None:
    for pooling in ("mean", "cls_mean"):
        model = tiny.with_statistics(tiny.joint_model(vision_pooling=pooling, standardize_vision=True))
        patches = model.get_patch_features(PIXELS)
        assert patches.shape == (3, 16, 24)
        torch.testing.assert_close(patches.mean(dim=1), model.get_image_features(PIXELS).pooler_output)
