"""Alignment of two frozen towers in closed form: ridge canonical correlation analysis from sums over pairs.

The start of CSA (arXiv 2410.07610) and SOTAlign (arXiv 2602.23353). Nothing is trained: the only state are three
matrices, which add up over shards and processes, so that any number of pairs is one pass over their Stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llm2clip.store import Store
from llm2clip.utils.processes import process_state, sum_over_processes
from llm2clip.utils.progress import ProgressBar
from modeling_llm2clip.modeling_llm2clip_features import positive_deviation

DEFAULT_RIDGE, DEFAULT_WIDTH = 0.3, 256
# Pairs that are multiplied at once, and columns of a symmetric product.
BLOCK, TILE = 8192, 256
# Pairs that take no time worth a progress bar.
SHORT = 100_000

# Row i of one belongs to row i of the other: tensors, or Stores (a folder, or opened).
Rows = Tensor | str | Path | Store
# Reads the rows from a start to a stop.
Read = Callable[[int, int], Tensor]
# Likewise images, texts and their weights.
ReadPairs = Callable[[int, int], tuple[Tensor, Tensor, Tensor | None]]


@dataclass
class ClosedFormAlignment:
    """Two affine maps into one space, of which [`closed_form_alignment`] says how they were found.

    Attributes:
        image_mean, image_std: `(image width,)`, the standardisation of image features.
        image_map: `(image width, width)`, of standardised features.
        text_mean: `(text width,)`, of texts of unit length.
        text_map: `(text width, width)`, of texts minus their mean.
        correlations: `(width,)`, canonical correlations, in descending order.
    """

    image_mean: Tensor
    image_std: Tensor
    image_map: Tensor
    text_mean: Tensor
    text_map: Tensor
    correlations: Tensor

    def embed_images(self, images: Tensor) -> Tensor:
        """Map image features `(n, image width)` to unit rows `(n, width)`."""
        return F.normalize((images.to(self.image_map) - self.image_mean) / self.image_std @ self.image_map, dim=-1)

    def embed_texts(self, texts: Tensor) -> Tensor:
        """Map text embeddings `(n, text width)` of any length to unit rows `(n, width)`."""
        texts = F.normalize(texts.to(self.text_map), dim=-1)
        return F.normalize((texts - self.text_mean) @ self.text_map, dim=-1)

    def cut(self, width: int) -> ClosedFormAlignment:
        """Keep the `width` highest correlations."""
        cut = {"image_map": self.image_map[:, :width], "text_map": self.text_map[:, :width]}
        return ClosedFormAlignment(**{**vars(self), **cut, "correlations": self.correlations[:width]})


@dataclass
class PairSums:
    """Sums over weighted pairs of an image `x` and a text `y`, in float64; sums of parts of the data add up.

    Attributes:
        weight: `(1,)`, the sum of the weights.
        image_sum, text_sum: `(image width,)` and `(text width,)`.
        image_gram, text_gram, cross: Sums of `x x'`, `y y'` and `x y'`.
    """

    weight: Tensor
    image_sum: Tensor
    text_sum: Tensor
    image_gram: Tensor
    text_gram: Tensor
    cross: Tensor

    @classmethod
    def empty(cls, image_width: int, text_width: int) -> PairSums:
        """Begin with sums of no pairs."""
        p, q = image_width, text_width
        shapes = ((1,), (p,), (q,), (p, p), (q, q), (p, q))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    @classmethod
    def of_part(
        cls, images: Rows, texts: Rows, part: int = 0, parts: int = 1, weights: Tensor | None = None
    ) -> PairSums:
        """Sum over one of several equal parts of the rows, for an engine of your own: the sums of all parts add up.

        Args:
            images, texts, weights: See [`closed_form_alignment`].
            part, parts: Number of the part, from 0, and how many there are.

        Raises:
            ValueError: There are other numbers of images and texts, fewer than two, or no such part.
        """
        if not 0 <= part < parts:
            raise ValueError(f"part is {part} of {parts}; number the parts from 0 to {parts - 1}.")
        return _sum_part(*_open_pairs(images, texts, weights), part, parts)

    def add(self, images: Tensor, texts: Tensor, weights: Tensor | None = None) -> None:
        """Add pairs: row i of `images` `(n, image width)` belongs to row i of `texts`, with weight i."""
        # Also the products: what differences of float32 would lose differs with the parts that processes read.
        x, y = images.double(), texts.double()
        if weights is None:
            wx, wy = x, y
            self.weight += len(x)
        else:
            w = weights.double()
            wx, wy = w[:, None] * x, w[:, None] * y
            self.weight += w.sum()
        self.image_sum += wx.sum(dim=0)
        self.text_sum += wy.sum(dim=0)
        _add_symmetric(self.image_gram, wx, x)
        _add_symmetric(self.text_gram, wy, y)
        self.cross.addmm_(wx.T, y)

    def __add__(self, other: PairSums) -> PairSums:
        return PairSums(*map(torch.add, vars(self).values(), vars(other).values()))

    def over_processes(self) -> PairSums:
        """Add up the sums of all processes, in one collective operation."""
        sums = list(vars(self).values())
        flat = sum_over_processes(torch.cat([value.flatten() for value in sums]))
        parts = flat.split([value.numel() for value in sums])
        return PairSums(*(part.view_as(value) for part, value in zip(parts, sums, strict=True)))

    def solver(self) -> ClosedFormSolver:
        """Prepare the solutions for several ridges.

        Raises:
            ValueError: There are fewer than two pairs, or a value is not finite.
        """
        if self.weight.item() <= 0:
            raise ValueError("a closed form needs at least two pairs of an image and a text.")
        n = self.weight
        x, y = self.image_sum / n, self.text_sum / n
        image, text = self.image_gram / n - torch.outer(x, x), self.text_gram / n - torch.outer(y, y)
        cross = self.cross / n - torch.outer(x, y)
        if not all(bool(value.isfinite().all()) for value in (image, text, cross)):
            raise ValueError("the image features or the text embeddings have values that are not finite.")
        std = positive_deviation(x, image.diagonal().clamp(min=0).sqrt())
        image, cross = image / torch.outer(std, std), cross / std[:, None]
        return ClosedFormSolver(x, std, y, torch.linalg.eigh(image), torch.linalg.eigh(text), cross)


@dataclass
class ClosedFormSolver:
    """Covariances of pairs, decomposed once: each ridge is then one singular value decomposition."""

    image_mean: Tensor
    image_std: Tensor
    text_mean: Tensor
    image_axes: Any
    text_axes: Any
    cross: Tensor

    @property
    def max_width(self) -> int:
        """The smaller of both widths."""
        return min(self.cross.shape)

    def solve(self, ridge: float, width: int) -> ClosedFormAlignment:
        """Solve for a ridge and a width; see [`closed_form_alignment`].

        Raises:
            ValueError: The ridge is negative, or the width is not from 1 to `max_width`.
        """
        if ridge < 0:
            raise ValueError(f"ridge must be at least 0, but is {ridge}.")
        if not 1 <= width <= self.max_width:
            raise ValueError(
                f"width is {width}, but the embeddings have {self.cross.shape[0]} and {self.cross.shape[1]} "
                f"dimensions; choose 1 to {self.max_width}."
            )
        whiten_image, whiten_text = (_inverse_root(axes, ridge) for axes in (self.image_axes, self.text_axes))
        u, correlations, v = torch.linalg.svd(whiten_image @ self.cross @ whiten_text, full_matrices=False)
        roots = correlations.sqrt()
        alignment = ClosedFormAlignment(
            self.image_mean,
            self.image_std,
            whiten_image @ u * roots,
            self.text_mean,
            whiten_text @ v.T * roots,
            correlations,
        )
        return alignment.cut(width)


def _add_symmetric(total: Tensor, wx: Tensor, x: Tensor) -> None:
    """Add `wx' x`, which is symmetric: only tiles on the diagonal and above are multiplied."""
    for start in range(0, x.shape[1], TILE):
        total[start : start + TILE, start:].addmm_(wx[:, start : start + TILE].T, x[:, start:])
    total.copy_(total.triu() + total.triu(1).T)


def _inverse_root(axes: Any, ridge: float) -> Tensor:
    """Return the inverse root of a covariance plus ridge x its mean variance, 0 in directions of no variance."""
    values = axes.eigenvalues.clamp(min=0)
    values = values + ridge * values.mean()
    floor = values.max() * len(values) * torch.finfo(values.dtype).eps
    inverse = torch.where(values > floor, values.clamp(min=floor).rsqrt(), 0.0)
    return axes.eigenvectors * inverse @ axes.eigenvectors.T


def closed_form_alignment(
    images: Rows,
    texts: Rows,
    ridge: float = DEFAULT_RIDGE,
    width: int = DEFAULT_WIDTH,
    weights: Tensor | None = None,
) -> ClosedFormAlignment:
    """Align image features and text embeddings without training: ridge canonical correlation analysis.

    Features `x` are standardised, texts `y` have unit length and are centred. With the covariances `Cx`, `Cy`, `C` and
    `Cx' = Cx + ridge * mean(diag Cx) * I` (`Cy'` likewise), the singular vectors `U`, `V` of `Cx'^-1/2 C Cy'^-1/2`
    with the highest singular values `s` give the maps `Cx'^-1/2 U sqrt(s)` and `Cy'^-1/2 V sqrt(s)`.

    The rows of Stores are read once, shard by shard. Processes that a launcher started share them, and add up their
    sums in one collective operation; each gets the same result.

    Args:
        images: `(n, image width)`: a tensor, or a Store (its folder, or opened) of image features.
        texts: `(n, text width)`: a tensor or a Store; row i belongs to row i of `images`.
        ridge: Regularisation as a share of the mean variance. More with fewer pairs; 0 is plain canonical correlation.
        width: Width of the shared space.
        weights: `(n,)`, how much each pair counts; by default all the same.

    Raises:
        ValueError: There are other numbers of images and texts, too few pairs, or values that are not finite.
    """
    return sum_pairs(*_open_pairs(images, texts, weights)).solver().solve(ridge, width)


def sum_pairs(count: int, pairs: ReadPairs) -> PairSums:
    """Sum over pairs 0 to `count`, of which each process reads its share, in order."""
    state = process_state()
    return _sum_part(count, pairs, state.process_index, state.num_processes).over_processes()


def _sum_part(count: int, pairs: ReadPairs, part: int, parts: int) -> PairSums:
    if count < 2:
        raise ValueError(f"a closed form needs at least two pairs of an image and a text, not {count}.")
    images, texts, _ = pairs(0, 1)
    sums = PairSums.empty(images.shape[1], texts.shape[1])
    first, last = (count * (part + end) // parts for end in (0, 1))
    with ProgressBar("Sums over pairs", last - first, "pair", show=None if last - first > SHORT else False) as bar:
        for start in range(first, last, BLOCK):
            stop = min(start + BLOCK, last)
            sums.add(*pairs(start, stop))
            bar.update(stop - start)
    return sums


def _open_pairs(images: Rows, texts: Rows, weights: Tensor | None) -> tuple[int, ReadPairs]:
    (num_images, read_images), (num_texts, read_texts) = _reader(images), _reader(texts)
    if num_images != num_texts or (weights is not None and len(weights) != num_images):
        given = "" if weights is None else f" and {len(weights)} weights"
        raise ValueError(
            f"row i of images belongs to row i of texts, but there are {num_images} and {num_texts}{given}."
        )

    def pairs(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
        texts = F.normalize(read_texts(start, stop).float(), dim=-1)
        return read_images(start, stop), texts, None if weights is None else weights[start:stop]

    return num_images, pairs


def _reader(rows: Rows) -> tuple[int, Read]:
    if isinstance(rows, Tensor):
        return len(rows), lambda start, stop: rows[start:stop]
    store = rows if isinstance(rows, Store) else Store.open(rows, verify=False)
    return len(store), _SequentialReader(store)


class _SequentialReader:
    """Reads ranges of rows of a Store in ascending order, with one shard mapped into memory at a time."""

    def __init__(self, store: Store) -> None:
        self.shards = store.shards
        self._opened: tuple[int, Tensor] | None = None

    def __call__(self, start: int, stop: int) -> Tensor:
        return torch.cat([part.float() for part in self._parts(start, stop)])

    def _parts(self, start: int, stop: int) -> Iterator[Tensor]:
        first = 0
        for number, shard in enumerate(self.shards):
            low, high = max(start, first), min(stop, first + shard.rows)
            if low < high:
                if self._opened is None or self._opened[0] != number:
                    self._opened = number, shard.open()
                yield self._opened[1][low - first : high - first]
            first += shard.rows
