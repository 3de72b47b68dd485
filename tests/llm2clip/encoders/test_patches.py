"""Patch embeddings after MaskCLIP, against the formula written out for every kind of tower."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from llm2clip.encoders.patches import patch_embeddings, patch_similarity
from tests.builders import tiny

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGE = {"image_size": 28, "patch_size": 7}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def randomised(model: nn.Module) -> Any:
    """Give every weight a size that matters, biases and norms included."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, values in model.named_parameters():
            # Gains of norms stay near 1.
            values.copy_(torch.randn_like(values) * 0.2 + float(values.ndim == 1 and "bias" not in name))
    return model.eval()


def of_transformers(model_type: str) -> Any:
    fields = {} if "siglip" in model_type else {"projection_dim": 24}
    image = {"patch_size": 7, "num_patches": 16} if model_type == "siglip2" else IMAGE
    config = AutoConfig.for_model(model_type, vision_config={**TOWER, **image}, text_config=TEXT, **fields)
    return randomised(AutoModel.from_config(config))


def joint(model_type: str, **fields: Any) -> Any:
    vision = tiny.vision_config(num_hidden_layers=3)
    if model_type == "siglip2_vision_model":
        vision = AutoConfig.for_model(model_type, **TOWER, patch_size=7, num_patches=16)
    elif model_type != "eva02":
        registers = {"num_register_tokens": 2} if "registers" in model_type else {}
        vision = AutoConfig.for_model(model_type, **TOWER, **IMAGE, **registers)
    return tiny.with_statistics(randomised(tiny.joint_model(vision=vision, **fields)))


def inner(tower: Any) -> Any:
    """The modules of a tower, which CLIP and SigLIP nest before transformers 5.6."""
    return getattr(tower, "vision_model", tower)


def before_the_last_layer(tower: Any, pixels: Tensor) -> Tensor:
    """The states before the last layer, from the tower's own record of its states."""
    options = {} if "dinov2" in tower.config.model_type else {"interpolate_pos_encoding": True}
    return tower(pixel_values=pixels, output_hidden_states=True, **options).hidden_states[-2]


def eva02_states(tower: Any, pixels: Tensor) -> Tensor:
    states, block = before_the_last_layer(tower, pixels), tower.blocks[-1]
    attention, mlp = block.attn, block.mlp
    values = F.linear(block.norm1(states), attention.v_proj.weight, attention.v_proj.bias)
    values = states + attention.proj(attention.inner_attn_ln(values))
    hidden = block.norm2(values)
    values = values + mlp.w3(mlp.ffn_ln(F.silu(mlp.w1(hidden)) * mlp.w2(hidden)))
    return tower.norm(values)


def clip_states(tower: Any, pixels: Tensor) -> Tensor:
    states, layer = before_the_last_layer(tower, pixels), inner(tower).encoder.layers[-1]
    attention = layer.self_attn
    values = states + attention.out_proj(attention.v_proj(layer.layer_norm1(states)))
    values = values + layer.mlp(layer.layer_norm2(values))
    return inner(tower).post_layernorm(values)


def siglip_states(tower: Any, pixels: Tensor, naflex: bool = False) -> Tensor:
    """Pool every token alone: its value in place of the mean of values."""
    head, states = inner(tower).head, naflex_states(inner(tower), pixels) if naflex else clip_states(tower, pixels)
    width = states.shape[-1]
    weight, bias = head.attention.in_proj_weight, head.attention.in_proj_bias
    values = head.attention.out_proj(F.linear(states, weight[2 * width :], bias[2 * width :]))
    return values + head.mlp(head.layernorm(values))


def dinov2_states(tower: Any, pixels: Tensor) -> Tensor:
    states, layer = before_the_last_layer(tower, pixels), tower.encoder.layer[-1]
    weights = dict(layer.attention.named_parameters())
    value, output = (
        next(name.removesuffix(".weight") for name in weights if name.endswith(ends))
        for ends in (("v_proj.weight", "value.weight"), ("o_proj.weight", "dense.weight"))
    )
    normed = F.linear(layer.norm1(states), weights[f"{value}.weight"], weights[f"{value}.bias"])
    attended = F.linear(normed, weights[f"{output}.weight"], weights[f"{output}.bias"])
    values = states + layer.layer_scale1.lambda1 * attended
    values = values + layer.layer_scale2.lambda1 * layer.mlp(layer.norm2(values))
    return tower.layernorm(values)


def patches_of(states: Callable[[Any, Tensor], Tensor], first: int = 1) -> Callable[[Any, Tensor], Tensor]:
    """The formula of a model: the states of its tower without the first tokens, through its projection, if any."""

    def formula(model: Any, pixels: Tensor) -> Tensor:
        patches = states(model.vision_model, pixels)[:, first:]
        return model.visual_projection(patches) if hasattr(model, "visual_projection") else patches

    return formula


def eva02_standardised(model: Any, pixels: Tensor) -> Tensor:
    """Class token of the unchanged tower and patch, standardised, through the gated head."""
    own = model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output
    patches = eva02_states(model.vision_model, pixels)[:, 1:]
    both = torch.cat([own[:, None].expand_as(patches), patches], dim=-1)
    both = (both - model.visual_standardization.mean) / model.visual_standardization.std
    head = model.visual_projection
    return head.g(F.relu6(head.f1(both)) * head.f2(both))


def naflex_states(tower: Any, pixels: Tensor) -> Tensor:
    """The states of SigLIP 2 before its head: patches as a list, positions resized as in its own code."""
    layer, (rows, columns) = tower.encoder.layers[-1], (pixels.shape[2] // 7, pixels.shape[3] // 7)
    patches = [
        image[:, 7 * row : 7 * row + 7, 7 * column : 7 * column + 7].permute(1, 2, 0).flatten()
        for image in pixels
        for row in range(rows)
        for column in range(columns)
    ]
    table = tower.embeddings.position_embedding.weight.T.reshape(1, 32, 4, 4)
    table = F.interpolate(table, (rows, columns), mode="bilinear", antialias=True)[0].flatten(1).T
    states = tower.embeddings.patch_embedding(torch.stack(patches).view(len(pixels), rows * columns, -1)) + table
    for earlier in tower.encoder.layers[:-1]:
        states = earlier(states, None)
    values = states + layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(states)))
    return tower.post_layernorm(values + layer.mlp(layer.layer_norm2(values)))


SIGLIP, SIGLIP_2 = patches_of(siglip_states, first=0), patches_of(partial(siglip_states, naflex=True), first=0)
Case = tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor]]
CASES: dict[str, Case] = {
    "eva02": (lambda: joint("eva02"), patches_of(eva02_states)),
    "eva02, standardised": (lambda: joint("eva02", **tiny.FROZEN_TOWER), eva02_standardised),
    "joint clip": (lambda: joint("clip_vision_model"), patches_of(clip_states)),
    "joint siglip": (lambda: joint("siglip_vision_model"), SIGLIP),
    "joint siglip 2": (lambda: joint("siglip2_vision_model"), SIGLIP_2),
    "joint dinov2": (lambda: joint("dinov2", vision_pooling="mean"), patches_of(dinov2_states)),
    "joint dinov2 with registers": (lambda: joint("dinov2_with_registers"), patches_of(dinov2_states, first=3)),
    **{
        kind: (lambda kind=kind: of_transformers(kind), patches_of(clip_states))
        for kind in ("clip", "metaclip_2", "chinese_clip", "altclip", "clipseg")
    },
    "siglip": (lambda: of_transformers("siglip"), SIGLIP),
    "siglip 2": (lambda: of_transformers("siglip2"), SIGLIP_2),
}


@pytest.mark.parametrize("size", [(28, 28), (21, 42)], ids=["its own size", "another"])
@pytest.mark.parametrize("case", CASES)
def test_a_patch_takes_its_own_value_in_the_last_attention(case: str, size: tuple[int, int]) -> None:
    build, formula = CASES[case]
    model = build()
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = F.normalize(formula(model, pixels), dim=-1)
    found = patch_embeddings(model, pixels, values_only=True)
    grid = (size[0] // 7, size[1] // 7)
    assert found.shape == (2, *grid, expected.shape[-1])
    torch.testing.assert_close(found, expected.unflatten(1, grid), atol=1e-5, rtol=0)
    # Without it, the same patches attend to all others.
    assert not torch.allclose(patch_embeddings(model, pixels), found, atol=0.05)


@pytest.mark.parametrize("build", [lambda: joint("eva02"), lambda: of_transformers("clip")])
def test_zeros_complete_the_last_patches_and_the_model_is_afterwards_as_before(build: Callable[[], Any]) -> None:
    model, pixels, whole = build(), torch.randn(1, 3, 20, 29), torch.zeros(1, 3, 21, 35)
    whole[:, :, :20, :29] = pixels
    before = patch_embeddings(model, whole)
    found = patch_embeddings(model, pixels, values_only=True)
    assert found.shape[1:3] == (3, 5)
    torch.testing.assert_close(found, patch_embeddings(model, whole, values_only=True), atol=0, rtol=0)
    torch.testing.assert_close(patch_embeddings(model, whole), before, atol=0, rtol=0)


def test_a_tower_that_it_does_not_fit_is_an_error() -> None:
    swin = AutoConfig.for_model("swin", image_size=28, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2])
    model, pixels = tiny.joint_model(vision=swin), torch.randn(1, 3, 28, 28)
    with pytest.raises(ValueError, match="makes 49 patches of images of 14 x 14 patches"):
        patch_similarity(model, pixels, torch.randn(1, 24))
    for other, message in (
        (model, "not known for a swin tower, but for eva02_vision_model, clip_vision"),
        (nn.Linear(1, 1), "Linear has no vision tower"),
    ):
        with pytest.raises(ValueError, match=message):
            patch_embeddings(other, pixels, values_only=True)


@pytest.mark.parametrize("model_type", ["eva02", "clip_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize("fields", [{}, tiny.FROZEN_TOWER], ids=["default", "frozen tower"])
def test_similarity_is_that_of_the_projected_patches(model_type: str, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    vision = None if model_type == "eva02" else tiny.other_vision_config(model_type)
    model = tiny.with_statistics(tiny.joint_model(vision=vision, **fields))
    pixels, texts = torch.randn(2, 3, 28, 28), F.normalize(torch.randn(2, 24), dim=-1)
    with torch.no_grad():
        output = model.vision_model(pixel_values=pixels)
        patches = output.last_hidden_state[:, 1:]
        if model_type == "clip_vision_model":
            tower = model.vision_model
            patches = getattr(tower, "vision_model", tower).post_layernorm(patches)
        if model_type == "siglip_vision_model":
            patches = output.last_hidden_state
            if not fields:  # the pooled token comes from attention, which has a single patch to attend to
                head = getattr(model.vision_model, "vision_model", model.vision_model).head
                patches = torch.stack([head(patches[:, patch, None]) for patch in range(16)], dim=1)
        if fields:
            patches = torch.cat([output.pooler_output[:, None].expand_as(patches), patches], dim=-1)
            assert model.visual_standardization is not None
            patches = model.visual_standardization(patches)
        expected = F.normalize(model.visual_projection(patches), dim=-1) @ texts[:, :, None]
    found = patch_similarity(model, pixels, texts)
    torch.testing.assert_close(found, expected.view(2, 4, 4))
