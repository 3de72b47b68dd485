"""NaN and infinite values: the error that ends a run, and what it says."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from llm2clip.utils.logs import shortened
from llm2clip.utils.processes import world_size

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


def on_any_process(flag: Tensor) -> bool:
    """Whether a flag is set on any process; all of them have to call it, and get the same answer.

    Args:
        flag: A bool of no dimension, on the device on which the process group exchanges tensors.
    """
    found = flag.to(torch.int32)
    if world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)
