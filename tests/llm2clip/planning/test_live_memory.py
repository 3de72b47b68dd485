"""The counted memory is that of the storages that live, whatever tensors view them."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from llm2clip.planning.live_memory import LiveMemory

ROWS, WIDTH, FLOAT = 6, 10, 4


def test_a_storage_counts_once_and_until_its_last_view_is_gone() -> None:
    with LiveMemory(nn.Identity()) as live:
        rows = torch.zeros(ROWS, WIDTH)
        part = rows[1:3].flatten()
        del rows
        assert live.now == ROWS * WIDTH * FLOAT
        del part
        assert live.now == 0
        assert live.peak == ROWS * WIDTH * FLOAT


def test_what_backward_needs_is_kept_and_gradients_do_not_count() -> None:
    for mode in (torch.enable_grad(), FakeTensorMode()):
        with mode:
            layers = nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, 1))
            with LiveMemory(layers) as live:
                inputs = torch.zeros(ROWS, WIDTH)
                output = layers(inputs)
                # The inputs, input and output of GELU, which the second layer and GELU keep, and the result.
                assert live.now == (ROWS * WIDTH + 2 * ROWS * 20 + ROWS) * FLOAT
                output.sum().backward()
                del output
                assert live.now == ROWS * WIDTH * FLOAT
                assert live.peak >= (ROWS * WIDTH + 2 * ROWS * 20 + ROWS) * FLOAT
                assert layers[0].weight.grad is not None
