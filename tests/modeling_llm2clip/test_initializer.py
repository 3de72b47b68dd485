"""The initial values of a new projection and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from llm2clip.models.new_model import from_vision_text_pretrained
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel
from tests.builders import tiny

WIDTH = 192


def vision_config(model_type: str) -> Any:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28}
    if model_type == "eva02_vision_model":
        return tiny.vision_config(**sizes)
    return AutoConfig.for_model(model_type, **sizes, patch_size=14)


def new_model(model_type: str, **fields: Any) -> LLM2CLIPModel:
    torch.manual_seed(0)
    config = LLM2CLIPConfig(vision_config(model_type), tiny.text_config(), projection_dim=320, **fields)
    return LLM2CLIPModel(config, text_model=False)


@pytest.mark.parametrize(
    ("model_type", "std", "bias"),
    [
        ("eva02_vision_model", 0.02 * 0.001, 0),
        ("clip_vision_model", WIDTH**-0.5, 0),
        ("dinov2", (3 * WIDTH) ** -0.5, WIDTH**-0.5),
    ],
)
def test_new_projection_starts_as_in_the_original(model_type: str, std: float, bias: float) -> None:
    projection = new_model(model_type).visual_projection
    assert projection.weight.std().item() == pytest.approx(std, rel=0.03)
    assert abs(projection.weight.mean().item()) < std / 50
    assert projection.bias.abs().max().item() == pytest.approx(bias, rel=0.05)


def test_new_gated_head_and_adapter_start_as_linears_of_torch() -> None:
    model = new_model("eva02_vision_model", visual_head="gated", visual_head_expansion=2)
    for part, width, second in ((model.visual_projection, WIDTH, "g"), (model.text_adapter, tiny.HIDDEN, "fc2")):
        assert list(part.parameters())
        for name, values in part.named_parameters():
            if "norm" in name:
                assert values.unique().tolist() == [float("weight" in name)]
                continue
            bound = (2 * width if second in name.split(".") else width) ** -0.5
            assert 0.9 * bound < values.abs().max().item() <= bound, name


def test_normal_draws_all_new_weights_from_one_distribution() -> None:
    model = new_model("eva02_vision_model", initializer="normal", initializer_range=0.05)
    for module in (model.visual_projection, model.text_adapter.proj, model.text_adapter.blocks[0].fc1):
        assert module.weight.std().item() == pytest.approx(0.05, rel=0.05)
        assert not module.bias.any()


def save_clip(folder: Path, family: str, scale: float) -> Path:
    """A CLIP or SigLIP of transformers, both towers in one checkpoint."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = {**sizes, "image_size": 28, "patch_size": 14}, {**sizes, "vocab_size": 40}
    model = AutoModel.from_config(AutoConfig.for_model(family, vision_config=vision, text_config=text))
    model.logit_scale.data.fill_(scale)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "stored"), [("clip", 3.21), ("siglip", 3.21), ("clip", 0.0)])
def test_a_new_model_starts_with_the_scale_of_the_clip_checkpoint_unless_set(
    family: str, stored: float, tmp_path: Path
) -> None:
    folder = save_clip(tmp_path, family, stored)
    for asked, scale in ((None, stored), ("checkpoint", stored), (2.5, 2.5)):
        model = from_vision_text_pretrained(folder, tiny.text_model(), logit_scale_init_value=asked)
        assert model.logit_scale.item() == pytest.approx(scale)
        assert model.config.logit_scale_init_value == pytest.approx(scale)


def test_a_tower_starts_with_the_scale_in_its_config_at_14_or_is_refused(tmp_path: Path) -> None:
    """`llm2clip convert` records it there, since a bare tower has no such weight."""
    folder = tiny.save_vision(tmp_path / "vision")
    model = from_vision_text_pretrained(folder, tiny.text_model(), projection_dim=24)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    with pytest.raises(ValueError, match="vision has no logit scale"):
        from_vision_text_pretrained(folder, tiny.text_model(), logit_scale_init_value="checkpoint")
    model.vision_model.config.logit_scale_init_value = 3.5
    model.vision_model.save_pretrained(folder)
    model = from_vision_text_pretrained(folder, tiny.text_model(), projection_dim=24)
    assert model.logit_scale.item() == 3.5
