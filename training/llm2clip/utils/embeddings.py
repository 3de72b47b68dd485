"""Rows of embeddings: their inner products, and the NaN and infinite values that end a run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm2clip.utils.logs import shortened

# Blocks of this width are about 10 % faster on CPU than one result of thousands of columns.
CPU_COLUMNS = 512
BROKEN_MODEL = (
    "A model gives such values after a training that diverged, from damaged weights, or in a dtype that is too narrow "
    "for it: take an earlier checkpoint, or bfloat16 or float32 instead of float16."
)


class NonFiniteError(ValueError):
    """Embeddings, a loss, gradients or weights are NaN or infinite."""


def finite_rows(rows: Tensor) -> Tensor:
    """Find the rows without NaN and infinite values: `(n, ...)` to `(n,)` bool."""
    return rows.detach().isfinite().flatten(1).all(dim=1)


def require_finite_rows(rows: Tensor, name: Callable[[int], str], what: str) -> None:
    """Check embeddings.

    Args:
        rows: `(n, width)`.
        name: Name of a row in the error.
        what: What the rows are, such as "captions".

    Raises:
        NonFiniteError: A row has a value that is NaN or infinite.
    """
    broken = (~finite_rows(rows)).nonzero()[:, 0].tolist()
    if broken:
        raise NonFiniteError(
            f"the model's embeddings of {len(broken)} of {len(rows)} {what} are NaN or infinite: "
            f"{shortened([name(row) for row in broken])}. {BROKEN_MODEL}"
        )


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
