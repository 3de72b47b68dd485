"""Parameter groups and schedule: equal to the original code, and right for towers that it did not have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from llm2clip.trainers.optimizer import clamp_logit_scale, parameter_groups, warmup_cosine_schedule
from modeling_llm2clip import EVA02VisionConfig, LLM2CLIPConfig, LLM2CLIPModel
from tests.golden import load_golden, optimizer_settings
from tests.original import from_original

WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
VISION = {**WIDTHS, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
LLAMA = {"model_type": "llama", "vocab_size": 10, "num_hidden_layers": 2, "num_key_value_heads": 1, **WIDTHS}


def tiny_model(vision: PretrainedConfig) -> LLM2CLIPModel:
    return LLM2CLIPModel(LLM2CLIPConfig(vision_config=vision, text_config=LLAMA, projection_dim=8))


def groups_of(model: nn.Module, **settings: Any) -> dict[str, dict[str, Any]]:
    """The group of each parameter."""
    groups = parameter_groups(model, **{"learning_rate": 1e-3, "weight_decay": 0.1, **settings})
    return {name: group for group in groups for name in group["param_names"]}


def scales(model: nn.Module, **settings: Any) -> dict[str, float]:
    return {name: group["lr_scale"] for name, group in groups_of(model, **settings).items()}


@pytest.mark.parametrize("name", ["optim_groups_a", "optim_groups_b"])
def test_groups_equal_the_original(name: str) -> None:
    golden = load_golden(name).meta
    config, _ = from_original({}, golden["config"])
    model = LLM2CLIPModel(config, text_model=False)
    args = golden["config"]["args"]
    expected: dict[str, dict[str, Any]] = {}
    for original_name, setting in golden["per_parameter"].items():
        # One of the original's fused projections becomes three of ours.
        _, converted = from_original({original_name: torch.zeros(3, 1)}, golden["config"])
        expected |= dict.fromkeys(converted, setting)

    actual = groups_of(
        model,
        **optimizer_settings(args),
        vision_weight_decay=args["visual_wd"],
        text_weight_decay=args["text_wd"],
        text_layer_decay=args["text_ld"],
    )
    assert actual.keys() == expected.keys()
    for parameter, setting in expected.items():
        group = actual[parameter]
        assert group["name"].split("/")[0] == {"visual": "vision"}.get(setting["group"], setting["group"])
        assert group["lr_scale"] == pytest.approx(setting["lr_scale"], rel=1e-12)
        assert group["lr"] == pytest.approx(setting["lr"] * setting["lr_scale"], rel=1e-12)
        assert group["weight_decay"] == setting["weight_decay"]


TOWERS: dict[str, tuple[Any, list[str], list[str]]] = {
    "eva02": (EVA02VisionConfig, ["cls_token", "pos_embed", "patch_embed.proj.weight"], ["norm.weight"]),
    "clip": (
        transformers.CLIPVisionConfig,
        ["embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"],
        ["embeddings.class_embedding", "pre_layrnorm.weight", "post_layernorm.bias"],
    ),
    "siglip": (
        transformers.SiglipVisionConfig,
        ["embeddings.patch_embedding.bias", "embeddings.position_embedding.weight"],
        ["post_layernorm.weight", "head.probe", "head.attention.in_proj_weight", "head.mlp.fc1.weight"],
    ),
    "dinov2": (
        transformers.Dinov2Config,
        ["embeddings.cls_token", "embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight"],
        ["layernorm.weight"],
    ),
    "registers": (
        transformers.Dinov2WithRegistersConfig,
        ["embeddings.register_tokens", "embeddings.mask_token"],
        ["layernorm.bias"],
    ),
    "dinov3": (transformers.DINOv3ViTConfig, ["embeddings.patch_embeddings.weight"], ["norm.weight"]),
}


@pytest.mark.parametrize("tower", TOWERS)
def test_learning_rates_decrease_towards_the_patches_in_every_tower(tower: str) -> None:
    config, first, last = TOWERS[tower]
    found = scales(tiny_model(config(**VISION)), vision_layer_decay=0.5)
    for name in first:
        assert found.pop(f"vision_model.{name}") == 0.5**4
    for name in [*(f"vision_model.{name}" for name in last), "visual_projection.weight", "logit_scale"]:
        assert found.pop(name) == 1.0
    layers: dict[int, set[float]] = {}
    for name, scale in found.items():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if name.startswith("vision_model.") and numbers:
            layers.setdefault(numbers[0], set()).add(scale)
    assert layers == {0: {0.5**3}, 1: {0.5**2}, 2: {0.5}}


def test_only_matrices_are_decayed() -> None:
    for vision in (
        EVA02VisionConfig(**VISION),
        transformers.Dinov2Config(**VISION),
        transformers.SiglipVisionConfig(**VISION),
    ):
        model = tiny_model(vision)
        decayed = {name for name, group in groups_of(model).items() if group["weight_decay"] > 0}
        matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
        assert decayed < matrices
        assert {name.rsplit(".", 1)[-1] for name in decayed} <= {"weight", "in_proj_weight"}
        tokens = ("pos_embed", "cls_token", "mask_token", "position_embedding", "probe")
        assert matrices - decayed == {name for name in matrices if any(token in name for token in tokens)}


def test_frozen_parameters_are_left_out_but_still_count_as_layers() -> None:
    model = tiny_model(transformers.Dinov2Config(**VISION))
    expected = scales(model)
    model.text_model.requires_grad_(False)
    for name, parameter in model.vision_model.named_parameters():
        parameter.requires_grad_("layer.1." in name)
    found = scales(model)
    assert not any("text_model" in name or "layer.2." in name for name in found)
    assert found == {name: expected[name] for name in found}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        groups_of(model)


def test_a_trained_llm_can_have_layer_decay() -> None:
    model = tiny_model(EVA02VisionConfig(**VISION))
    found = scales(model, text_layer_decay=0.5)
    text = {name: scale for name, scale in found.items() if name.startswith("text_model.")}
    assert {scale for name, scale in text.items() if "layers.0." in name} == {0.25}
    assert {scale for name, scale in text.items() if "layers.1." in name} == {0.5}
    assert {scale for name, scale in text.items() if "embed_tokens" in name} == {0.125}
    # The adapter's own numbered blocks come after all of the LLM's layers.
    assert {scale for name, scale in found.items() if name.startswith("text_adapter.")} == {1.0}


def test_what_cannot_be_is_refused() -> None:
    adapter = nn.ModuleDict({"text_adapter": nn.Linear(2, 2)})
    assert scales(adapter) == {"text_adapter.weight": 1.0, "text_adapter.bias": 1.0}
    stage = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)])})])})
    cases: list[tuple[nn.Module, dict[str, float], str]] = [
        (adapter, {"text_layer_decay": 0.9}, r"text_layer_decay below 1 needs numbered layers .* under 'text_model'"),
        (nn.ModuleDict({"vision_model": stage}), {}, r"'vision_model.layers.0.blocks.0.weight' is a layer in a stage"),
        (adapter, {"vision_layer_decay": 0.0}, "vision_layer_decay must be above 0"),
        (adapter, {"text_weight_decay": -0.1}, "weight decay of 'text' must not be negative"),
    ]
    for model, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            groups_of(model, **settings)


@pytest.mark.parametrize("warmup", list(load_golden("lr_schedule_a").meta["by_warmup"]))
def test_schedule_equals_the_original(warmup: str) -> None:
    golden = load_golden("lr_schedule_a").meta
    total, base = golden["config"]["total_steps"], golden["config"]["args"]["lr"]
    factors = [scale for _, scale in golden["config"]["groups"]]
    parameters = [nn.Parameter(torch.zeros(1)) for _ in factors]
    optimizer = torch.optim.SGD([{"params": [p], "lr": base * f} for p, f in zip(parameters, factors, strict=True)])
    scheduler = warmup_cosine_schedule(optimizer, int(warmup), total)
    seen = []
    for _ in range(total + 1):
        seen.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    assert golden["by_warmup"][warmup]
    for entry in golden["by_warmup"][warmup]:
        assert seen[entry["step"]] == pytest.approx(entry["lrs"], rel=1e-9, abs=1e-30)


def test_the_schedule_stays_at_zero_after_the_end_and_a_warm_up_ends_before_it() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = warmup_cosine_schedule(optimizer, 2, 6)
    rates = []
    for _ in range(9):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:2] == [0.5, 1.0]
    assert rates[6:] == [0.0, 0.0, 0.0]
    for warmup, total in [(5, 5), (-1, 5), (0, 0)]:
        with pytest.raises(ValueError, match=f"has {warmup} of {total} optimizer steps"):
            warmup_cosine_schedule(optimizer, warmup, total)


@pytest.mark.parametrize(("before", "after"), [(-0.5, 0.0), (2.5, 2.5), (9.0, math.log(100))])
def test_logit_scale_is_kept_between_one_and_a_hundred(before: float, after: float) -> None:
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.tensor(before))
    clamp_logit_scale(model)
    assert model.logit_scale.item() == pytest.approx(after)
    assert model.logit_scale.requires_grad
