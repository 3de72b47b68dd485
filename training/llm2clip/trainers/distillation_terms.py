"""The terms of stage 2's loss by which embeddings follow others, beside the contrastive one or in its place."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from llm2clip.losses.distillation import instance_distance, similarity_distance, structure_distance
from llm2clip.trainers.stage2_config import Stage2Config

# The terms of a loss by their names in the log, each with its weight.
Terms = dict[str, tuple[float, Tensor]]


def proclip_terms(args: Stage2Config, student: Tensor, teacher: Tensor, weight: float) -> Terms:
    """Compute the terms of ProCLIP (arXiv 2510.18795), whose code has sums over the `b` rows of a process.

    In the means here, the weights do not depend on the batch. Its sums with a factor of 1 are `b` times these terms
    with `structure_weight` `(b - 1) / 2`.

    Args:
        student, teacher: `(rows, width)` each, of unit length.
        weight: Of the instance term; that of the structure term is `structure_weight` times this.
    """
    terms: Terms = {"loss_distill_instance": (weight, instance_distance(student, teacher))}
    if factor := weight * args.structure_weight:
        terms["loss_distill_structure"] = factor, structure_distance(student, teacher)
    return terms


def relational_terms(args: Stage2Config, texts: Tensor, rows: Tensor) -> Terms:
    """Compute the term by which the similarities of texts follow those of the rows that the adapter gets.

    Args:
        texts: `(rows, width)`, of unit length.
        rows: `(rows, any width)`.
    """
    distance = similarity_distance(texts, F.normalize(rows, dim=-1))
    return {"loss_relational": (args.relational_weight, distance)}
