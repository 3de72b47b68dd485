"""Rows of embeddings: inner products, fewer bits, and the NaN and infinite values that end a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llm2clip.command_line.logs import shortened

Precision = Literal["float32", "float16", "int8", "binary"]
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
    values = _int8_values(rows) if precision == "int8" else (rows > 0) * 2.0 - 1.0
    return torch.where(rows.isfinite(), F.normalize(values, dim=-1), rows)


def quantize_embeddings(embeddings: Tensor | np.ndarray, precision: Precision) -> Tensor:
    """Convert embeddings to fewer bits, for a database of yours.

    No row depends on others, and no range has to be kept, since an embedding has unit length: `int8` scales each row
    to -127 .. 127 by its largest value: compare codes by their cosine. (sentence-transformers' function of this name
    gives each of the `width` values a range of its own, so that products of its codes weigh all values alike.)
    `binary` has the sign of each value, packed as sentence-transformers packs them; compare by Hamming distance.

    Args:
        embeddings: `(n, width)`, of `encode_text` or `encode_image`.

    Returns:
        `(n, width)` of the type `precision`; of `binary`, `(n, ceil(width / 8))` int8.

    Raises:
        ValueError: There is no such precision, or a value is NaN or infinite.
    """
    rows = torch.as_tensor(embeddings).float().cpu()
    require_finite_rows(rows, lambda row: f"row {row}", "rows")
    if precision == "binary":
        return torch.from_numpy((np.packbits(rows.numpy() > 0, axis=-1) - np.uint8(128)).view(np.int8))
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}, but it has to be one of {', '.join(get_args(Precision))}.")
    return (_int8_values(rows) if precision == "int8" else rows).to(getattr(torch, precision))


def _int8_values(rows: Tensor) -> Tensor:
    """Scale each row to whole numbers of -127 to 127, as floats."""
    return (rows * (127 / rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12))).round()
