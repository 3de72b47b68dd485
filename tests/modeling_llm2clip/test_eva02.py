"""The EVA02 tower's optimisations do not change its values, in any dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from modeling_llm2clip import EVA02VisionModel
from modeling_llm2clip.modeling_eva02 import apply_rotary, rotary_table
from tests.builders.tiny import vision_config


def rotated_by_matrices(states: Tensor, table: Tensor) -> Tensor:
    """Rotate one pair of channels at a time; `table` has a row per token, and optionally one table per sample."""
    batch, tokens, _, width = states.shape
    result = states.double().clone()
    table = table.double().expand(batch, tokens, width // 2, 2)
    for pair in range(width // 2):
        cos, sin = table[:, :, pair].unbind(-1)
        matrices = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
        channels = slice(2 * pair, 2 * pair + 2)
        result[..., channels] = (matrices[:, :, None] @ states[..., channels, None].double()).squeeze(-1)
    return result


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 1e-6), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_apply_rotary_rotates_adjacent_channel_pairs(dtype: str, tolerance: float, per_sample: bool) -> None:
    """The result is rounded only once, at the end."""
    states = torch.randn(2, 13, 3, 8).to(getattr(torch, dtype))
    table = rotary_table(8, (3, 4), 2)
    if per_sample:
        table = torch.stack([table, table.flip(0)])
    rotated = apply_rotary(states, table)
    assert rotated.dtype == states.dtype
    torch.testing.assert_close(rotated.double(), rotated_by_matrices(states, table), atol=tolerance, rtol=tolerance)


def test_inference_equals_the_forward_pass_with_gradients() -> None:
    model = EVA02VisionModel(vision_config()).eval()
    images = torch.randn(2, 3, 28, 28)
    with_gradients = model(images).last_hidden_state
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(images).last_hidden_state, with_gradients.detach(), atol=1e-6, rtol=1e-6)
    doubled = copy.deepcopy(model).double()
    torch.testing.assert_close(doubled(images).last_hidden_state.float(), with_gradients, atol=1e-4, rtol=1e-4)
