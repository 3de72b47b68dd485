"""Every source layout at the size of a published model, compared with EVA02 of timm and CLIP of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

from llm2clip import cli
from llm2clip.convert.layouts import TIMM_EVA02
from llm2clip.convert.original import to_original
from llm2clip.convert.published import published_models
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPVisionModelWithProjection
from modeling_llm2clip.modeling_llm2clip_heads import LLM2CLIPTextAdapter
from tests.llm2clip.convert import checkpoints

pytestmark = pytest.mark.slow
SCALE = torch.tensor(4.6)
# test_convert.py reads every layout in small.
SAME_IN_SMALL = [pytest.param(name, marks=pytest.mark.nightly) for name in ("older biases", "deepspeed", "eva-clip")]


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


@pytest.mark.parametrize("layout", ["original", "microsoft", "timm", *SAME_IN_SMALL])
def test_eva02_base_gives_the_outputs_of_timm(layout: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    oracle = timm.create_model("eva02_base_patch16_clip_224", num_classes=1280).eval()
    randomise(oracle)
    ours, source, options = eva02(oracle), tmp_path / "checkpoint.pt", []
    original = to_original(published("LLM2CLIP-EVA02-B-16"), ours)
    if layout == "timm":
        source = tmp_path / "checkpoint.safetensors"
        save_file(oracle.state_dict(), source)
    elif layout == "microsoft":
        source = tmp_path / "checkpoint.safetensors"
        save_file(checkpoints.microsoft_eva_names(ours), source)
    elif layout == "eva-clip":
        torch.save(checkpoints.with_text_tower(checkpoints.older_bias_names(original)), source)
        options = ["--text-model", checkpoints.llm_folder(tmp_path / "llm", 16)]
    elif layout == "older biases":
        torch.save({"state_dict": checkpoints.older_bias_names(original)}, source)
    elif layout == "deepspeed":
        torch.save({"module": original, "global_steps": 7, "optimizer": None}, source)
    else:
        torch.save(original, source)
    assert cli.main(["convert", str(source), str(tmp_path / "out"), *options]) == 0
    images = torch.randn(2, 3, 224, 224)
    loader: Any = {"timm": AutoModel, "microsoft": LLM2CLIPVisionModelWithProjection}.get(layout, LLM2CLIPModel)
    model = loader.from_pretrained(tmp_path / "out", **({"text_model": False} if loader is LLM2CLIPModel else {}))
    with torch.no_grad():
        if layout in ("timm", "eva-clip"):
            # The head of CLIP itself is dropped; stage 2 starts with a new one.
            tower = model.eval() if layout == "timm" else model.vision_model.eval()
            compare(tower(images).pooler_output, oracle.forward_head(oracle.forward_features(images), pre_logits=True))
        else:
            compare(model.eval().get_image_features(images).pooler_output, oracle(images))
    if loader is LLM2CLIPModel:
        assert model.logit_scale.equal(SCALE)


def test_float16_weights_are_not_rounded(tmp_path: Path) -> None:
    """The weights in the folder equal those of the float16 checkpoint exactly."""
    ours = LLM2CLIPModel(published("LLM2CLIP-EVA02-B-16"), text_model=False).half().state_dict()
    original = to_original(published("LLM2CLIP-EVA02-B-16"), {**ours, "logit_scale": SCALE})
    torch.save({"module": original, "global_steps": 7}, tmp_path / "checkpoint.pt")
    assert cli.main(["convert", str(tmp_path / "checkpoint.pt"), str(tmp_path / "out")]) == 0
    loaded = LLM2CLIPModel.from_pretrained(tmp_path / "out", text_model=False).state_dict()
    assert all(loaded[name].equal(tensor) for name, tensor in ours.items() if name != "logit_scale")


@pytest.mark.parametrize(
    "layout",
    ["original", "openai", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("microsoft", "transformers"))],
)
def test_openai_base_gives_the_outputs_of_transformers(layout: str, tmp_path: Path) -> None:
    config = published("LLM2CLIP-Openai-B-16")
    oracle: Any = CLIPVisionModelWithProjection(config.vision_config).eval()
    if layout == "transformers":
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        oracle = CLIPModel(CLIPConfig(vision_config=config.vision_config.to_dict(), text_config=text)).eval()
    randomise(oracle)
    ours = dict(LLM2CLIPModel(config, text_model=False).state_dict())
    ours |= {name: tensor for name, tensor in oracle.state_dict().items() if name in ours}
    source, options = tmp_path / "in", ["--text-model", checkpoints.llm_folder(tmp_path / "llm", 16)]
    source.mkdir()
    if layout == "transformers":
        oracle.save_pretrained(source)
    elif layout == "microsoft":
        options = []
        checkpoints.write_microsoft_openai(source, ours, config.vision_config.to_dict())
    elif layout == "openai":
        original = to_original(config, ours)
        plain = {name: tensor for name, tensor in original.items() if not name.startswith("text.")}
        plain["visual.proj"] = torch.randn(768, 512)
        plain |= {"token_embedding.weight": torch.ones(5, 4), "positional_embedding": torch.ones(7, 4)}
        torch.save(plain, source / "checkpoint.pt")
    else:
        options = []
        torch.save({"state_dict": to_original(config, ours)}, source / "checkpoint.pt")
    assert cli.main(["convert", str(source), str(tmp_path / "out"), *options]) == 0
    model = LLM2CLIPModel.from_pretrained(tmp_path / "out", text_model=False).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        tower = oracle.vision_model(images).pooler_output
        compare(model.vision_model(images).pooler_output, tower)
        if not options:
            compare(model.get_image_features(images).pooler_output, oracle(images).image_embeds)
