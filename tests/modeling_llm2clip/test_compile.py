"""`torch.compile` of the models: no graph break, and equal values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modeling_llm2clip import EVA02VisionModel
from tests.builders.tiny import CAPTIONS, joint_model, processor, text_model, vision_config

PIXELS = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare(model: nn.Module, inputs: dict[str, Any], output: str, training: bool) -> None:
    """Return the values of a model and of its compiled copy, with gradients in training mode."""
    model.train(training)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found: list[list[Tensor | None]] = []
    for called in (model, compiled):
        model.zero_grad()
        with torch.set_grad_enabled(training):
            value = getattr(called(**inputs), output)
        if training:
            value.square().mean().backward()
        found.append([value.detach(), *(parameter.grad for parameter in model.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_compiled_tower_without_the_parts_of_eva02_gives_the_values_of_eager_mode() -> None:
    plain = {"rope_grid_size": None, "swiglu": False, "sub_layer_norm": False, "layer_scale_init_value": 0.1}
    compare(EVA02VisionModel(vision_config(**plain)), {"pixel_values": PIXELS}, "pooler_output", training=True)


@pytest.mark.slow
def test_compiled_tower_accepts_other_image_sizes_and_dropped_patches() -> None:
    model = EVA02VisionModel(vision_config(patch_dropout=0.5))
    compare(model, {"pixel_values": PIXELS}, "pooler_output", training=False)
    inputs = {"pixel_values": torch.randn(2, 3, 42, 35), "interpolate_pos_encoding": True}
    compare(model, inputs, "pooler_output", training=False)
    with torch.no_grad():
        tokens = torch.compile(model.train(), backend="aot_eager", fullgraph=True)(**inputs).last_hidden_state
    assert tokens.shape == (2, 1 + 15, 32)


def test_compiled_joint_model_gives_the_values_of_eager_mode() -> None:
    model = joint_model()
    model.set_text_model(text_model())
    inputs = processor()(text=CAPTIONS, return_tensors="pt", padding=True)
    compare(model, {**inputs, "pixel_values": PIXELS}, "logits_per_image", training=True)
