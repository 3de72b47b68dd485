"""Cross entropy of a logits matrix along rows, or along rows and columns, computed in tiles of rows.

Forward computes the losses and normalizers of all rows and columns; backward recomputes the tiles and turns each into
gradients. Loss and gradients in both directions take 8 n m d floating point operations, compared to 6 with one full
logits matrix in memory and 12 with one per direction. Up to [`KEPT_LOGITS`] logits of the first tiles are kept for
backward, so that small matrices take 6 as well. The host never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llm2clip.losses.gather import all_gather_equal
from llm2clip.models.embeddings import inner_products

# A tile of this many rows takes less memory than the keys if their width is larger, for any number of keys, and is
# large enough for matrix products at full speed.
DEFAULT_TILE_SIZE = 256
# 128 MiB in float32: all logits of a batch of 5,792.
KEPT_LOGITS = 2**25

# Called with `start, stop`: the correct columns of those rows, at least one each, as two int64 tensors, row (counted
# from `start`) and column of each match.
Positives = Callable[[int, int], tuple[Tensor, Tensor]]


def tiled_cross_entropy(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    positives: Positives,
    *,
    both_directions: bool = False,
    own_columns: slice = slice(None),
    label_smoothing: float = 0.0,
    tile_size: int = DEFAULT_TILE_SIZE,
) -> Tensor:
    """Sum the cross entropies of the rows of `scale * queries @ keys.T`; there may be no rows.

    Args:
        queries: (n, d).
        keys: (m, d).
        scale: 0-d.
        both_directions: Add the cross entropies of the columns over the queries of all ranks. `keys` must be the same
            on all ranks, as many as these have queries, and every rank must call this function.
        own_columns: The columns whose cross entropies are added on this rank. Gradients are those of the sum over
            ranks: in full for this rank's queries, and this rank's share for the keys and the scale.
        label_smoothing: Share of the target distribution that is spread evenly.

    Returns:
        0-d sum, at least float32.

    Raises:
        ValueError: If a setting is out of range.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), but is {label_smoothing}.")
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float32, device=queries.device)
    if not torch.is_grad_enabled():
        # ctx.needs_input_grad ignores no_grad; detached inputs make forward skip the gradients.
        queries, keys, scale = queries.detach(), keys.detach(), scale.detach()
    columns = own_columns if both_directions else None
    return _TiledCrossEntropy.apply(queries, keys, scale, positives, columns, label_smoothing, tile_size)


class Tiles:
    """Tiles of rows of `scale * queries @ keys.T`."""

    def __init__(self, queries: Tensor, keys: Tensor, scale: Tensor, tile_size: int) -> None:
        if tile_size < 1:
            raise ValueError(f"tile_size must be at least 1, but is {tile_size}.")
        dtype = torch.float64 if torch.float64 in (queries.dtype, keys.dtype) else torch.float32
        self.queries, self.keys, self.scale = queries.to(dtype), keys.to(dtype), scale.to(dtype)
        self.tile_size = tile_size

    def buffer(self) -> Tensor:
        """Allocate memory for one tile."""
        return self.keys.new_empty(min(self.tile_size, len(self.queries)), len(self.keys))

    def bounds(self) -> Iterator[tuple[int, int]]:
        """Yield the start and stop row of each tile."""
        for start in range(0, len(self.queries), self.tile_size):
            yield start, min(start + self.tile_size, len(self.queries))

    def logits(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Compute the logits of a range of rows."""
        if out is None:
            out = self.keys.new_empty(stop - start, len(self.keys))
        return inner_products(self.queries[start:stop] * self.scale, self.keys, out)


class Gradients:
    """Accumulates the gradients of queries, keys and scale tile by tile.

    Args:
        factor: 0-d upstream gradient.
        needed: Whether queries, keys and scale need gradients.
    """

    def __init__(self, tiles: Tiles, factor: Tensor, needed: Sequence[bool]) -> None:
        self.tiles, self.factor = tiles, factor
        self.queries = torch.empty_like(tiles.queries) if needed[0] else None
        self.keys = torch.zeros_like(tiles.keys) if needed[1] else None
        self.scale = torch.zeros_like(tiles.scale) if needed[2] else None

    def add(self, start: int, stop: int, grad_logits: Tensor) -> None:
        """Add the contribution of a tile, given the gradient of its logits without the factor."""
        queries = self.tiles.queries[start:stop]
        factor = self.tiles.scale * self.factor
        if self.keys is not None:
            self.keys.addmm_(grad_logits.T, queries * factor)
        if self.queries is None and self.scale is None:
            return
        weighted_keys = grad_logits @ self.tiles.keys
        if self.scale is not None:
            self.scale += (queries * weighted_keys).sum() * self.factor
        if self.queries is not None:
            torch.mul(weighted_keys, factor, out=self.queries[start:stop])


class _Columns:
    """Accumulates the cross entropies of the columns over tiles and ranks."""

    def __init__(self, keys: Tensor) -> None:
        self.maximum = keys.new_full((len(keys),), -torch.inf)
        self.sum_of_exp, self.sum_of_logits, self.positive_logits, self.num_positives = keys.new_zeros(4, len(keys))

    def add(self, logits: Tensor, columns: Tensor, positives: Tensor, smoothing: float, work: Tensor) -> None:
        """Add a tile: its logits, and the columns and logits of its matches; `work` is overwritten."""
        maximum = torch.maximum(self.maximum, logits.amax(dim=0))
        sum_of_exp = torch.sub(logits, maximum, out=work).exp_().sum(dim=0)
        self.sum_of_exp = self.sum_of_exp * (self.maximum - maximum).exp() + sum_of_exp
        self.maximum = maximum
        self.positive_logits.index_add_(0, columns, positives)
        self.num_positives.index_add_(0, columns, torch.ones_like(positives))
        if smoothing:
            self.sum_of_logits += logits.sum(dim=0)

    def gather(self) -> None:
        """Combine the sums with those of the other ranks."""
        sums = (self.sum_of_exp, self.sum_of_logits, self.positive_logits, self.num_positives)
        maxima, *parts = all_gather_equal(torch.stack([self.maximum, *sums])).unbind(dim=1)
        self.maximum = maxima.amax(dim=0)
        # A rank without rows has a maximum of -inf, which makes its factor 0.
        parts[0] = parts[0] * (maxima - self.maximum).exp()
        totals = [part.sum(dim=0) for part in parts]
        self.sum_of_exp, self.sum_of_logits, self.positive_logits, self.num_positives = totals

    def losses(self, smoothing: float) -> Tensor:
        target = (1 - smoothing) * self.positive_logits / self.num_positives
        if smoothing:
            target = target + smoothing * self.sum_of_logits / len(self.maximum)
        return self.sum_of_exp.log() + (self.maximum - target)


class _TiledCrossEntropy(torch.autograd.Function):
    """Cross entropy of softmax `p` and target `t`; the gradient with respect to the logits is `p - t`."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        positives: Positives,
        own_columns: slice | None,
        smoothing: float,
        tile_size: int,
    ) -> Tensor:
        tiles = Tiles(queries, keys, scale, tile_size)
        columns = None if own_columns is None else _Columns(tiles.keys)
        row_losses, row_maxima, row_sums = tiles.queries.new_empty(3, len(queries))
        room = KEPT_LOGITS if any(ctx.needs_input_grad) else 0
        kept = []
        buffer, work = tiles.buffer(), tiles.buffer()
        with torch.autocast(queries.device.type, enabled=False):
            for start, stop in tiles.bounds():
                size = stop - start
                keep = (stop * len(keys)) <= room
                logits = tiles.logits(start, stop, None if keep else buffer[:size])
                if keep:
                    kept.append(logits)
                rows, cols, weights = _tile_target(positives, start, stop, logits)
                positive_logits = logits[rows, cols]
                target = logits.new_zeros(size).index_add_(0, rows, positive_logits * weights) * (1 - smoothing)
                if smoothing:
                    target += smoothing * logits.mean(dim=1)
                maximum = logits.amax(dim=1)
                exponentials = torch.sub(logits, maximum[:, None], out=work[:size]).exp_()
                sum_of_exp = exponentials.sum(dim=1)
                # Subtracting logsumexp from the target logit instead would lose digits if the loss is near zero.
                row_losses[start:stop] = sum_of_exp.log() + (maximum - target)
                row_maxima[start:stop], row_sums[start:stop] = maximum, sum_of_exp
                if columns is not None:
                    columns.add(logits, cols, positive_logits, smoothing, exponentials)
            loss = row_losses.sum()
            column_tensors: list[Tensor | None] = [None, None, None]
            if columns is not None:
                columns.gather()
                loss = loss + columns.losses(smoothing)[own_columns].sum()
                column_tensors = [columns.maximum, columns.sum_of_exp, columns.num_positives]
        ctx.save_for_backward(queries, keys, scale, row_maxima, row_sums, *column_tensors, *kept)
        ctx.settings = (positives, smoothing, tile_size)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, scale, row_maxima, row_sums, column_maxima, column_sums, num_positives, *kept = (
            ctx.saved_tensors
        )
        positives, smoothing, tile_size = ctx.settings
        tiles = Tiles(queries, keys, scale, tile_size)
        gradients = Gradients(tiles, grad_output, ctx.needs_input_grad[:3])
        buffer, work = tiles.buffer(), tiles.buffer()
        with torch.autocast(grad_output.device.type, enabled=False):
            for number, (start, stop) in enumerate(tiles.bounds()):
                room, grad_logits = buffer[: stop - start], work[: stop - start]
                logits = kept[number] if number < len(kept) else tiles.logits(start, stop, room)
                rows, cols, weights = _tile_target(positives, start, stop, logits)
                row_maximum, row_factor = row_maxima[start:stop, None], row_sums[start:stop, None].reciprocal()
                torch.sub(logits, row_maximum, out=grad_logits).exp_()
                uniform = smoothing / len(tiles.keys)
                if column_maxima is None:
                    grad_logits *= row_factor
                else:
                    # Do not overwrite kept logits: backward may run again.
                    torch.sub(logits, column_maxima, out=room).exp_().div_(column_sums)
                    grad_logits.mul_(row_factor).add_(room)
                    weights = weights + num_positives[cols].reciprocal()
                    uniform += smoothing / len(tiles.keys)
                grad_logits[rows, cols] -= weights * (1 - smoothing)
                if smoothing:
                    grad_logits -= uniform
                gradients.add(start, stop, grad_logits)
        grads = zip((gradients.queries, gradients.keys, gradients.scale), (queries, keys, scale), strict=True)
        return (*(None if grad is None else grad.to(x.dtype) for grad, x in grads), None, None, None, None)


def _tile_target(positives: Positives, start: int, stop: int, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return row in the tile, column and weight of each match; the weights of a row sum to 1."""
    rows, columns = positives(start, stop)
    # Not `bincount`, for which the host would wait.
    counts = logits.new_zeros(stop - start).index_add_(0, rows, logits.new_ones(len(rows)))
    return rows, columns, counts.reciprocal()[rows]
