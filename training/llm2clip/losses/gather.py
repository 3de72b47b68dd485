"""Differentiable gathering of rows from all ranks, which may have different numbers of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llm2clip.command_line.processes import world_size


class GatheredRows(NamedTuple):
    """The rows of all ranks, in rank order.

    Attributes:
        rows: (total, ...) tensor, identical on all ranks.
        offset: Index in `rows` of this rank's first row.
    """

    rows: Tensor
    offset: int


def gather_rows(x: Tensor, rows_per_rank: list[int] | None = None) -> GatheredRows:
    """Gather the rows of all ranks; gradients flow back to the rank that each row came from.

    The gradient of a row sums over the losses of all ranks, so every rank must call `backward` if `x` needs gradients.

    Args:
        x: (rows, ...) tensor; all dimensions but the first must agree between ranks.
        rows_per_rank: Number of rows of every rank, which may differ or be 0; exchanged if None.
    """
    if rows_per_rank is None:
        rows_per_rank = [count for (count,) in exchange_counts([len(x)], x.device)]
    if len(rows_per_rank) == 1:
        return GatheredRows(x, 0)
    offset = sum(rows_per_rank[: dist.get_rank()])
    return GatheredRows(_AllGather.apply(x, rows_per_rank, offset), offset)


def exchange_counts(counts: list[int], device: torch.device) -> list[list[int]]:
    """Exchange integers with all ranks; returns those of every rank, in rank order."""
    if world_size() == 1:
        return [counts]
    return all_gather_equal(torch.tensor(counts, dtype=torch.int64, device=device)).tolist()


def all_gather_equal(x: Tensor) -> Tensor:
    """Gather tensors of the same shape from all ranks, without gradient; returns (ranks, *shape)."""
    if world_size() == 1:
        return x[None]
    gathered = x.new_empty(world_size(), *x.shape)
    dist.all_gather(list(gathered.unbind()), x.contiguous())
    return gathered


class _AllGather(torch.autograd.Function):
    """All-gather whose backward sums the gradients of all ranks.

    `torch.distributed.nn.functional.all_gather` is deprecated and requires equal sizes. Backward is an all-reduce
    instead of a reduce-scatter, because that works on every backend and with any number of rows, and embeddings are
    small compared to the model's gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows_per_rank: list[int], offset: int) -> Tensor:
        ctx.own_rows = slice(offset, offset + len(x))
        largest = max(rows_per_rank)
        padded = torch.cat([x, x.new_zeros(largest - len(x), *x.shape[1:])]) if len(x) < largest else x
        gathered = padded.new_empty(len(rows_per_rank), *padded.shape)
        blocks = gathered.unbind()  # views of one buffer: equal sizes need no concatenation
        dist.all_gather(list(blocks), padded.contiguous())
        if min(rows_per_rank) == largest:
            return gathered.flatten(0, 1)
        return torch.cat([block[:rows] for block, rows in zip(blocks, rows_per_rank, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        grad = grad_output.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.own_rows], None, None
