"""Cross entropies between embeddings: InfoNCE in one direction and in two."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.losses.gather import exchange_counts, gather_rows
from llm2clip.losses.matches import gather_pairs, one_each
from llm2clip.losses.tiles import DEFAULT_TILE_SIZE, Positives, tiled_cross_entropy


def info_nce(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    positives: Callable[[int, int], Tensor] | Tensor,
    label_smoothing: float = 0.0,
    tile_size: int = DEFAULT_TILE_SIZE,
) -> Tensor:
    r"""InfoNCE with any number of correct keys per query, in tiles.

    The mean over queries of the cross entropy between `softmax(scale * queries @ keys.T)` and the distribution that
    is uniform over the query's correct keys: `-1/|P(i)| sum_{p in P(i)} log softmax_p` (the "out" form of SupCon,
    Khosla et al. 2020, Eq. 2; UniCL, Yang et al. 2022). One correct key makes it InfoNCE (van den Oord et al. 2018).

    Memory is two tiles of `tile_size` x `keys`, the gradients, and at most 128 MiB for logits that backward would
    otherwise compute again. The arithmetic is float32 (float64 for float64 inputs) whatever the inputs' type and
    autocast.

    Args:
        queries: (n, d).
        keys: (m, d).
        scale: Factor of the dot products (inverse temperature), 0-d; its gradient is computed if it needs one.
        positives: Which keys are correct. Either a function that takes `start, stop` and returns the bool tensor
            (stop - start, m) for those queries, or an int64 tensor (n,) with the single correct column of each query.
        label_smoothing: Share of the target that is spread evenly over all keys.
        tile_size: Number of queries per tile.

    Returns:
        0-d loss.

    Raises:
        ValueError: A query has no correct key, or shapes do not fit.
    """
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"info_nce needs queries (n, d) and keys (m, d) of one width d, but got {tuple(queries.shape)} and "
            f"{tuple(keys.shape)}."
        )
    if len(queries) == 0 or len(keys) == 0:
        raise ValueError(f"info_nce needs at least one query and one key, but got {len(queries)} and {len(keys)}.")
    if isinstance(positives, Tensor):
        _check_columns(positives, len(queries), len(keys))
        pairs = one_each(positives)
    else:
        pairs = _pairs_of_mask(positives, len(keys))
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
    """Symmetric InfoNCE between images and their captions over the batch of all ranks (CLIP, Radford et al. 2021).

    Row i of both inputs is one image with the caption that was sampled for it. Without ids, that caption is the
    image's only correct answer and the reverse. With ids, text j is correct for image i when it is any of the image's
    captions, wherever it was sampled: an image's target is spread evenly over those texts, a text's target evenly over
    the images that own it.

    Args:
        image_embeds: (n, d) unit vectors; n may differ between ranks (and be 0 on some).
        text_embeds: (n, d) unit vectors.
        logit_scale: 0-d multiplier of the cosines, i.e. already exponentiated.
        caption_ids: (n,) int64, an id >= 0 of the text of each row's caption; equal texts have equal ids on all ranks.
        image_caption_ids: (n, K) int64, the ids of all captions of each row's image, padded with -1. K may differ
            between ranks.
        label_smoothing: Share of the target that is spread evenly over all columns.
        tile_size: Number of rows per tile, see [`info_nce`].

    Returns:
        0-d loss of this rank. Its mean over ranks is the loss of the whole batch.

    Raises:
        ValueError: Shapes do not fit, only one kind of ids is given (here or on another rank), or a row's caption
            is not among its image's captions.
    """
    batch = gather_pairs("clip_loss", image_embeds, text_embeds, caption_ids, image_caption_ids)
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
    """One-directional InfoNCE on cosines with optional hard negatives, the stage-1 loss of LLM2CLIP and LLM2Vec.

    Query i is to find positive i among the positives and hard negatives of all queries on all ranks (supervised
    SimCSE, Gao et al. 2021, Eq. 5). Nothing here tells false negatives apart: the batch must not hold two queries
    with interchangeable positives.

    Args:
        queries: (n, d); need not be normalised. n may differ between ranks.
        positives: (n, d), row i belongs to query i.
        negatives: (any number, d) hard negatives, or None.
        scale: Inverse temperature; the paper's runs use 50.
        tile_size: Number of queries per tile, see [`info_nce`].

    Returns:
        0-d loss of this rank. Its mean over ranks is the loss of the whole batch.

    Raises:
        ValueError: Shapes do not fit.
    """
    if queries.ndim != 2 or queries.shape != positives.shape:
        raise ValueError(
            "hard_negative_info_nce needs queries and positives of one shape (n, d), but got "
            f"{tuple(queries.shape)} and {tuple(positives.shape)}."
        )
    candidates = positives
    if negatives is not None:
        if negatives.ndim != 2 or negatives.shape[1] != queries.shape[1]:
            raise ValueError(
                f"hard_negative_info_nce needs negatives of shape (any, {queries.shape[1]}), the width of the "
                f"queries, but got {tuple(negatives.shape)}."
            )
        candidates = torch.cat([positives, negatives])
    counts = exchange_counts([len(queries), len(candidates)], queries.device)
    total = sum(size for size, _ in counts)
    if total == 0:
        raise ValueError("hard_negative_info_nce needs at least one query on some rank, but there is none.")
    # Each rank's positives come first in its block of columns; a softmax does not care about the order of the rest.
    keys = gather_rows(_unit(candidates), [size for _, size in counts])
    columns = keys.offset + torch.arange(len(queries), device=queries.device)
    loss = tiled_cross_entropy(_unit(queries), keys.rows, scale, one_each(columns), tile_size=tile_size)
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


def _pairs_of_mask(mask_of: Callable[[int, int], Tensor], num_columns: int) -> Positives:
    def pairs(start: int, stop: int) -> tuple[Tensor, Tensor]:
        mask = mask_of(start, stop)
        if mask.dtype != torch.bool or mask.shape != (stop - start, num_columns):
            raise ValueError(
                f"positives({start}, {stop}) must return a bool tensor of shape {(stop - start, num_columns)}, but "
                f"returned {mask.dtype} of shape {tuple(mask.shape)}."
            )
        rows, columns = mask.nonzero(as_tuple=True)
        return rows, columns

    return pairs


def _unit(x: Tensor) -> Tensor:
    """Rows scaled to unit length, at least in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
