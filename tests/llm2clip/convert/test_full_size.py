"""Checkpoints of published sizes, compared with timm and transformers; test_convert.py has every layout in small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, CLIPVisionModelWithProjection

from llm2clip.convert.original import to_original
from llm2clip.convert.published import published_models
from modeling_llm2clip import LLM2CLIPModel
from tests.llm2clip.convert.checkpoints import convert

pytestmark = pytest.mark.slow
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def randomised(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.03)
    return model.eval()


@torch.no_grad()
def test_eva02_base_gives_the_outputs_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    oracle = randomised(timm.create_model("eva02_base_patch16_clip_224", num_classes=8))
    images = torch.randn(2, 3, 224, 224)
    save_file(oracle.state_dict(), tmp_path / "checkpoint.safetensors")
    convert(tmp_path / "checkpoint.safetensors", tmp_path / "out")  # whose config is found by its sizes
    features = AutoModel.from_pretrained(tmp_path / "out").eval()(images).pooler_output
    # The head of CLIP itself is dropped; stage 2 starts with a new one.
    expected = oracle.forward_head(oracle.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features, expected, **CLOSE)


@torch.no_grad()
def test_openai_base_gives_the_outputs_of_transformers(tmp_path: Path) -> None:
    config = published_models()["LLM2CLIP-Openai-B-16"].config
    oracle = randomised(CLIPVisionModelWithProjection(config.vision_config))
    ours = dict(LLM2CLIPModel(config, text_model=False).state_dict())
    ours |= {name: tensor for name, tensor in oracle.state_dict().items() if name in ours}
    torch.save({"state_dict": to_original(config, ours)}, tmp_path / "checkpoint.pt")
    convert(tmp_path / "checkpoint.pt", tmp_path / "out")
    model = LLM2CLIPModel.from_pretrained(tmp_path / "out", text_model=False).eval()
    images = torch.randn(2, 3, 224, 224)
    pooled, expected = model.vision_model(images).pooler_output, oracle.vision_model(images).pooler_output
    torch.testing.assert_close(pooled, expected, **CLOSE)
    features = model.get_image_features(images).pooler_output
    torch.testing.assert_close(features, oracle(images).image_embeds, **CLOSE)
