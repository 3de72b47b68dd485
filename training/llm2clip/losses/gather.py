"""Gathering rows from all ranks, with gradient and also when ranks hold different numbers of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llm2clip.utils.processes import world_size


class GatheredRows(NamedTuple):
    """The rows of all ranks, in rank order.

    Attributes:
        rows: (total, ...) tensor, equal on all ranks.
        offset: Where this rank's own rows begin in `rows`.
        total: Number of rows of all ranks together.
    """

    rows: Tensor
    offset: int
    total: int


def gather_with_grad(x: Tensor) -> GatheredRows:
    """Gather the rows of all ranks; the gradient flows back to the rank that each row came from.

    Ranks may hold different numbers of rows (also none), at the price of one small exchange of the counts. A rank's
    gradient is the sum over the losses of all ranks, so every rank has to call `backward`.

    Args:
        x: (rows, ...) tensor; all dimensions but the first are the same on all ranks.
    """
    return gather_rows(x, [count for (count,) in exchange_counts([x.shape[0]], x.device)])


def gather_without_grad(x: Tensor) -> GatheredRows:
    """Gather the rows of all ranks without gradient, e.g. integer ids. See [`gather_with_grad`]."""
    return gather_with_grad(x.detach())


def exchange_counts(counts: Sequence[int], device: torch.device) -> list[list[int]]:
    """Tell all ranks this rank's counts and return those of every rank, in rank order."""
    if world_size() == 1:
        return [list(counts)]
    return all_gather_equal(torch.tensor(counts, dtype=torch.int64, device=device)).tolist()


def all_gather_equal(x: Tensor) -> Tensor:
    """Gather tensors of one shape, without gradient: (ranks, *shape)."""
    if world_size() == 1:
        return x[None]
    gathered = x.new_empty(world_size(), *x.shape)
    dist.all_gather(list(gathered.unbind()), x.contiguous())
    return gathered


def gather_rows(x: Tensor, rows_per_rank: list[int]) -> GatheredRows:
    """[`gather_with_grad`] where the number of rows of every rank is known."""
    if len(rows_per_rank) == 1:
        return GatheredRows(x, 0, len(x))
    offset = sum(rows_per_rank[: dist.get_rank()])
    return GatheredRows(_AllGather.apply(x, rows_per_rank, offset), offset, sum(rows_per_rank))


class _AllGather(torch.autograd.Function):
    """All-gather of rows whose backward sums the gradients of all ranks.

    Own code because `torch.distributed.nn.functional.all_gather` is deprecated and takes equal sizes only. Backward is
    an all-reduce rather than a reduce-scatter: that works on every backend and with any number of rows, and the
    embeddings are small next to the model's gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows_per_rank: list[int], offset: int) -> Tensor:
        ctx.own_rows = slice(offset, offset + len(x))
        largest = max(rows_per_rank)
        padded = torch.cat([x, x.new_zeros(largest - len(x), *x.shape[1:])]) if len(x) < largest else x
        gathered = padded.new_empty(len(rows_per_rank), *padded.shape)
        # Views of one buffer, so that equal sizes need no concatenation.
        blocks = gathered.unbind()
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
