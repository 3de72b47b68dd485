"""Retrieval metrics between images and captions, and between captions: recall@k and ranks, computed in tiles.

A query can have several correct candidates: an image has several captions, and a caption can belong to several images.
Its rank is that of the best one, so recall@k counts the queries with at least one correct candidate among the first k.

Candidates with equal scores have no order. Ranks and recalls are expected values over all orders of such candidates: a
model that maps everything to one point scores like guessing, and no number depends on the sorting algorithm. Cosines
that differ by less than 1e-6 are equal, because the same two vectors give different last bits at different places of a
matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llm2clip.command_line.logs import shortened
from llm2clip.models.embeddings import inner_products

# Queries per tile: the two buffers take less memory than the candidates for any width above 512, and the matrix
# products run at full speed.
TILE_SIZE = 256
KS = (1, 5, 10)
# Cosines closer than this are equal: float32 products of unit vectors are exact to some 2e-7.
ROUNDING = 1e-6


def retrieval_metrics(
    image_embeds: Tensor,
    text_embeds: Tensor,
    qrels: Tensor,
    ks: Sequence[int] = KS,
) -> dict[str, float | int]:
    """Compute retrieval metrics in both directions, as on Flickr30k and COCO.

    A text is a hit if any image that it belongs to is among the first k images; an image is a hit if any of its texts
    is among the first k texts.

    Args:
        image_embeds: (images, d), normalised or not.
        text_embeds: (texts, d).
        qrels: (p, 2) int64, pairs of a text index and an image index. Every text needs one; an image without any is
            a wrong candidate for every text, and is not a query.
        ks: Values of k. A k above the number of candidates gives a recall of 1.

    Returns:
        `recall@K` (0 to 1), `mean_rank` and `median_rank` (from 1; the mean of two middle ranks is rounded down, as in
        CLIP training code) with the prefixes `text_to_image_` (texts are the queries) and `image_to_text_`, and
        `num_texts`, `num_images` and `num_images_with_text`.

    Raises:
        ValueError: A text has no match, an index is out of range, an embedding is not finite, or the shapes do not
            match.
    """
    text_to_image, image_to_text, with_text = retrieval_ranks(image_embeds, text_embeds, qrels)
    counts = {"num_texts": len(text_embeds), "num_images": len(image_embeds), "num_images_with_text": len(with_text)}
    return {**_summary(text_to_image, ks, "text_to_image_"), **_summary(image_to_text, ks, "image_to_text_"), **counts}


def retrieval_ranks(image_embeds: Tensor, text_embeds: Tensor, qrels: Tensor) -> tuple[QueryRanks, QueryRanks, Tensor]:
    """Compute what [`retrieval_metrics`] averages: the ranks of every query, with its arguments and errors.

    Returns:
        Ranks of the texts among the images; ranks of the images among the texts, without the images that have no text;
        the rows of those images, `(queries,)`, ascending.
    """
    text_to_image, image_to_text = _ranks(text_embeds, image_embeds, qrels, ("text", "image"))
    with_text = qrels[:, 1].unique().cpu()
    return text_to_image, QueryRanks(*(column[with_text] for column in image_to_text)), with_text


def caption_retrieval_metrics(
    query_embeds: Tensor,
    target_embeds: Tensor,
    qrels: Tensor | None = None,
    ks: Sequence[int] = KS,
) -> dict[str, float | int]:
    """Compute how well a text encoder finds another caption of the same image (the "CRA" of LLM2CLIP).

    The paper uses the first two captions of each of the 5,000 COCO test images as query and target, and reports top-1.
    Its numbers changed by a factor of three between versions: only compare results of one protocol.

    Args:
        query_embeds: (q, d), normalised or not.
        target_embeds: (t, d).
        qrels: (p, 2) int64, pairs of a query index and a target index; None pairs row i with row i.
        ks: Values of k. A k above the number of targets gives a recall of 1.

    Returns:
        `recall@K` (0 to 1), `mean_rank` and `median_rank` (from 1), `num_queries` and `num_targets`.

    Raises:
        ValueError: A query has no target; otherwise as [`retrieval_metrics`].
    """
    if qrels is None:
        if len(query_embeds) != len(target_embeds):
            raise ValueError(
                f"Without qrels, query i belongs to target i, but there are {len(query_embeds)} queries and "
                f"{len(target_embeds)} targets. Give the pairs as qrels."
            )
        qrels = torch.arange(len(query_embeds))[:, None].expand(-1, 2)
    ranks, _ = _ranks(query_embeds, target_embeds, qrels, ("query", "target"))
    return {**_summary(ranks, ks), "num_queries": len(query_embeds), "num_targets": len(target_embeds)}


class QueryRanks(NamedTuple):
    """The rank of the best correct candidate of each query, as counts, (q,) int64 each.

    Attributes:
        ahead: Wrong candidates that score higher.
        tied_wrong, tied_right: Wrong and correct candidates with the same score.
    """

    ahead: Tensor
    tied_wrong: Tensor
    tied_right: Tensor

    @property
    def is_tied(self) -> Tensor:
        """Whether a wrong candidate scores the same as the best correct one, `(q,)` bool."""
        return self.tied_wrong > 0

    def expected(self) -> Tensor:
        """Expected number of wrong candidates before the first correct one."""
        return self.ahead + self.tied_wrong.double() / (self.tied_right + 1)

    def hit_probability(self, k: int) -> Tensor:
        """Probability that a correct candidate is among the first k."""
        tied = (self.tied_wrong + self.tied_right).double()
        right = self.tied_right.double()
        # A miss: no correct candidate is among the first m of the tie, in C(tied - m, right) of C(tied, right) orders.
        behind = tied - (k - self.ahead).clamp(min=0)
        possible = behind >= right
        behind = torch.where(possible, behind, right)
        log_share = _log_binomial(behind, right) - _log_binomial(tied, right)
        miss = torch.where(possible, log_share.exp(), torch.zeros_like(tied))
        return torch.where(self.tied_wrong == 0, (self.ahead < k).double(), 1 - miss)

    def recalls(self, prefix: str = "", ks: Sequence[int] = KS) -> dict[str, Tensor]:
        """Return the values of each query, (q,) float64, whose means are the recalls `PREFIXrecall@K`."""
        return {f"{prefix}recall@{k}": self.hit_probability(k) for k in ks}

    def mean_and_median(self, prefix: str = "") -> dict[str, float]:
        """Mean and median rank, from 1; the mean of two middle ranks is rounded down, as in CLIP training code."""
        expected = self.expected()
        ordered = expected.sort().values
        middle = int(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2
        return {f"{prefix}mean_rank": expected.mean().item() + 1, f"{prefix}median_rank": middle + 1}


def _log_binomial(n: Tensor, k: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _summary(ranks: QueryRanks, ks: Sequence[int], prefix: str = "") -> dict[str, float | int]:
    if min(ks, default=1) < 1:
        raise ValueError(f"recall@k needs k of at least 1, but got {min(ks)}.")
    recalls = {name: values.mean().item() for name, values in ranks.recalls(prefix, ks).items()}
    return {**recalls, **ranks.mean_and_median(prefix)}


@torch.no_grad()
def _ranks(
    queries: Tensor, candidates: Tensor, qrels: Tensor, names: tuple[str, str]
) -> tuple[QueryRanks, QueryRanks]:
    """Compute the ranks of both directions from one matrix product, tile by tile.

    Args:
        queries: (q, d), normalised or not.
        candidates: (c, d), on the device that computes; tiles of queries are moved there.
        qrels: (p, 2) int64, pairs of a query index and a correct candidate index; at least one per query, any order.
        names: What a query and a candidate are, in messages.

    Returns:
        The ranks of the queries, and those of the candidates, which are undefined for one without a match.
    """
    query_name, candidate_name = names
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"{query_name} and {candidate_name} embeddings must be matrices of one width, but are "
            f"{tuple(queries.shape)} and {tuple(candidates.shape)}."
        )
    device = candidates.device
    qrels = _checked_qrels(qrels, len(queries), len(candidates), names)
    units = candidates.float() / _norms(candidates, candidate_name)
    norms = _norms(queries, query_name)

    def unit_queries(rows: Tensor | slice) -> Tensor:
        return (queries[rows].float() / norms[rows]).to(device)

    qrels = qrels.to(device)
    parts = [
        (unit_queries(chunk[:, 0].to(queries.device)) * units[chunk[:, 1]]).sum(dim=1)
        for chunk in qrels.split(TILE_SIZE)
    ]
    correct = torch.cat(parts)
    sides = (_Side(len(queries), qrels[:, 0], correct), _Side(len(candidates), qrels[:, 1], correct))
    # For each tile, the slice of `qrels` (sorted by query) that belongs to it.
    starts = range(0, len(queries), TILE_SIZE)
    cuts = torch.tensor([*starts, len(queries)], device=device)
    bounds = torch.searchsorted(qrels[:, 0].contiguous(), cuts).tolist()
    buffers = units.new_empty(2, min(TILE_SIZE, len(queries)), len(candidates))
    with torch.autocast(device.type, enabled=False):
        for start, first, last in zip(starts, bounds, bounds[1:], strict=False):
            tile = slice(start, start + TILE_SIZE)
            scores, flags = buffers[:, : len(norms[tile])]
            inner_products(unit_queries(tile), units, scores)
            # Only wrong candidates are counted: rounding must not rank a correct candidate above itself.
            scores[qrels[first:last, 0] - start, qrels[first:last, 1]] = -torch.inf
            sides[0].count(scores, flags, tile)
            sides[1].count(scores.T, flags.T, slice(None))
    return sides[0].ranks(), sides[1].ranks()


class _Side:
    """Counts, for each row of one side, the rows of the other side that score as high as its best correct match.

    Args:
        size: Number of rows.
        rows, correct: (p,), row and score of each match.
    """

    def __init__(self, size: int, rows: Tensor, correct: Tensor) -> None:
        self.best = correct.new_full((size,), -torch.inf).scatter_reduce(0, rows, correct, "amax")
        self.tied_right = torch.bincount(rows[correct >= self.best[rows] - ROUNDING], minlength=size)
        self.ahead = torch.zeros_like(self.tied_right)
        self.not_behind = torch.zeros_like(self.tied_right)

    def count(self, scores: Tensor, flags: Tensor, rows: slice) -> None:
        """Count the wrong candidates in a tile.

        Args:
            scores: (rows, others), -inf for correct candidates.
            flags: Buffer of the same shape and dtype: comparisons and sums are fastest without a conversion.
            rows: Rows of the tile.
        """
        best = self.best[rows, None]
        self.ahead[rows] += torch.gt(scores, best + ROUNDING, out=flags).sum(dim=1).long()
        self.not_behind[rows] += torch.ge(scores, best - ROUNDING, out=flags).sum(dim=1).long()

    def ranks(self) -> QueryRanks:
        """Return the counts, on the CPU."""
        return QueryRanks(self.ahead.cpu(), (self.not_behind - self.ahead).cpu(), self.tied_right.cpu())


def _checked_qrels(qrels: Tensor, num_queries: int, num_candidates: int, names: tuple[str, str]) -> Tensor:
    """Return the distinct pairs, sorted by query."""
    if qrels.dtype != torch.int64 or qrels.ndim != 2 or qrels.shape[1] != 2:
        raise ValueError(
            f"qrels must be int64 pairs of shape (p, 2), but are {qrels.dtype} of shape {tuple(qrels.shape)}."
        )
    for name, column, count in zip(names, qrels.unbind(1), (num_queries, num_candidates), strict=True):
        outside = (column < 0) | (column >= count)
        if outside.any():
            raise ValueError(
                f"qrels name {name} {int(column[outside][0])}, but there are {count} {name} embeddings (from 0)."
            )
    if num_queries == 0:
        raise ValueError(f"There are no {names[0]} embeddings to evaluate.")
    unmatched = _rows(torch.bincount(qrels[:, 0], minlength=num_queries) == 0)
    if unmatched:
        rows = f"{shortened(unmatched)} of {num_queries}"
        raise ValueError(f"Every {names[0]} needs a correct {names[1]} in qrels; {rows} have none.")
    numbers = (qrels[:, 0] * num_candidates + qrels[:, 1]).unique()
    return torch.stack([numbers // num_candidates, numbers % num_candidates], dim=1)


def _norms(embeds: Tensor, name: str) -> Tensor:
    """Return the norms of the rows, (n, 1) float32, not zero."""
    norms = embeds.float().norm(dim=1, keepdim=True)
    broken = _rows(~norms[:, 0].isfinite())
    if broken:
        raise ValueError(f"Non-finite {name} embeddings in rows {shortened(broken)}.")
    return norms.clamp_min(torch.finfo(torch.float32).tiny)


def _rows(chosen: Tensor) -> list[str]:
    return [str(row) for row in chosen.nonzero()[:, 0].tolist()]
