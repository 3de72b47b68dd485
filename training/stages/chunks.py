"""Towers that run over a batch in chunks, so that a large contrastive batch costs the memory of a chunk.

The loss needs all embeddings, but no more of the towers than that: chunk by chunk, the embeddings are computed
without keeping activations, and backward computes a chunk's activations again before it goes through it (GradCache,
Gao et al. 2021, arXiv 2101.06983). The gradients are those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

TOWER_CHUNK_HELP = "Rows that the towers hold activations of; they compute twice then. Unset: the whole batch at once."
LOSS_CHUNK_HELP = "Rows of the batch that the loss compares with all columns at once."

OutputT = TypeVar("OutputT")


def in_chunks(
    run: Callable[[nn.Module, dict[str, Tensor]], OutputT],
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    chunk_size: int | None,
) -> list[OutputT]:
    """Run a model over chunks of its inputs' rows.

    The activations of the last chunk alone stay in memory; those of the others are computed again when backward comes
    to them, in the same state of the random number generators and of autocast.

    Args:
        run: Calls the model that it is given with the inputs that it is given, and returns tensors (or a tuple of
            them).
        model: The model, possibly in `DistributedDataParallel`.
        inputs: Tensors of one number of rows.
        chunk_size: Rows per chunk; `None` runs all at once.

    Returns:
        What `run` returned for each chunk.
    """
    rows = len(next(iter(inputs.values())))
    # At least one chunk, which may be empty: other ranks wait for this one's gradients.
    starts = range(0, max(rows, 1), chunk_size or max(rows, 1))
    # DDP wants to know of one forward for one backward; a repeated one in the midst of backward would confuse it.
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    outputs = []
    for start in starts:
        chunk = {name: tensor[start : start + starts.step] for name, tensor in inputs.items()}
        if start == starts[-1]:
            outputs.append(run(model, chunk))
        else:
            outputs.append(checkpoint(run, inner, chunk, use_reentrant=False))
    return outputs


def check_chunk_sizes(tower_chunk_size: int | None, loss_chunk_size: int) -> None:
    """Refuse sizes that are no sizes.

    Raises:
        ValueError: One is below 1.
    """
    for name, size in (("tower_chunk_size", tower_chunk_size), ("loss_chunk_size", loss_chunk_size)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, but is {size}.")
