"""InfoNCE losses in one direction (stage 1) and in both directions (stage 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.losses.gather import exchange_counts, gather_rows
from llm2clip.losses.matches import gather_batch, single_positives
from llm2clip.losses.tiles import DEFAULT_TILE_SIZE, Positives, tiled_cross_entropy


def info_nce(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    positives: Callable[[int, int], Tensor] | Tensor,
    label_smoothing: float = 0.0,
    tile_size: int = DEFAULT_TILE_SIZE,
) -> Tensor:
    r"""Compute InfoNCE with any number of correct keys per query, in tiles.

    The mean over queries of the cross entropy between `softmax(scale * queries @ keys.T)` and the distribution that
    is uniform over the query's correct keys: `-1/|P(i)| sum_{p in P(i)} log softmax_p` (the "out" form of SupCon,
    Khosla et al. 2020, Eq. 2; UniCL, Yang et al. 2022). With one correct key per query, it is the InfoNCE of van den
    Oord et al. (2018).

    Memory: two tiles of `tile_size` x `keys`, the gradients, and up to 128 MiB of logits that are kept for backward
    instead of being recomputed. Computation is in float32 (float64 for float64 inputs), regardless of autocast and of
    the inputs' dtype.

    Args:
        queries: (n, d).
        keys: (m, d).
        scale: 0-d factor of the dot products (inverse temperature); may require grad.
        positives: The correct keys: either an int64 tensor (n,) with the single correct column of each query, or a
            function of `start, stop` that returns a bool mask (stop - start, m) for those queries.
        label_smoothing: Share of the target distribution that is spread evenly over all keys.
        tile_size: Number of queries per tile.

    Returns:
        0-d loss.

    Raises:
        ValueError: If a query has no correct key or shapes do not match.
    """
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1] or not len(queries) or not len(keys):
        raise ValueError(
            "info_nce needs queries (n, d) and keys (m, d) of equal width d, at least one of each, but got "
            f"{tuple(queries.shape)} and {tuple(keys.shape)}."
        )
    if isinstance(positives, Tensor):
        _check_columns(positives, len(queries), len(keys))
        pairs = single_positives(positives)
    else:
        pairs = _positives_of_mask(positives, len(keys))
    loss = tiled_cross_entropy(queries, keys, scale, pairs, label_smoothing=label_smoothing, tile_size=tile_size)
    return loss / len(queries)


def clip_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    caption_ids: Tensor | None = None,
    image_caption_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    tile_size: int = DEFAULT_TILE_SIZE,
) -> Tensor:
    """Compute symmetric InfoNCE between images and captions over the batch of all ranks (CLIP, Radford et al. 2021).

    Row i of both inputs is one image with the caption that was sampled for it. Without ids, they match only each
    other. With ids, text j matches image i if it equals any of the image's captions, whichever row it was sampled for:
    the target of an image is spread evenly over the matching texts, that of a text evenly over the matching images.

    Args:
        image_embeds: (n, d) unit vectors; n may differ between ranks and be 0 on some.
        text_embeds: (n, d) unit vectors.
        logit_scale: 0-d factor of the cosine similarities, already exponentiated.
        caption_ids: (n,) int64, the id >= 0 of each row's caption; equal texts have equal ids on all ranks.
        image_caption_ids: (n, K) int64, the ids of all captions of each row's image, padded with -1. K may differ
            between ranks.
        label_smoothing: Share of the target distribution that is spread evenly over all columns.
        tile_size: Number of rows per tile, see [`info_nce`].

    Returns:
        0-d loss of this rank. The mean over ranks is the loss of the whole batch.

    Raises:
        ValueError: If shapes do not match, only one kind of ids is given, only some ranks give ids, or a row's caption
            is not among its image's captions.
    """
    batch = gather_batch("clip_loss", image_embeds, text_embeds, caption_ids, image_caption_ids)
    loss = tiled_cross_entropy(
        image_embeds,
        batch.texts,
        logit_scale,
        batch.positives,
        both_directions=True,
        own_columns=batch.own_columns,
        label_smoothing=label_smoothing,
        tile_size=tile_size,
    )
    return loss * (batch.weight / 2)


def hard_negative_info_nce(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    scale: float = 50.0,
    tile_size: int = DEFAULT_TILE_SIZE,
) -> Tensor:
    """Compute one-directional InfoNCE with optional hard negatives, the stage-1 loss of LLM2CLIP and LLM2Vec.

    Query i is contrasted, by cosine similarity, with the positives and hard negatives of all queries on all ranks
    (supervised SimCSE, Gao et al. 2021, Eq. 5). False negatives are not detected: no two queries of a batch may have
    interchangeable positives.

    Args:
        queries: (n, d), not necessarily normalized; n may differ between ranks.
        positives: (n, d), row i for query i.
        negatives: (any number, d) hard negatives.
        scale: Inverse temperature; the paper uses 50.
        tile_size: Number of queries per tile, see [`info_nce`].

    Returns:
        0-d loss of this rank. The mean over ranks is the loss of the whole batch.

    Raises:
        ValueError: If shapes do not match.
    """
    if queries.ndim != 2 or queries.shape != positives.shape:
        raise ValueError(
            "hard_negative_info_nce needs queries and positives of the same shape (n, d), but got "
            f"{tuple(queries.shape)} and {tuple(positives.shape)}."
        )
    if negatives is not None and (negatives.ndim != 2 or negatives.shape[1] != queries.shape[1]):
        raise ValueError(
            f"hard_negative_info_nce needs negatives of shape (any, {queries.shape[1]}), as wide as the queries, "
            f"but got {tuple(negatives.shape)}."
        )
    candidates = positives if negatives is None else torch.cat([positives, negatives])
    counts = exchange_counts([len(queries), len(candidates)], queries.device)
    total = sum(size for size, _ in counts)
    if total == 0:
        raise ValueError("hard_negative_info_nce needs at least one query on some rank, but there is none.")
    # The positives come first in the block of columns of each rank; the order of the rest does not affect a softmax.
    keys = gather_rows(_unit(candidates), [size for _, size in counts])
    columns = keys.offset + torch.arange(len(queries), device=queries.device)
    loss = tiled_cross_entropy(_unit(queries), keys.rows, scale, single_positives(columns), tile_size=tile_size)
    return loss * (len(counts) / total)


def _check_columns(columns: Tensor, num_queries: int, num_keys: int) -> None:
    if columns.dtype != torch.int64 or columns.shape != (num_queries,):
        raise ValueError(
            f"positives must be an int64 tensor of shape ({num_queries},), one column per query, but is "
            f"{columns.dtype} of shape {tuple(columns.shape)}."
        )
    outside = (columns < 0) | (columns >= num_keys)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"Query row {row} has no correct key: its column is {int(columns[row])}, but there are {num_keys} keys."
        )


def _positives_of_mask(mask_of: Callable[[int, int], Tensor], num_columns: int) -> Positives:
    def pairs(start: int, stop: int) -> tuple[Tensor, Tensor]:
        mask = mask_of(start, stop)
        if mask.dtype != torch.bool or mask.shape != (stop - start, num_columns):
            raise ValueError(
                f"positives({start}, {stop}) must return a bool tensor of shape {(stop - start, num_columns)}, but "
                f"returned {mask.dtype} of shape {tuple(mask.shape)}."
            )
        has_key = mask.any(dim=1)
        if not has_key.all():
            row = start + int(has_key.logical_not().nonzero()[0])
            raise ValueError(f"Query row {row} has no correct key, so its contrastive loss is undefined.")
        rows, columns = mask.nonzero(as_tuple=True)
        return rows, columns

    return pairs


def _unit(x: Tensor) -> Tensor:
    """Normalize rows, at least in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
