"""The loss by which a student's rows follow those of a teacher."""

from __future__ import annotations

from torch import Tensor

from llm2clip.losses.gather import exchange_counts


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine of the rows of a student and those of its teacher, `(rows, width)` each, of unit length.

    The mean over the processes is that over the rows of all of them.
    """
    counts = exchange_counts([len(student)], student.device)
    total = sum(count for (count,) in counts)
    return (1 - (student * teacher).sum(dim=1)).sum() * len(counts) / max(total, 1)
