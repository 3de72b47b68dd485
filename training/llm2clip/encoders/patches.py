"""Embeddings of the patches of an image in the space that images and texts share.

MaskCLIP (arXiv 2112.01071) takes them from the values of the last attention layer: in its place, `out_proj(v_proj(x))`
of the patch itself. Residual, feed-forward layer, final norm and projection stay. That is attention of a token to
itself alone, as which it is computed here, so that whatever a tower does to its values (the `inner_attn_ln` of EVA02,
a layer scale, LoRA) is part of it, and what it does to queries and keys (rotary positions) is not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from modeling_llm2clip.modeling_eva02 import resize_position_embedding
from modeling_llm2clip.modeling_llm2clip_utils import execution_device
from modeling_llm2clip.modeling_llm2clip_vision import ATTENTION_ROWS, patch_tokens, pool_alone

# Vision towers of transformers, with the names of their layers and of the attention in each.
CLIP_LAYERS = ("encoder.layers", "self_attn")
DINO_LAYERS = ("encoder.layer", "attention")
LAYERS = {
    "eva02_vision_model": ("blocks", "attn"),
    "clip_vision_model": CLIP_LAYERS,
    "siglip_vision_model": CLIP_LAYERS,
    "siglip2_vision_model": CLIP_LAYERS,
    "altclip_vision_model": CLIP_LAYERS,
    "chinese_clip_vision_model": CLIP_LAYERS,
    "clipseg_vision_model": CLIP_LAYERS,
    "metaclip_2_vision_model": CLIP_LAYERS,
    "dinov2": DINO_LAYERS,
    "dinov2_with_registers": DINO_LAYERS,
}
OPEN_CLIP_LAYERS = ("transformer.resblocks", "attn")
TIMM_LAYERS = ("blocks", "attn")
TIMM_TRANSFORMERS = {"timm.models.eva.Eva", "timm.models.vision_transformer.VisionTransformer"}
# With any other pooling, such as the first principal component, a patch alone is no image.
TIMM_POOLINGS = ("token", "avg", "map")


@torch.no_grad()
def patch_embeddings(model: nn.Module, pixel_values: Tensor, values_only: bool = False) -> Tensor:
    """Embed the patches of images in the shared space, as the model embeds whole images.

    A patch passes through all that follows the tower's layers: norm, standardisation and head of our models, the
    attention pooling of SigLIP (with the patch as its only token), projection.

    Args:
        model: A joint model or vision half of this package, a CLIP or SigLIP model of transformers, or a model of
            open_clip with a VisionTransformer of its own or of timm, or an Eva of timm.
        pixel_values: `(images, 3, height, width)` of any size, normalised. Zeros at the bottom and at the right
            complete the last patches, and the table of positions is interpolated.
        values_only: Take the values of the last attention layer, as MaskCLIP; otherwise its output.

    Returns:
        Unit vectors, float32 `(images, rows, columns, width)` on the device of the model.

    Raises:
        ValueError: The tower has no fixed grid of patches, or, with `values_only`, is none of those whose last
            attention layer is known.
    """
    tower, patches_of, known_layers = _library(model)
    height, width = _patch_size(tower)
    pixel_values = F.pad(pixel_values, (0, -pixel_values.shape[-1] % width, 0, -pixel_values.shape[-2] % height))
    grid = (pixel_values.shape[-2] // height, pixel_values.shape[-1] // width)
    pixel_values = pixel_values.to(execution_device(tower), next(tower.parameters()).dtype)
    with ExitStack() as stack:
        if values_only:
            stack.enter_context(_to_themselves(_last_attention(tower, known_layers), grid[0] * grid[1]))
        patches = patches_of(model, tower, pixel_values, grid)
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{type(tower).__name__} makes {patches.shape[1]} patches of images of {grid[0]} x {grid[1]} patches: it "
            "has no fixed grid of patches, which segmentation and heat maps need."
        )
    return F.normalize(patches.float(), dim=-1).unflatten(1, grid)


def _library(model: Any) -> tuple[Any, Callable[..., Tensor], tuple[str, str] | None]:
    """Return the tower of a model, what embeds its patches, and the names of its layers and their attention."""
    visual = getattr(model, "visual", None)
    if visual is None:
        return _tower(model), _transformers_patches, None
    if hasattr(visual, "trunk"):
        return _timm_tower(visual), _timm_patches, TIMM_LAYERS
    return _open_clip_tower(visual), _open_clip_patches, OPEN_CLIP_LAYERS


def _tower(model: nn.Module) -> nn.Module:
    tower: Any = getattr(model, "vision_model", None)
    if tower is None:
        raise ValueError(f"{type(model).__name__} has no vision tower whose patches are known.")
    return tower


def _open_clip_tower(visual: Any) -> nn.Module:
    plain = all(hasattr(visual, name) for name in ("positional_embedding", "transformer", "ln_post", "proj"))
    if not plain or visual.attn_pool is not None or not visual.transformer.batch_first:
        raise ValueError(
            f"the patches of the {type(visual).__name__} of open_clip are not known; only those of a "
            "VisionTransformer without attention pooling, and of transformers of timm, are."
        )
    return visual


def _patch_size(tower: Any) -> tuple[int, int]:
    # In timm's towers, the patch embedding knows it.
    size = getattr(getattr(tower, "config", getattr(tower, "patch_embed", tower)), "patch_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(sides) != 2:
        raise ValueError(f"{type(tower).__name__} has no fixed patch size, which segmentation and heat maps need.")
    return sides


def _last_attention(tower: Any, known_layers: tuple[str, str] | None) -> nn.Module:
    model_type = getattr(getattr(tower, "config", None), "model_type", None)
    layers, attention = known_layers or LAYERS.get(str(model_type), ("", ""))
    if not layers:
        raise ValueError(
            f"MaskCLIP's patch embeddings are not known for a {model_type or type(tower).__name__} tower, but for "
            f"{', '.join(LAYERS)}, and transformers of open_clip."
        )
    # Towers of CLIP and SigLIP nest their modules before transformers 5.6.
    return getattr(getattr(tower, "vision_model", tower).get_submodule(layers)[-1], attention)


@contextmanager
def _to_themselves(attention: nn.Module, patches: int) -> Iterator[None]:
    """Let the last tokens of an attention layer, which are the patches, attend to themselves alone.

    The tokens before them, class token and registers, attend to all tokens as ever.
    """

    def replace(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        states: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        attended: Tensor = output[0] if isinstance(output, tuple) else output

        def alone(value: Any, part: Tensor) -> Any:
            # A layer may get its states as query, key and value; other tensors are positions and masks of the tokens.
            is_states = isinstance(value, Tensor) and value.shape == states.shape
            return part if is_states else None if isinstance(value, Tensor) else value

        patch_values = []
        for part in states[:, -patches:].flatten(0, 1)[:, None].split(ATTENTION_ROWS):
            options = {name: alone(value, part) for name, value in kwargs.items()}
            values = module.forward(*(alone(value, part) for value in args), **options)
            patch_values.append((values[0] if isinstance(values, tuple) else values)[:, 0])
        own_values = torch.cat(patch_values).unflatten(0, (len(states), patches))
        mixed = torch.cat([attended[:, :-patches], own_values], dim=1)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    handle = attention.register_forward_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _transformers_patches(model: Any, tower: Any, pixel_values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Project the patches of a model of this package or of a CLIP-like model of transformers."""
    size, options = getattr(tower.config, "image_size", None), dict[str, Any]()
    parameters = inspect.signature(tower.forward).parameters
    if "spatial_shapes" in parameters:
        pixel_values, options = _patch_lists(pixel_values, grid)
    elif "interpolate_pos_encoding" in parameters and tuple(pixel_values.shape[-2:]) != (size, size):
        options["interpolate_pos_encoding"] = True
    if hasattr(model, "get_patch_features"):
        return model.get_patch_features(pixel_values, **options)
    patches = patch_tokens(tower, tower(pixel_values=pixel_values, **options), pixel_values)
    projection = getattr(model, "visual_projection", None)
    patches = pool_alone(tower, patches)
    return patches if projection is None else projection(patches)


def _patch_lists(pixel_values: Tensor, grid: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Cut images into the lists of patches that NaFlex towers (SigLIP 2) read, with a mask that hides none."""
    patches = pixel_values.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1)).permute(0, 2, 4, 3, 5, 1)
    patches = patches.flatten(3).flatten(1, 2)
    shapes = torch.tensor([grid] * len(patches), device=patches.device)
    mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=patches.device)
    return patches, {"pixel_attention_mask": mask, "spatial_shapes": shapes}


def _open_clip_patches(model: Any, visual: Any, pixel_values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Project the patches of a VisionTransformer of open_clip, whose position table fits one image size alone."""
    positions = resize_position_embedding(visual.positional_embedding[None], grid)[0]
    states: list[Tensor] = []
    handle = visual.transformer.register_forward_hook(lambda module, args, output: states.append(output))
    try:
        functional_call(visual, {"positional_embedding": positions}, (pixel_values,))
    finally:
        handle.remove()
    patches = visual.ln_post(states[0][:, -grid[0] * grid[1] :])
    return patches if visual.proj is None else patches @ visual.proj


def _timm_tower(visual: Any) -> nn.Module:
    """Return the tower inside an open_clip adapter of timm.

    Raises:
        ValueError: It is no transformer whose every token is one patch: a convolutional or hierarchical tower mixes
            and merges patches outside its attention, so that MaskCLIP's change of the last attention is not defined.
    """
    trunk = visual.trunk
    # By name, since heat maps of other models do without timm.
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(trunk).__mro__}
    plain = bool(kinds & TIMM_TRANSFORMERS) and type(trunk.patch_embed).__qualname__ == "PatchEmbed"
    if not plain or trunk.global_pool not in TIMM_POOLINGS or not hasattr(trunk.blocks[-1], "attn"):
        raise ValueError(
            f"the patches of the {type(trunk).__name__} of timm in this model of open_clip are not known: MaskCLIP is "
            "defined where every token of the last attention is one patch, as in the VisionTransformer and the Eva of "
            f"timm with pooling {', '.join(TIMM_POOLINGS)}."
        )
    return trunk


def _timm_patches(model: Any, trunk: Any, pixel_values: Tensor, grid: tuple[int, int]) -> Tensor:
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
