"""Operations of a run, and the hours and bytes that they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# Published: dense 16-bit FLOP/s of the GPU.
PEAK = {"A100": 312e12, "H100": 989e12}
# Assumed: share of the peak that encoding and training reach; scaling efficiency of several GPUs.
ENCODING_USE, TRAINING_USE, SCALING = 0.40, 0.35, 0.95
# Assumed: mean length of a caption, including the prompt.
TOKENS_PER_CAPTION = 60
# torch has no counts for the attention that it uses on a CPU; the operations are those of any other.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *args, out_shape=None, **kwargs: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *args, out_shape=None, **kwargs: sdpa_backward_flop_count(
            grad, query, key, value
        )
    ),
}
# A stored embedding has this key beside its values.
KEY_BYTES = 16


def count_flops(run: Callable[[], Any]) -> float:
    """Count the floating-point operations of a function on tensors without data."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def hours(flops: float, use: float, gpus: int, peak: float) -> float:
    """Convert floating-point operations to hours.

    Args:
        use: Share of the peak that is reached.
        peak: FLOP/s of one GPU.
    """
    return flops / (peak * use * gpus * (SCALING if gpus > 1 else 1)) / 3600


def embedding_bytes(captions: float, width: int, value_bytes: int = 2) -> float:
    """Bytes of the stored embeddings of captions."""
    return captions * (value_bytes * width + KEY_BYTES)
