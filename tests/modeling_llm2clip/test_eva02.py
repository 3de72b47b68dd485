"""The EVA02 tower's optimisations do not change its values, in any dtype."""

from __future__ import annotations

import copy

import pytest
import torch

from modeling_llm2clip import EVA02VisionModel
from modeling_llm2clip.modeling_eva02 import apply_rotary, rotary_table
from tests.builders.tiny import vision_config


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_sample", [False, True])
def test_apply_rotary_multiplies_complex_numbers_and_rounds_once(dtype: torch.dtype, per_sample: bool) -> None:
    """test_parity.py has the original; images may have tables of their own, as with patch dropout."""
    states, table = torch.randn(2, 13, 3, 8).to(dtype), rotary_table(8, (3, 4), 2)
    if per_sample:
        table = torch.stack([table, table.flip(0)])
    rotated, tables = apply_rotary(states, table), table.expand(2, -1, -1, -1)
    for sample in range(2):
        angles = torch.view_as_complex(tables[sample].double())[:, None]
        expected = torch.view_as_complex(states[sample].double().unflatten(-1, (-1, 2))) * angles
        rounded = torch.view_as_real(expected).flatten(-2).to(dtype)
        torch.testing.assert_close(
            rotated[sample], rounded, atol=1e-6, rtol=1e-6 if dtype != torch.bfloat16 else 2**-8
        )


def test_a_table_that_was_rounded_to_bfloat16_still_rotates() -> None:
    """FSDP2 rounds what goes into a layer, in Trainers that leave it to its defaults."""
    states, table = torch.randn(2, 13, 3, 8).bfloat16(), rotary_table(8, (3, 4), 2)
    rotated = apply_rotary(states, table.bfloat16())
    torch.testing.assert_close(rotated, apply_rotary(states, table), atol=0.05, rtol=0.02)


def test_inference_equals_the_forward_pass_with_gradients() -> None:
    model = EVA02VisionModel(vision_config()).eval()
    images = torch.randn(2, 3, 28, 28)
    with_gradients = model(images).last_hidden_state
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(images).last_hidden_state, with_gradients.detach(), atol=1e-6, rtol=1e-6)
    doubled = copy.deepcopy(model).double()
    torch.testing.assert_close(doubled(images).last_hidden_state.float(), with_gradients, atol=1e-4, rtol=1e-4)
