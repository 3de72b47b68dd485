"""Embeddings of patches by the vision towers of timm that open_clip uses: its plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modeling_llm2clip.modeling_llm2clip_vision import ATTENTION_ROWS

PLAIN_TRANSFORMERS = {"timm.models.eva.Eva", "timm.models.vision_transformer.VisionTransformer"}
# With any other pooling, such as the first principal component, a patch alone is no image.
POOLINGS = ("token", "avg", "map")


def timm_tower(visual: Any) -> nn.Module:
    """Return the tower inside an open_clip adapter of timm.

    Raises:
        ValueError: It is no transformer whose every token is one patch: a convolutional or hierarchical tower mixes
            and merges patches outside its attention, so that MaskCLIP's change of the last attention is not defined.
    """
    trunk = visual.trunk
    # By name, since heat maps of other models do without timm.
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(trunk).__mro__}
    plain = bool(kinds & PLAIN_TRANSFORMERS) and type(trunk.patch_embed).__qualname__ == "PatchEmbed"
    if not plain or trunk.global_pool not in POOLINGS or not hasattr(trunk.blocks[-1], "attn"):
        raise ValueError(
            f"the patches of the {type(trunk).__name__} of timm in this model of open_clip are not known: MaskCLIP is "
            "defined where every token of the last attention is one patch, as in the VisionTransformer and the Eva of "
            f"timm with pooling {', '.join(POOLINGS)}."
        )
    return trunk


def timm_patches(model: Any, trunk: Any, pixel_values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Project the patches of a tower of timm: final norm, attention pooling of each patch alone, heads."""
    height, width = pixel_values.shape[-2:]
    with _input_size(trunk, (height, width)):
        patches = trunk.forward_features(pixel_values)[:, trunk.num_prefix_tokens :]
    if trunk.attn_pool is not None:
        alone = [trunk.attn_pool(part[:, None]) for part in patches.flatten(0, 1).split(ATTENTION_ROWS)]
        patches = torch.cat(alone).unflatten(0, patches.shape[:2])
    return model.visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(patches))))


@contextmanager
def _input_size(trunk: Any, size: tuple[int, int]) -> Iterator[None]:
    """Let a tower read images of another size, with positions interpolated as timm does."""
    before, positions = trunk.patch_embed.img_size, trunk.pos_embed
    trunk.set_input_size(img_size=size)
    try:
        yield
    finally:
        trunk.set_input_size(img_size=before)
        # What was interpolated there and back is not what it was.
        trunk.pos_embed = positions
