"""Recognize the vision tower of a checkpoint by the names and shapes of its tensors, and derive its config.

The width of a head and the pretraining grid of rotary positions cannot be derived from shapes. They are taken from the
original's model_configs JSON if it is given, and otherwise from the published configs in `hub_configs/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CLIPVisionConfig, PretrainedConfig, SiglipVisionConfig

from llm2clip.convert import layouts
from llm2clip.convert.published import published_like
from llm2clip.convert.renaming import Layout
from modeling_llm2clip import EVA02VisionConfig

Shapes = Mapping[str, tuple[int, ...]]

LAYER_NORM_EPS_OPENAI = 1e-5
LAYER_NORM_EPS_TIMM = 1e-6
# The SigLIP 2 tower in the configs of the original, which take its sizes from timm.
TIMM_TOWERS: dict[str, dict[str, Any]] = {
    "vit_so400m_patch14_siglip_224": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
}


@dataclass(frozen=True)
class TowerKind:
    """A family of vision towers in one checkpoint layout.

    Attributes:
        name: Name in messages.
        layout: Mapping of the names; None if they are those of the transformers class.
        config: Function that creates the config from sizes.
        patch: Name of the kernel of the patch embedding.
        positions: Name of the position embedding.
        blocks: Name of the list of blocks.
        mlp: Name of the first MLP matrix of a block.
        marks: Names, without the prefix of the tower, that identify its checkpoints.
        class_tokens: Number of positions before the patches.
    """

    name: str
    layout: Layout | None
    config: Callable[..., PretrainedConfig]
    patch: str
    positions: str
    blocks: str
    mlp: str
    marks: tuple[str, ...]
    class_tokens: int = 1

    def sizes(self, shapes: Shapes) -> dict[str, int]:
        """Derive the sizes in the config from the shapes of the tensors."""
        kernel = shapes[self.patch]
        patches = shapes[self.positions][-2] - self.class_tokens
        start, end = f"{self.blocks}.", f".{self.mlp}.weight"
        return {
            "hidden_size": kernel[0],
            "intermediate_size": shapes[f"{start}0{end}"][0],
            "num_hidden_layers": sum(name.startswith(start) and name.endswith(end) for name in shapes),
            "image_size": round(patches**0.5) * kernel[-1],
            "patch_size": kernel[-1],
        }


def _eva(**sizes: Any) -> PretrainedConfig:
    return EVA02VisionConfig(**{"rope_grid_size": None, "swiglu": False, "sub_layer_norm": False, **sizes})


def _openai(**sizes: Any) -> PretrainedConfig:
    # All of OpenAI's towers have heads of width 64 and QuickGELU.
    heads = sizes["hidden_size"] // 64
    fields = {"num_attention_heads": heads, "hidden_act": "quick_gelu", "layer_norm_eps": LAYER_NORM_EPS_OPENAI}
    return CLIPVisionConfig(**{**fields, **sizes})


def _siglip(**sizes: Any) -> PretrainedConfig:
    return SiglipVisionConfig(**{"hidden_act": "gelu", "layer_norm_eps": LAYER_NORM_EPS_TIMM, **sizes})


_EVA = ("patch_embed.proj.weight", "pos_embed", "blocks")
_HUB = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight", "encoder.layers")
_OPENAI = ("conv1.weight", "positional_embedding", "transformer.resblocks")
_EVA02_MARKS = ("blocks.0.attn.inner_attn_ln.weight", "blocks.0.attn.q_proj.weight")
_EVA_MARKS = ("blocks.0.attn.qkv.weight", "blocks.0.attn.q_bias")
_OPENAI_MARKS = ("conv1.weight", "transformer.resblocks.0.attn.in_proj_weight")
_HUB_EVA02_MARKS = ("encoder.layers.0.self_attn.inner_attn_ln.weight",)
_SIGLIP_MARKS = ("head.probe", "embeddings.position_embedding.weight")

TOWER_KINDS = (
    TowerKind("EVA02 (EVA-CLIP names)", layouts.EVA02, EVA02VisionConfig, *_EVA, "mlp.w1", _EVA02_MARKS),
    TowerKind(
        "EVA02 (timm names)", layouts.TIMM_EVA02, EVA02VisionConfig, *_EVA, "mlp.fc1_g", ("blocks.0.mlp.fc1_g.weight",)
    ),
    TowerKind(
        "EVA02 (Hub class EvaCLIPModel)", layouts.HUB_EVA02, EVA02VisionConfig, *_HUB, "mlp.fc1", _HUB_EVA02_MARKS
    ),
    TowerKind("EVA (EVA-CLIP names)", layouts.EVA, _eva, *_EVA, "mlp.fc1", _EVA_MARKS),
    TowerKind("SigLIP (timm names)", layouts.TIMM_SIGLIP, _siglip, *_EVA, "mlp.fc1", ("attn_pool.latent",), 0),
    TowerKind("CLIP ViT (OpenAI names)", layouts.OPENAI, _openai, *_OPENAI, "mlp.c_fc", _OPENAI_MARKS),
    TowerKind("CLIP ViT (transformers names)", None, _openai, *_HUB, "mlp.fc1", ("pre_layrnorm.weight",)),
    TowerKind("SigLIP (transformers names)", None, _siglip, *_HUB, "mlp.fc1", _SIGLIP_MARKS, 0),
)
TOWER_PREFIXES = ("visual.trunk.", "visual.", "trunk.", "vision_model.", "")


def find_tower(shapes: Shapes) -> tuple[TowerKind, str] | None:
    """Find the kind of vision tower in a checkpoint and the prefix of its names; None if there is no tower."""
    matches = (
        (kind, prefix)
        for prefix in TOWER_PREFIXES
        for kind in TOWER_KINDS
        if all(prefix + mark in shapes for mark in kind.marks)
    )
    return next(matches, None)


def config_of_shapes(kind: TowerKind, shapes: Shapes, given: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """Derive the config of a tower from the shapes of its tensors.

    Args:
        shapes: Shapes by name, without the prefix of the tower.
        given: Known fields, such as a `vision_config` of transformers. If it is None, fields that cannot be derived
            from shapes are taken from the published config of the same sizes.

    Raises:
        ValueError: No published config has these sizes.
    """
    sizes: dict[str, Any] = kind.sizes(shapes)
    if given is not None:
        return kind.config(**{**given, **sizes})
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "patch_size")
    if (published := published_like({name: sizes[name] for name in same})) is not None:
        return kind.config(**{**published.vision_config.to_dict(), **sizes})
    listed = ", ".join(f"{name}={value}" for name, value in sizes.items())
    raise ValueError(
        f"no published tower of kind {kind.name} has {listed}, and the width of the heads cannot be derived from "
        "shapes; give its model_configs JSON with --model-config."
    )


def config_of_original(vision: Mapping[str, Any], quick_gelu: bool) -> PretrainedConfig:
    """Convert the `vision_cfg` of an original model_configs JSON.

    `quick_gelu` is that of the JSON and applies to OpenAI towers.

    Raises:
        ValueError: The timm model is unknown.
    """
    if name := vision.get("timm_model_name"):
        if name not in TIMM_TOWERS:
            raise ValueError(f"timm_model_name {name!r} is unknown; known: {', '.join(TIMM_TOWERS)}.")
        return _siglip(**TIMM_TOWERS[name])
    sizes = {
        "hidden_size": vision["width"],
        "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": vision["width"] // vision.get("head_width", 64),
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
    }
    if "eva_model_name" not in vision:
        return _openai(hidden_act="quick_gelu" if quick_gelu else "gelu", **sizes)
    grid = vision["image_size"] // vision["patch_size"]
    rope_grid = None
    if vision.get("rope"):
        # Without interpolation the original uses the positions of the grid itself.
        rope_grid = vision.get("pt_hw_seq_len", 16) if vision.get("intp_freq") else grid
    return EVA02VisionConfig(
        rope_grid_size=rope_grid,
        swiglu=bool(vision.get("naiveswiglu")),
        sub_layer_norm=bool(vision.get("subln")),
        post_norm=bool(vision.get("postnorm")),
        layer_scale_init_value=vision.get("ls_init_value"),
        drop_path_rate=vision.get("drop_path_rate") or 0.0,
        **sizes,
    )
