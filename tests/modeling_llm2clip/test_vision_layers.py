"""Features of several layers of the vision tower, side by side."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPVisionModelWithProjection
from tests.builders import tiny

PIXELS = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
PLAIN = {**tiny.SIZES, "num_hidden_layers": 4, "image_size": 28, "patch_size": 7}
TOWERS: dict[str, dict[str, Any]] = {
    "eva02_vision_model": {},
    "clip_vision_model": PLAIN,
    "siglip_vision_model": PLAIN,
    "dinov2": PLAIN,
    "dinov2_with_registers": {**PLAIN, "num_register_tokens": 4},
    "dinov3_vit": {**PLAIN, "num_register_tokens": 4},
    "deit": PLAIN,
    "vit": PLAIN,
}
LAYERS = [1, 2, 4]


def model_of(model_type: str, **fields: Any) -> LLM2CLIPModel:
    options = TOWERS[model_type]
    config = AutoConfig.for_model(model_type, **options) if options else tiny.vision_config(num_hidden_layers=4)
    torch.manual_seed(0)
    model = tiny.joint_model(vision=config, **fields)
    with torch.no_grad():
        for values in model.vision_model.parameters():
            values.normal_(0.3, 0.3)
    return model


def shortened(tower: nn.Module, layers: int) -> nn.Module:
    """A tower that ends after some of its layers."""
    tower = copy.deepcopy(tower)
    stack = max((part for part in tower.modules() if isinstance(part, nn.ModuleList)), key=len)
    del stack[layers:]
    for part in tower.modules():
        if hasattr(part, "config"):
            part.config.num_hidden_layers = layers
    return tower


def pooled(model: LLM2CLIPModel, pooling: str) -> Tensor:
    model.config.vision_pooling = pooling
    return model.get_vision_features(PIXELS).float()


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean"])
@pytest.mark.parametrize("model_type", TOWERS)
def test_each_layer_is_pooled_as_the_tower_does_it_with_its_last_one(model_type: str, pooling: str) -> None:
    model = model_of(model_type)
    whole, expected = model.vision_model, []
    for layers in LAYERS:
        model.vision_model = shortened(whole, layers)
        expected.append(pooled(model, pooling))
    model.vision_model, model.config.vision_layers = whole, LAYERS
    found = pooled(model, pooling)
    torch.testing.assert_close(found, torch.cat(expected, dim=1))
    assert found.shape == (3, model.config.vision_width)
    assert not torch.allclose(expected[0], expected[1])


def test_features_are_the_hidden_states_of_the_tower_normalised() -> None:
    model = model_of("dinov2", vision_pooling="cls_mean", vision_layers=[2, 3, 4])
    tower = model.vision_model
    states = [tower.layernorm(tower(PIXELS, output_hidden_states=True).hidden_states[layer]) for layer in (2, 3, 4)]
    expected = [part for layer in states for part in (layer[:, 0], layer[:, 1:].mean(dim=1))]
    torch.testing.assert_close(model.get_vision_features(PIXELS), torch.cat(expected, dim=1))


@pytest.mark.parametrize("model_type", ["eva02_vision_model", "clip_vision_model", "dinov2"])
def test_a_saved_model_embeds_as_before(model_type: str, tmp_path: Path) -> None:
    fields = {**tiny.FROZEN_TOWER, "vision_layers": LAYERS}
    model = tiny.with_statistics(model_of(model_type, **fields))
    model.save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    expected = model.encode_image(tiny.IMAGES, tiny.processor())
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert loaded.config.vision_layers == LAYERS
    torch.testing.assert_close(loaded.encode_image(tiny.IMAGES), expected, atol=0, rtol=0)
    half = LLM2CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(half(PIXELS).pooler_output, model.get_image_features(PIXELS).pooler_output)


def test_the_hidden_width_of_a_gated_head_is_that_of_one_layer() -> None:
    of_layer = 2 * tiny.HIDDEN  # class token and mean
    hidden = tiny.FROZEN_TOWER["visual_head_expansion"] * of_layer
    head: Any = tiny.joint_model(**tiny.FROZEN_TOWER, vision_layers=[1, 2]).visual_projection
    assert head.f1.weight.shape == head.f2.weight.shape == (hidden, 2 * of_layer)
    assert head.g.weight.shape == (24, hidden)


def test_patches_are_embedded_as_the_features_are() -> None:
    for pooling in ("mean", "cls_mean"):
        fields: dict[str, Any] = {"vision_pooling": pooling, "vision_layers": LAYERS, "standardize_vision": True}
        model = tiny.with_statistics(model_of("dinov2", **fields))
        patches = model.get_patch_features(PIXELS)
        assert patches.shape == (3, 16, 24)
        torch.testing.assert_close(patches.mean(dim=1), model.get_image_features(PIXELS).pooler_output)


@pytest.mark.parametrize(
    ("vision", "layers", "message"),
    [
        (None, [2, 3], r"vision_layers is \[2, 3\], but the eva02_vision_model has layers 1 to 2"),
        (None, [0, 1], "layers 1 to 2"),
        (None, [2, 1], "in ascending order"),
        (None, [], "name some of them"),
        (AutoConfig.for_model("convnext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2), [1], "no layers of one"),
        (tiny.other_vision_config("siglip2_vision_model"), [1, 2], "how Siglip2VisionModel normalises and pools"),
    ],
)
def test_layers_that_do_not_exist_are_refused(vision: Any, layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.joint_model(vision=vision, vision_layers=layers)
