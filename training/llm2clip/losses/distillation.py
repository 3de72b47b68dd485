"""Losses by which a student's rows follow those of a teacher: means, so that their weights fit batches of any size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llm2clip.losses.gather import exchange_counts, gather_rows
from llm2clip.losses.tiles import DEFAULT_TILE_SIZE


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine of the rows of a student and those of its teacher, `(rows, width)` each, of unit length."""
    total, ranks = _rows_of_all(student)
    return (1 - (student * teacher).sum(dim=1)).sum() * ranks / max(total, 1)


def instance_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared Euclidean distance of the rows of a student and those of its teacher, `(rows, width)` each.

    The instance term of ProCLIP (arXiv 2510.18795), which has the sum over the rows of a process.
    """
    total, ranks = _rows_of_all(student)
    return (student - teacher).square().sum() * ranks / max(total, 1)


def structure_distance(student: Tensor, teacher: Tensor, tile_size: int = DEFAULT_TILE_SIZE) -> Tensor:
    """Mean smooth L1 difference between the Euclidean distances within the batch of a student and of its teacher.

    Over all pairs of different rows of the batch of all processes. The structure term of ProCLIP (arXiv 2510.18795),
    which has the sum over the pairs of a process.

    Args:
        student, teacher: `(rows, width)` and `(rows, any width)`.
        tile_size: Rows that are compared with all others at once.
    """

    def difference(student: Tensor, students: Tensor, teacher: Tensor, teachers: Tensor) -> Tensor:
        return F.smooth_l1_loss(torch.cdist(student, students), torch.cdist(teacher, teachers), reduction="none")

    return _mean_over_pairs(difference, student, teacher, tile_size)


def similarity_distance(student: Tensor, teacher: Tensor, tile_size: int = DEFAULT_TILE_SIZE) -> Tensor:
    """Mean squared difference between the similarities within the batch of a student and those of its teacher.

    Over all pairs of different rows of the batch of all processes (relational distillation, arXiv 1904.05068).

    Args:
        student, teacher: `(rows, width)` and `(rows, any width)`, of unit length.
        tile_size: See [`structure_distance`].
    """

    def difference(student: Tensor, students: Tensor, teacher: Tensor, teachers: Tensor) -> Tensor:
        return (student @ students.T - teacher @ teachers.T) ** 2

    return _mean_over_pairs(difference, student, teacher, tile_size)


def _mean_over_pairs(difference: Callable[..., Tensor], student: Tensor, teacher: Tensor, tile_size: int) -> Tensor:
    """Average a matrix of differences between rows and those of all processes, without each row with itself."""
    total, ranks = _rows_of_all(student)
    students, teachers = gather_rows(student), gather_rows(teacher).rows

    def tile(rows: Tensor, wanted: Tensor, start: int) -> Tensor:
        own_columns = students.offset + start + torch.arange(len(rows), device=rows.device)
        return difference(rows, students.rows, wanted, teachers).scatter(1, own_columns[:, None], 0.0).sum()

    # With an empty tile, the loss of a process without rows has a gradient too.
    starts = range(0, max(len(student), 1), tile_size)
    parts = [(student[start : start + tile_size], teacher[start : start + tile_size], start) for start in starts]
    if len(parts) == 1:
        return tile(*parts[0]) * ranks / max(total * (total - 1), 1)
    # Each tile is computed again in backward, so that no matrix of all rows is kept.
    sums = [checkpoint(tile, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(sums).sum() * ranks / max(total * (total - 1), 1)


def _rows_of_all(rows: Tensor) -> tuple[int, int]:
    """Return the rows of all processes, and the number of these."""
    counts = exchange_counts([len(rows)], rows.device)
    return sum(count for (count,) in counts), len(counts)
