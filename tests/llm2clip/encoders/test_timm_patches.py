"""Patch embeddings after MaskCLIP of the towers of timm in open_clip, against the formula written out."""

from __future__ import annotations

from functools import partial
from typing import Any

import open_clip
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional as F

from llm2clip.encoders.patches import patch_embeddings

from .test_patches import SIZES, compare, randomised

SMALL = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 4}

# Arguments of timm's list that are about weights.
WEIGHTS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def small(kind: type, fields: dict[str, Any]) -> Any:
    """Build a tower as one of timm's list, which open_clip makes by name and whose sizes it takes from there."""
    tower = kind(**{**SMALL, **{name: value for name, value in fields.items() if name not in WEIGHTS}})
    tower.default_cfg = {}
    return tower


@timm.models.register_model
def vit_small_for_tests(pretrained: bool = False, **fields: Any) -> Any:
    return small(timm.models.vision_transformer.VisionTransformer, fields)


@timm.models.register_model
def vit_map_for_tests(pretrained: bool = False, **fields: Any) -> Any:
    """As SigLIP: no class token, attention pooling."""
    return vit_small_for_tests(pretrained, **{**fields, "class_token": False, "global_pool": "map"})


@timm.models.register_model
def eva_small_for_tests(pretrained: bool = False, **fields: Any) -> Any:
    """As EVA-02: rotary positions, a norm inside the attention, and SwiGLU."""
    eva02 = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4), "scale_attn_inner": True, "swiglu_mlp": True}
    return small(timm.models.eva.Eva, {"mlp_ratio": 2, **eva02, **fields})


def of_timm(name: str, pool: str, proj: str) -> Any:
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": 28}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 4, "layers": 1}
    return randomised(open_clip.CLIP(32, vision, text))


def states_before(trunk: Any, pixels: Tensor) -> Tensor:
    """The states before the last block, of an image of any size."""
    grid = (pixels.shape[2] // 7, pixels.shape[3] // 7)
    states = trunk.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
    if trunk.cls_token is not None:
        states = torch.cat([trunk.cls_token.expand(len(pixels), -1, -1), states], dim=1)
    states = states + resample_abs_pos_embed(
        trunk.pos_embed, new_size=list(grid), old_size=[4, 4], num_prefix_tokens=trunk.num_prefix_tokens
    )
    states = trunk.norm_pre(states)
    options = {}
    if getattr(trunk, "rope", None) is not None:
        options["rope"] = timm.layers.RotaryEmbeddingCat(
            8, in_pixels=False, feat_shape=list(grid), ref_feat_shape=[4, 4]
        ).get_embed()
    for block in trunk.blocks[:-1]:
        states = block(states, **options)
    return states


def vit_values(attention: Any, states: Tensor) -> Tensor:
    weight, bias = attention.qkv.weight[64:], attention.qkv.bias[64:]
    return attention.proj(F.linear(states, weight, bias))


def eva_values(attention: Any, states: Tensor) -> Tensor:
    values = F.linear(states, attention.qkv.weight[64:], attention.v_bias)
    return attention.proj(attention.norm(values))


def formula(model: Any, pixels: Tensor, values_of: Any) -> Tensor:
    trunk = model.visual.trunk
    states, block = states_before(trunk, pixels), trunk.blocks[-1]
    states = states + values_of(block.attn, block.norm1(states))
    states = states + block.mlp(block.norm2(states))
    patches = trunk.norm(states)[:, trunk.num_prefix_tokens :]
    if trunk.attn_pool is not None:
        pool = trunk.attn_pool
        values = pool.proj(F.linear(patches, pool.kv.weight[32:], pool.kv.bias[32:]))
        patches = values + pool.mlp(pool.norm(values))
    return model.visual.head(trunk.fc_norm(patches))


CASES = {
    "token": ("vit_small_for_tests", "token", "linear", vit_values),
    "mean": ("vit_small_for_tests", "avg", "mlp", vit_values),
    "siglip": ("vit_map_for_tests", "map", "none", vit_values),
    "eva02": ("eva_small_for_tests", "token", "linear", eva_values),
}


@SIZES
@pytest.mark.parametrize("case", CASES)
def test_a_patch_takes_its_own_value_in_the_last_attention(case: str, size: tuple[int, int]) -> None:
    name, pool, proj, values_of = CASES[case]
    compare(of_timm(name, pool, proj), partial(formula, values_of=values_of), size)


@pytest.mark.parametrize("name", ["ResNet", "SwinTransformer"])
def test_a_tower_whose_tokens_are_no_patches_is_an_error(name: str) -> None:
    trunk = timm.create_model({"ResNet": "resnet18"}.get(name, "swin_tiny_patch4_window7_224"), num_classes=0)
    model = torch.nn.Module()
    model.visual = torch.nn.Module()
    model.visual.trunk = trunk
    with pytest.raises(ValueError, match=rf"the {name} of timm .* are not known"):
        patch_embeddings(model, torch.randn(1, 3, 224, 224), values_only=True)
