"""Rows of embeddings: inner products, rounding, and the NaN and infinite values that end a run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from llm2clip.command_line.logs import shortened
from modeling_llm2clip.modeling_llm2clip_utils import Precision, int8_values

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
    for part, block in zip(out.split(at_once, dim=1), columns.split(at_once), strict=True):
        torch.mm(rows, block.to(out.dtype).T, out=part)
    return out


def rounded_rows(rows: Tensor, precision: Precision) -> Tensor:
    """Return the unit rows that the forms of [`quantize_embeddings`] stand for, in float32; NaN stays.

    Their inner products are the cosines of codes, and of `binary` have the order of Hamming distances.
    """
    if precision == "float32":
        return rows
    if precision == "float16":
        return rows.half().float()
    values = int8_values(rows) if precision == "int8" else (rows > 0) * 2.0 - 1.0
    return torch.where(rows.isfinite(), F.normalize(values, dim=-1), rows)
