"""Checkpoints in the formats of other code, created from the golden models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from llm2clip import cli
from llm2clip.convert.original import joint_config
from tests.builders import tiny
from tests.golden import Golden, load_golden
from tests.original import from_original

EVA = load_golden("customclip_a")
OPENAI = load_golden("customclip_b")
BACK = {
    "text_adapter.blocks.{n}.norm.": "text_adapter.adaptor.{n}.ln.",
    "text_adapter.blocks.{n}.fc1.": "text_adapter.adaptor.{n}.fn.0.",
    "text_adapter.blocks.{n}.fc2.": "text_adapter.adaptor.{n}.fn.3.",
    "text_adapter.norm.": "text_adapter.adaptor.4.",
    "text_adapter.proj.": "text_adapter.adaptor.5.",
}


def convert(source: str | Path, destination: Path, *options: str) -> None:
    assert cli.main(["convert", str(source), str(destination), *options]) == 0


def llm_folder(folder: Path, width: int, **kwargs: Any) -> str:
    """Save a plain LLM with a given width and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**tiny.DECODER, "hidden_size": width, "num_attention_heads": 2, "num_key_value_heads": 1})
    LlamaModel(config).save_pretrained(folder, **kwargs)
    tiny.plain_tokenizer().save_pretrained(folder)
    return str(folder)


def llm_of(golden: Golden, folder: Path) -> str:
    """Save an LLM with the width that the adapter of a golden model expects."""
    return llm_folder(folder, golden.meta["config"]["text_cfg"]["llm_embedding_dim"])


def model_config(golden: Golden, folder: Path) -> str:
    path = folder / "model_config.json"
    path.write_text(json.dumps(golden.meta["config"]))
    return str(path)


def original_pt(golden: Golden, path: Path, wrap: str | None = None, dtype: torch.dtype | None = None) -> str:
    """Save a golden model in the format of the original training code."""
    state: Any = {name: tensor.to(dtype or tensor.dtype) for name, tensor in golden.group("state").items()}
    if wrap == "ddp":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    elif wrap == "deepspeed":
        state = {"module": state, "global_steps": 7, "optimizer": None, "args": [1, "x"]}
    elif wrap is not None:
        state = {wrap: state, "epoch": 3}
    torch.save(state, path)
    return str(path)


def ours(golden: Golden) -> dict[str, Tensor]:
    _, tensors = from_original(golden.group("state"), golden.meta["config"])
    return tensors


def microsoft_openai_folder(folder: Path) -> str:
    """Save a golden model in the layout of microsoft/LLM2CLIP-Openai-*."""
    folder.mkdir()
    vision_config = {**joint_config(OPENAI.meta["config"]).vision_config.to_dict(), "hidden_act": "quick_gelu"}
    tensors = {name: tensor.clone() for name, tensor in microsoft_openai_names(ours(OPENAI)).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {"model_type": "clip", "architectures": ["LLM2CLIPModel"], "projection_dim": 1280}
    (folder / "config.json").write_text(json.dumps({**fields, "vision_config": vision_config, "text_config": {}}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    return str(folder)


def microsoft_openai_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of this package as in microsoft/LLM2CLIP-Openai-*."""
    return {_adaptor(name): tensor for name, tensor in tensors.items()}


def _adaptor(name: str) -> str:
    for mine, theirs in BACK.items():
        for number in range(4):
            name = name.replace(mine.replace("{n}", str(number)), theirs.replace("{n}", str(number)))
    return name


def microsoft_eva_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors of this package to the layout of microsoft/LLM2CLIP-EVA02-*, which has only the vision half."""
    names = {
        "blocks.": "encoder.layers.",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.inner_attn_ln": "self_attn.inner_ln_kept",
        "attn.proj": "self_attn.out_proj",
        "attn.": "self_attn.",
        "self_self_attn": "self_attn",
        "inner_ln_kept": "inner_attn_ln",
        "mlp.w": "mlp.fc",
        "patch_embed.proj": "embeddings.patch_embedding",
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding.weight",
        "vision_model.norm": "vision_model.post_layernorm",
    }
    renamed = {}
    for name, tensor in tensors.items():
        if not name.startswith(("vision_model.", "visual_projection.")):
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        if name.endswith("class_embedding"):
            tensor = tensor[0, 0]
        elif name.endswith("position_embedding.weight"):
            tensor = tensor[0]
        renamed[name] = tensor.clone()
    return renamed


def older_bias_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the biases as in EVA-CLIP and older versions of the original."""
    return {
        name.replace("q_proj.bias", "q_bias").replace("v_proj.bias", "v_bias"): value for name, value in state.items()
    }


def with_text_tower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the adapter with the text tower of CLIP, as in a plain EVA-CLIP checkpoint."""
    state = {name: tensor for name, tensor in state.items() if not name.startswith("text.")}
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(4), "token_embedding.weight": torch.ones(5, 4)}
    return {**state, **{f"text.{name}": tensor for name, tensor in text.items()}}
