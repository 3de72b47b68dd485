"""Heat maps compare captions with what the model makes of single patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llm2clip.evaluation.heat_map import patch_similarity
from tests.builders import tiny


@pytest.mark.parametrize("model_type", ["eva02", "clip_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize("fields", [{}, tiny.FROZEN_TOWER], ids=["default", "frozen tower"])
def test_similarity_is_that_of_the_projected_patches(model_type: str, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    vision = None if model_type == "eva02" else tiny.other_vision_config(model_type)
    model = tiny.with_statistics(tiny.joint_model(vision=vision, **fields))
    pixels, texts = torch.randn(2, 3, 28, 28), F.normalize(torch.randn(2, 24), dim=-1)
    with torch.no_grad():
        output = model.vision_model(pixel_values=pixels)
        patches = output.last_hidden_state[:, 1:]
        if model_type == "clip_vision_model":
            tower = model.vision_model
            patches = getattr(tower, "vision_model", tower).post_layernorm(patches)
        if model_type == "siglip_vision_model":
            patches = output.last_hidden_state
            if not fields:  # the pooled token comes from attention, which has a single patch to attend to
                head = getattr(model.vision_model, "vision_model", model.vision_model).head
                patches = torch.stack([head(patches[:, patch, None]) for patch in range(16)], dim=1)
        if fields:
            patches = torch.cat([output.pooler_output[:, None].expand_as(patches), patches], dim=-1)
            assert model.visual_standardization is not None
            patches = model.visual_standardization(patches)
        expected = F.normalize(model.visual_projection(patches), dim=-1) @ texts[:, :, None]
    found = patch_similarity(model, pixels, texts)
    torch.testing.assert_close(found, expected.view(2, 4, 4))
