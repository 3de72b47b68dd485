"""The cross entropy of a logits matrix, by rows or by rows and columns, that is walked over in tiles of rows.

Forward takes the losses and the normalisers of all rows and columns from the tiles; backward makes the tiles again and
turns each into gradients. That is 8 n m d floating point operations for loss and gradients in both directions, where
one matrix in memory takes 6 and a matrix for each direction 12. Of the first tiles, [`KEPT_LOGITS`] logits are kept
for backward, so that small matrices cost 6 too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llm2clip.losses.gather import all_gather_equal
from llm2clip.utils.inner_products import inner_products

# A tile of this many rows is smaller than the keys themselves for any width above it, however many keys there are, and
# is large enough to keep the matrix products at full speed.
DEFAULT_TILE_SIZE = 256
# 128 MiB of float32: all of a batch of 5,792.
KEPT_LOGITS = 2**25
# Up to this difference between the largest logit of all and the largest of a column, the exponentials by rows serve
# for the columns too: what underflows in them is below exp(-87 + 60) there, and exp(60) is far from overflow.
SHARED_EXPONENTIALS = 60.0

# Gives the correct columns of the rows from a first to before a last one, as pairs: (rows, counted from the first one)
# and (columns), both int64.
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
    """Sum of the cross entropies of the rows of `scale * queries @ keys.T`, of which there may be none.

    Args:
        queries: (n, d).
        keys: (m, d).
        scale: 0-d factor.
        positives: The correct keys of each query.
        both_directions: Add the cross entropies of the columns. The columns' queries are those of all ranks, and
            `keys` are the same on all ranks, so that every rank has to call this.
        own_columns: The columns whose cross entropies are added on this rank. The gradients are those of the sum over
            ranks by this rank's queries, and this rank's share of those by the keys and the scale.
        label_smoothing: Share of the target that is spread evenly.
        tile_size: Number of queries per tile.

    Returns:
        0-d sum, at least float32.

    Raises:
        ValueError: A setting is out of range, or a query has no correct key.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1), but is {label_smoothing}.")
    if tile_size < 1:
        raise ValueError(f"tile_size must be at least 1, but is {tile_size}.")
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float32, device=queries.device)
    if not torch.is_grad_enabled():
        # Inside forward a Function cannot see that nobody wants gradients; detached inputs tell it.
        queries, keys, scale = queries.detach(), keys.detach(), scale.detach()
    columns = own_columns if both_directions else None
    return _TiledCrossEntropy.apply(queries, keys, scale, positives, columns, label_smoothing, tile_size)


class Tiles:
    """The tiles of `scale * queries @ keys.T`, in buffers that all tiles share."""

    def __init__(self, queries: Tensor, keys: Tensor, scale: Tensor, tile_size: int) -> None:
        dtype = torch.float64 if torch.float64 in (queries.dtype, keys.dtype) else torch.float32
        self.queries, self.keys, self.scale = queries.to(dtype), keys.to(dtype), scale.to(dtype)
        self.tile_size = tile_size

    def buffer(self) -> Tensor:
        """Room for a tile."""
        return self.keys.new_empty(min(self.tile_size, len(self.queries)), len(self.keys))

    def bounds(self) -> Iterator[tuple[int, int]]:
        """The first row of each tile, and the row after its last."""
        for start in range(0, len(self.queries), self.tile_size):
            yield start, min(start + self.tile_size, len(self.queries))

    def logits(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """The logits of some rows."""
        if out is None:
            out = self.keys.new_empty(stop - start, len(self.keys))
        return inner_products(self.queries[start:stop] * self.scale, self.keys, out)


class Gradients:
    """What backward adds up, tile by tile.

    Args:
        tiles: The tiles.
        factor: 0-d gradient of the loss.
        needed: Whether queries, keys and scale need theirs.
    """

    def __init__(self, tiles: Tiles, factor: Tensor, needed: Sequence[bool]) -> None:
        self.tiles, self.factor = tiles, factor
        self.queries = torch.empty_like(tiles.queries) if needed[0] else None
        self.keys = torch.zeros_like(tiles.keys) if needed[1] else None
        self.scale = torch.zeros_like(tiles.scale) if needed[2] else None

    def add(self, start: int, stop: int, grad_logits: Tensor) -> None:
        """Take in a tile's gradient by its logits, without the factor."""
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

    def like(self, *inputs: Tensor) -> list[Tensor | None]:
        """The gradients in the types of the inputs."""
        found = (self.queries, self.keys, self.scale)
        return [None if grad is None else grad.to(x.dtype) for grad, x in zip(found, inputs, strict=True)]


class _Columns:
    """The cross entropies of the columns, whose rows come tile by tile and from all ranks."""

    def __init__(self, keys: Tensor) -> None:
        self.maximum = keys.new_full((len(keys),), -torch.inf)
        self.sum_of_exp, self.sum_of_logits, self.positive_logits, self.num_positives = keys.new_zeros(4, len(keys))
        self.num_rows = 0

    def add(self, logits: Tensor, row_maxima: Tensor, by_rows: Tensor) -> None:
        """Take in a tile; `by_rows` is `exp(logits - row_maxima)`, whose memory may be used."""
        tile_maximum, top = logits.amax(dim=0), row_maxima.max()
        maximum = torch.maximum(self.maximum, tile_maximum)
        if top - tile_maximum.min() < SHARED_EXPONENTIALS:
            sum_of_exp = ((row_maxima - top).exp() @ by_rows) * (top - maximum).exp()
        else:
            sum_of_exp = torch.sub(logits, maximum, out=by_rows).exp_().sum(dim=0)
        self.sum_of_exp = self.sum_of_exp * (self.maximum - maximum).exp() + sum_of_exp
        self.maximum = maximum

    def add_target(self, logits: Tensor, columns: Tensor, positive_logits: Tensor, smoothing: float) -> None:
        """Take in the part of a tile that the targets weigh."""
        self.positive_logits.index_add_(0, columns, positive_logits)
        self.num_positives.index_add_(0, columns, torch.ones_like(positive_logits))
        if smoothing:
            self.sum_of_logits += logits.sum(dim=0)
        self.num_rows += len(logits)

    def gather(self) -> None:
        """Take in the rows of the other ranks."""
        rows = self.maximum.new_full((len(self.maximum),), self.num_rows)
        sums = (self.sum_of_exp, self.sum_of_logits, self.positive_logits, self.num_positives, rows)
        maxima, *parts = all_gather_equal(torch.stack([self.maximum, *sums])).unbind(dim=1)
        self.maximum = maxima.amax(dim=0)
        # A rank without rows has no maximum, and no sum either.
        parts[0] = parts[0] * (maxima - self.maximum).exp()
        totals = [part.sum(dim=0) for part in parts]
        self.sum_of_exp, self.sum_of_logits, self.positive_logits, self.num_positives = totals[:4]
        self.num_rows = int(totals[4][0])

    def losses(self, smoothing: float) -> Tensor:
        target = (1 - smoothing) * self.positive_logits / self.num_positives
        if smoothing:
            target = target + smoothing * self.sum_of_logits / self.num_rows
        return self.sum_of_exp.log() + (self.maximum - target)


class _TiledCrossEntropy(torch.autograd.Function):
    """With logits `z`, softmax `p` and target `t`, the gradient of a row's, or a column's, loss by `z` is `p - t`."""

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
                # Near a loss of zero, the difference of two large logsumexp terms would keep few correct digits.
                row_losses[start:stop] = sum_of_exp.log() + (maximum - target)
                row_maxima[start:stop], row_sums[start:stop] = maximum, sum_of_exp
                if columns is not None:
                    columns.add(logits, maximum, exponentials)
                    columns.add_target(logits, cols, positive_logits, smoothing)
            loss = row_losses.sum()
            column_tensors: list[Tensor | None] = [None, None, None]
            if columns is not None:
                columns.gather()
                loss = loss + columns.losses(smoothing)[own_columns].sum()
                column_tensors = [columns.maximum, columns.sum_of_exp, columns.num_positives]
                ctx.num_rows = columns.num_rows
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
        shared = False
        if column_maxima is not None and len(row_maxima):
            top = row_maxima.max()
            column_factor = (top - column_maxima).exp() / column_sums
            shared = bool(top - column_maxima.min() < SHARED_EXPONENTIALS)
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
                    # Kept logits stay as they are: backward may come again.
                    if shared:
                        torch.addcmul(row_factor, (row_maximum - top).exp(), column_factor, out=room)
                        grad_logits *= room
                    else:
                        torch.sub(logits, column_maxima, out=room).exp_().div_(column_sums)
                        grad_logits.mul_(row_factor).add_(room)
                    weights = weights + num_positives[cols].reciprocal()
                    uniform += smoothing / ctx.num_rows
                grad_logits[rows, cols] -= weights * (1 - smoothing)
                if smoothing:
                    grad_logits -= uniform
                gradients.add(start, stop, grad_logits)
        return (*gradients.like(queries, keys, scale), None, None, None, None)


def _tile_target(positives: Positives, start: int, stop: int, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The correct keys of a tile's queries as (row in the tile, column, weight); a row's weights sum to 1."""
    rows, columns = positives(start, stop)
    counts = rows.bincount(minlength=stop - start)
    if (counts == 0).any():
        missing = int((counts == 0).nonzero()[0])
        raise ValueError(f"Query row {start + missing} has no correct key, so its contrastive loss is undefined.")
    return rows, columns, counts.to(logits.dtype).reciprocal()[rows]
