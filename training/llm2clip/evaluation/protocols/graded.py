"""Retrieval where judges found more right pairs than those of the captions: ECCV Caption and CxC."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llm2clip.evaluation.benchmark import BenchmarkError, Measurement
from llm2clip.evaluation.data import GradedData
from llm2clip.evaluation.metrics import ROUNDING, TILE_SIZE, retrieval_ranks
from llm2clip.evaluation.session import Session
from llm2clip.models.embeddings import inner_products

# Candidates sorted beyond the number of right ones, which a tie that ends there needs.
MARGIN = 64


@dataclass(frozen=True)
class GradedRecall:
    """CxC: recall@1, 5 and 10, where any right candidate among the first k is a hit; ties are expected values."""

    def measure(self, session: Session, data: GradedData) -> Measurement:
        """Measure both directions; only the captions and images that have a right partner are queries.

        Raises:
            BenchmarkError: There is no right pair.
        """
        return _measured(session, data, _recalls, "any right one", "recall@1")


@dataclass(frozen=True)
class GradedPrecision:
    """ECCV Caption: mAP@R, R-precision and recall@1, over the first R ranks of a query with R right candidates.

    mAP@R is the mean over the R ranks of the precision up to the rank, 0 at ranks of wrong candidates; R-precision is
    the share of right candidates among the first R. Ties are expected values over their orders.
    """

    def measure(self, session: Session, data: GradedData) -> Measurement:
        """Measure both directions.

        Raises:
            BenchmarkError: There is no right pair.
        """
        return _measured(session, data, precision_at_r, "all right ones", "map@r")


def _recalls(queries: Tensor, candidates: Tensor, matches: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    asking, local = matches[:, 0].unique(return_inverse=True)
    ranks, _, _ = retrieval_ranks(candidates, queries[asking], torch.stack([local, matches[:, 1]], dim=1))
    return ranks.recalls(), ranks.is_tied


def precision_at_r(queries: Tensor, candidates: Tensor, matches: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Compute the expected metrics of the first R ranks of each query, R being its number of right candidates.

    Args:
        queries: `(q, width)`, unit rows.
        candidates: `(c, width)`, unit rows.
        matches: `(pairs, 2)` int64, query and right candidate. Queries without one are left out.

    Returns:
        Of the queries in `matches`, ascending: `map@r`, `r_precision` and `recall@1`, `(queries,)` float64 each, and
        whether ties matter, `(queries,)` bool.
    """
    asking, local = matches[:, 0].unique(return_inverse=True)
    right = torch.zeros(len(asking), len(candidates), dtype=torch.bool)
    right[local, matches[:, 1]] = True
    rows = []
    for tile in torch.arange(len(asking)).split(TILE_SIZE):
        scores = inner_products(queries[asking[tile]], candidates, candidates.new_empty(len(tile), len(candidates)))
        rows += [_first_ranks(similar, right[row]) for row, similar in zip(tile.tolist(), scores, strict=True)]
    *values, is_tied = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4).unbind(1)
    return dict(zip(("map@r", "r_precision", "recall@1"), values, strict=True)), is_tied.bool()


def _first_ranks(scores: Tensor, right: Tensor) -> tuple[float, float, float, bool]:
    """Compute the metrics of one query.

    In a tie of n candidates with r right ones, each of its ranks has a right one with probability r/n, and then each
    of the j ranks of the tie before it has another with probability (r - 1)/(n - 1).
    """
    count = int(right.sum())
    tie, is_right = _ties(scores, right, count)
    sizes = torch.bincount(tie).double()
    rights = torch.bincount(tie[is_right], minlength=len(sizes)).double()
    ranks, tie = torch.arange(count, dtype=torch.float64), tie[:count]
    share = (rights / sizes)[tie]
    before = (rights.cumsum(0) - rights)[tie]
    within = (ranks - (sizes.cumsum(0) - sizes)[tie]) * ((rights - 1) / (sizes - 1).clamp(min=1))[tie]
    map_at_r = (share * (1 + before + within) / (ranks + 1)).mean()
    is_tied = ((share > 0) & (share < 1)).any()
    return map_at_r.item(), share.mean().item(), share[0].item(), bool(is_tied)


def _ties(scores: Tensor, right: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sort the best candidates, at least `count` and no part of a tie.

    Returns:
        `(best,)` each: the number of the tie that each belongs to, from 0, and whether it is right.
    """
    taken = min(count + MARGIN, len(scores))
    while True:
        best, positions = scores.topk(taken)
        starts = (best[:-1] - best[1:]) > ROUNDING
        tie = torch.cat([starts.new_zeros(1, dtype=torch.int64), starts.cumsum(0)])
        complete = len(scores) if taken == len(scores) else int((tie < tie[-1]).sum())
        if complete >= count:
            return tie[:complete], right[positions[:complete]]
        taken = min(2 * taken, len(scores))


def _measured(
    session: Session,
    data: GradedData,
    measure: Callable[[Tensor, Tensor, Tensor], tuple[dict[str, Tensor], Tensor]],
    hit: str,
    compared: str,
) -> Measurement:
    """Measure both directions; `measure` returns the values of queries by name, and which of them are tied."""
    assert data.matches is not None
    if not len(data.matches) or not len(data.image_matches):
        raise BenchmarkError("there is no right pair of an image and a caption.")
    images, texts = session.embed_images(data.images), session.embed_texts(data.texts)
    of_texts, tied_texts = measure(texts, images, data.matches)
    of_images, tied_images = measure(images, texts, data.image_matches)
    text_values = {f"text_to_image_{name}": values for name, values in of_texts.items()}
    owners = data.owners[data.matches[:, 0].unique()]
    return Measurement(
        protocol={"name": "graded retrieval", "positives": "judged", "hit": hit, "ties": "expected value"},
        values=text_values | {f"image_to_text_{name}": values for name, values in of_images.items()},
        compared=(f"image_to_text_{compared}", f"text_to_image_{compared}"),
        # The captions of an image are found or missed together.
        clusters=dict.fromkeys(text_values, owners),
        counts={
            **data.counts(),
            **session.count_cut(data.texts),
            "tied_text_queries": int(tied_texts.sum()),
            "tied_image_queries": int(tied_images.sum()),
        },
    )
