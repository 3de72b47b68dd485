"""Checkpoints of published sizes, compared with timm and transformers; test_convert.py has every layout in small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionModelWithProjection

from llm2clip import cli
from llm2clip.convert.layouts import TIMM_EVA02
from llm2clip.convert.original import to_original
from llm2clip.convert.published import published_models
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPVisionModelWithProjection
from modeling_llm2clip.modeling_llm2clip_heads import LLM2CLIPTextAdapter
from tests.llm2clip.convert import checkpoints

pytestmark = pytest.mark.slow
SCALE = torch.tensor(4.6)


def randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.03)


def published(name: str) -> LLM2CLIPConfig:
    return published_models()[name].config


def compare(features: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def eva02(oracle: Any) -> dict[str, Tensor]:
    """Weights of an LLM2CLIP model with the tower and head of timm."""
    state = oracle.state_dict()
    tower = TIMM_EVA02.under("", "vision_model.").rename(
        {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    )
    assert not tower.unknown
    head = {f"visual_projection.{kind}": state[f"head.{kind}"] for kind in ("weight", "bias")}
    adapter = LLM2CLIPTextAdapter(published("LLM2CLIP-EVA02-B-16")).state_dict(prefix="text_adapter.")
    return {**tower.tensors, **adapter, **head, "logit_scale": SCALE}


@pytest.mark.parametrize("layout", ["original", "microsoft", "timm"])
def test_eva02_base_gives_the_outputs_of_timm(layout: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    oracle = timm.create_model("eva02_base_patch16_clip_224", num_classes=1280).eval()
    randomise(oracle)
    ours, source = eva02(oracle), tmp_path / "checkpoint.safetensors"
    if layout == "original":
        source = tmp_path / "checkpoint.pt"
        torch.save(to_original(published("LLM2CLIP-EVA02-B-16"), ours), source)
    else:
        save_file(oracle.state_dict() if layout == "timm" else checkpoints.microsoft_eva_names(ours), source)
    assert cli.main(["convert", str(source), str(tmp_path / "out")]) == 0
    images = torch.randn(2, 3, 224, 224)
    loader: Any = {"timm": AutoModel, "microsoft": LLM2CLIPVisionModelWithProjection}.get(layout, LLM2CLIPModel)
    model = loader.from_pretrained(tmp_path / "out", **({"text_model": False} if layout == "original" else {})).eval()
    with torch.no_grad():
        if layout == "timm":
            # The head of CLIP itself is dropped; stage 2 starts with a new one.
            compare(model(images).pooler_output, oracle.forward_head(oracle.forward_features(images), pre_logits=True))
        else:
            compare(model.get_image_features(images).pooler_output, oracle(images))
    if layout == "original":
        assert model.logit_scale.equal(SCALE)


@pytest.mark.parametrize("layout", ["original", "openai"])
def test_openai_base_gives_the_outputs_of_transformers(layout: str, tmp_path: Path) -> None:
    config = published("LLM2CLIP-Openai-B-16")
    oracle: Any = CLIPVisionModelWithProjection(config.vision_config).eval()
    randomise(oracle)
    ours = dict(LLM2CLIPModel(config, text_model=False).state_dict())
    ours |= {name: tensor for name, tensor in oracle.state_dict().items() if name in ours}
    original, options = to_original(config, ours), []
    if layout == "openai":
        options = ["--text-model", checkpoints.llm_folder(tmp_path / "llm", 16)]
        original = {name: tensor for name, tensor in original.items() if not name.startswith("text.")}
        original |= {"visual.proj": torch.randn(768, 512), "token_embedding.weight": torch.ones(5, 4)}
    torch.save({"state_dict": original}, tmp_path / "checkpoint.pt")
    assert cli.main(["convert", str(tmp_path / "checkpoint.pt"), str(tmp_path / "out"), *options]) == 0
    model = LLM2CLIPModel.from_pretrained(tmp_path / "out", text_model=False).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        compare(model.vision_model(images).pooler_output, oracle.vision_model(images).pooler_output)
        if layout == "original":
            compare(model.get_image_features(images).pooler_output, oracle(images).image_embeds)
