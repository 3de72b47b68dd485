"""Counted work agrees with the formulas of the layers."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from llm2clip.convert.published import published_models
from llm2clip.planning import costs
from modeling_llm2clip import EVA02VisionModel


def test_counted_operations_match_the_formulas() -> None:
    """EVA02-B/16: 12 layers of 4 d d + 3 d 2048 weights for 197 tokens, products of attention, patch embedding."""
    tokens, width = 197, 768
    weights = 12 * (4 * width * width + 3 * width * 2048)
    attention = 12 * 2 * tokens * tokens * width
    patches = 196 * width * 3 * 16 * 16
    config = published_models()["LLM2CLIP-EVA02-B-16"].config.vision_config
    with torch.device("meta"), torch.no_grad():
        model, pixels = EVA02VisionModel(config), torch.empty(1, 3, config.image_size, config.image_size)
        counted = costs.count_flops(lambda: model(pixels))
    assert counted == pytest.approx(2 * (tokens * weights + attention + patches), rel=0.01)


def test_attention_counts_in_forward_and_backward() -> None:
    with FakeTensorMode():
        states = [torch.empty(2, 4, 10, 8, requires_grad=True) for _ in range(3)]
        product = 2 * 2 * 4 * 10 * 10 * 8
        forward = costs.count_flops(lambda: F.scaled_dot_product_attention(*states))
        both = costs.count_flops(lambda: F.scaled_dot_product_attention(*states).sum().backward())
    assert forward == 2 * product
    # Backward computes the logits again, and four more products.
    assert both == 7 * product
