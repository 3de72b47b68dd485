"""Embedding an evaluation set on several processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm2clip.losses.gather import gather_rows


def encode_sharded(num_rows: int, encode: Callable[[range], Tensor], device: torch.device) -> Tensor:
    """Embed rows 0 to `num_rows - 1`, a part on each process, and gather all of them on every process.

    Args:
        encode: Maps a range of rows to their embeddings, `(len(range), width)`.
        device: Device on which the process group exchanges tensors.

    Returns:
        `(num_rows, width)` on the CPU.
    """
    if not torch.distributed.is_initialized():
        return encode(range(num_rows)).cpu()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    bounds = [num_rows * part // world_size for part in range(world_size + 1)]
    return gather_rows(encode(range(bounds[rank], bounds[rank + 1])).detach().to(device)).rows.cpu()
