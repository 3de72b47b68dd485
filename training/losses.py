"""Contrastive losses of both stages, for one process or many.

Every loss compares the rows of this rank with the columns of all ranks (queries stay local, keys are gathered with
gradient). A rank returns its share of the global loss times the number of ranks, so the mean over ranks of the losses
and of the gradients, which is what `DistributedDataParallel` takes, equals one process on the whole batch. That stays
exact when ranks hold different numbers of rows.

No rows x columns matrix ever exists as a whole: [`info_nce`] walks over it in tiles of rows, and since a softmax
needs nothing but its own row, loss and gradients come out of the same single walk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_training.gather import exchange_counts, gather_rows

# A tile of this many rows is smaller than the keys themselves for any width above it, however many keys there are, and
# is large enough to keep the matrix products at full speed.
DEFAULT_TILE_SIZE = 256

Positives = Callable[[int, int], Tensor] | Tensor


def info_nce(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    positives: Positives,
    label_smoothing: float = 0.0,
    tile_size: int = DEFAULT_TILE_SIZE,
) -> Tensor:
    r"""InfoNCE with any number of correct keys per query, in tiles.

    The mean over queries of the cross entropy between `softmax(scale * queries @ keys.T)` and the distribution that
    is uniform over the query's correct keys: `-1/|P(i)| sum_{p in P(i)} log softmax_p` (the "out" form of SupCon,
    Khosla et al. 2020, Eq. 2; UniCL, Yang et al. 2022). One correct key makes it InfoNCE (van den Oord et al. 2018).

    Memory is `tile_size` x `keys` plus the gradients, and the loss and all gradients take one pass over the logits.
    The arithmetic is float32 (float64 for float64 inputs) whatever the inputs' type and autocast.

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
    return _summed_info_nce(queries, keys, scale, positives, label_smoothing, tile_size) / len(queries)


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
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape:
        raise ValueError(
            "clip_loss needs image and text embeddings of one shape (n, d), row i of both being a pair, but got "
            f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}."
        )
    num_rows, width = image_embeds.shape
    num_captions = _check_ids(caption_ids, image_caption_ids, num_rows)
    counts = exchange_counts([num_rows, num_captions], image_embeds.device)
    rows_per_rank = [rows for rows, _ in counts]
    total = sum(rows_per_rank)
    if total == 0:
        raise ValueError("clip_loss needs at least one pair on some rank, but there is none.")
    if len(counts) == 1:
        all_images, all_texts, offset = image_embeds, text_embeds, 0
    else:
        # One gather for both: half the latency, and no question about the order of two backward collectives.
        with torch.autocast(image_embeds.device.type, enabled=False):
            pairs = gather_rows(torch.cat([image_embeds, text_embeds], dim=1), rows_per_rank)
        all_images, all_texts = pairs.rows.split(width, dim=1)
        offset = pairs.offset

    text_of_image: Positives
    image_of_text: Positives
    if caption_ids is None or image_caption_ids is None:
        if any(captions for _, captions in counts):
            raise ValueError("Other ranks gave caption ids to clip_loss, this one gave None; give them on all ranks.")
        text_of_image = image_of_text = offset + torch.arange(num_rows, device=image_embeds.device)
    else:
        if not all(captions for _, captions in counts):
            raise ValueError("This rank gave caption ids to clip_loss, another gave None; give them on all ranks.")
        padding = max(captions for _, captions in counts) - num_captions
        local_ids = torch.cat([caption_ids[:, None], F.pad(image_caption_ids, (0, padding), value=-1)], dim=1)
        all_ids = gather_rows(local_ids, rows_per_rank).rows

        def text_of_image(start: int, stop: int) -> Tensor:
            return _is_caption_of(all_ids[:, 0], local_ids[start:stop, None, 1:])

        def image_of_text(start: int, stop: int) -> Tensor:
            return _is_caption_of(local_ids[start:stop, None, 0], all_ids[:, 1:])

    loss = _summed_info_nce(image_embeds, all_texts, logit_scale, text_of_image, label_smoothing, tile_size)
    loss = loss + _summed_info_nce(text_embeds, all_images, logit_scale, image_of_text, label_smoothing, tile_size)
    return loss * (len(counts) / (2 * total))


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
    loss = _summed_info_nce(_unit(queries), keys.rows, scale, columns, 0.0, tile_size)
    return loss * (len(counts) / total)


def _summed_info_nce(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    positives: Positives,
    label_smoothing: float,
    tile_size: int,
) -> Tensor:
    """[`info_nce`] summed over the queries, of which there may be none."""
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1), but is {label_smoothing}.")
    if tile_size < 1:
        raise ValueError(f"tile_size must be at least 1, but is {tile_size}.")
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float32, device=queries.device)
    if not torch.is_grad_enabled():
        # Inside forward a Function cannot see that nobody wants gradients; detached inputs tell it.
        queries, keys, scale = queries.detach(), keys.detach(), scale.detach()
    return _TiledInfoNCE.apply(queries, keys, scale, positives, label_smoothing, tile_size)


class _TiledInfoNCE(torch.autograd.Function):
    """Sum over queries of the cross entropy; gradients are computed in forward, tile by tile, and scaled in backward.

    With logits `z = s q k'`, softmax `p` and target `t`, the gradient of a row's loss by `z` is `p - t`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        positives: Positives,
        label_smoothing: float,
        tile_size: int,
    ) -> Tensor:
        dtype = torch.float64 if torch.float64 in (queries.dtype, keys.dtype) else torch.float32
        q, k, s = queries.to(dtype), keys.to(dtype), scale.to(dtype)
        needs_queries, needs_keys, needs_scale = ctx.needs_input_grad[:3]
        grad_queries = torch.zeros_like(q) if needs_queries else None
        grad_keys = torch.zeros_like(k) if needs_keys else None
        grad_scale = torch.zeros_like(s) if needs_scale else None
        loss = q.new_zeros(())
        with torch.autocast(q.device.type, enabled=False):
            for start in range(0, len(q), tile_size):
                stop = min(start + tile_size, len(q))
                scaled_queries = q[start:stop] * s
                logits = scaled_queries @ k.T
                # Shifted first and summed after: near a loss of zero, the difference of two large logsumexp terms
                # would keep few correct digits.
                logits -= logits.amax(dim=1, keepdim=True)
                rows, columns, weights = _tile_target(positives, start, stop, logits)
                weights = weights * (1 - label_smoothing)
                loss -= (logits[rows, columns] * weights).sum()
                if label_smoothing:
                    loss -= label_smoothing * logits.mean(dim=1).sum()
                softmax = logits.exp_()
                normaliser = softmax.sum(dim=1, keepdim=True)
                loss += normaliser.log().sum()
                if not any(ctx.needs_input_grad):
                    continue

                grad_logits = softmax.div_(normaliser)
                grad_logits[rows, columns] -= weights
                if label_smoothing:
                    grad_logits -= label_smoothing / len(k)
                if grad_keys is not None:
                    grad_keys.addmm_(grad_logits.T, scaled_queries)
                if grad_queries is None and grad_scale is None:
                    continue
                weighted_keys = grad_logits @ k
                if grad_scale is not None:
                    grad_scale += (q[start:stop] * weighted_keys).sum()
                if grad_queries is not None:
                    torch.mul(weighted_keys, s, out=grad_queries[start:stop])
        ctx.save_for_backward(grad_queries, grad_keys, grad_scale)
        ctx.input_dtypes = (queries.dtype, keys.dtype, scale.dtype)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # The factor (1/rows, the loss scale of fp16 training) goes in before the rounding to the inputs' type.
        grads = (
            None if grad is None else (grad * grad_output).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.input_dtypes, strict=True)
        )
        return (*grads, None, None, None)


def _tile_target(positives: Positives, start: int, stop: int, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The correct keys of a tile's queries as sparse (row in the tile, column, weight); a row's weights sum to 1."""
    if isinstance(positives, Tensor):
        rows = torch.arange(stop - start, device=logits.device)
        return rows, positives[start:stop], logits.new_ones(stop - start)
    mask = positives(start, stop)
    if mask.dtype != torch.bool or mask.shape != logits.shape:
        raise ValueError(
            f"positives({start}, {stop}) must return a bool tensor of shape {tuple(logits.shape)}, but returned "
            f"{mask.dtype} of shape {tuple(mask.shape)}."
        )
    counts = mask.sum(dim=1)
    rows, columns = mask.nonzero(as_tuple=True)
    if (counts == 0).any():
        missing = int((counts == 0).nonzero()[0])
        raise ValueError(f"Query row {start + missing} has no correct key, so its contrastive loss is undefined.")
    return rows, columns, counts.to(logits.dtype).reciprocal()[rows]


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


def _check_ids(caption_ids: Tensor | None, image_caption_ids: Tensor | None, num_rows: int) -> int:
    """Check the ids of `clip_loss` and return K, 0 without ids."""
    if caption_ids is None and image_caption_ids is None:
        return 0
    if caption_ids is None or image_caption_ids is None:
        raise ValueError("clip_loss needs both caption_ids and image_caption_ids, or neither, but got only one.")
    if (
        caption_ids.dtype != torch.int64
        or image_caption_ids.dtype != torch.int64
        or caption_ids.shape != (num_rows,)
        or image_caption_ids.ndim != 2
        or image_caption_ids.shape[0] != num_rows
        or image_caption_ids.shape[1] == 0
    ):
        raise ValueError(
            f"clip_loss needs int64 caption_ids of shape ({num_rows},) and image_caption_ids of shape ({num_rows}, K "
            f">= 1), but got {caption_ids.dtype} {tuple(caption_ids.shape)} and {image_caption_ids.dtype} "
            f"{tuple(image_caption_ids.shape)}."
        )
    valid = _is_caption_of(caption_ids, image_caption_ids) & (caption_ids >= 0)
    if not valid.all():
        row = int((~valid).nonzero()[0])
        raise ValueError(
            f"Row {row}: caption id {int(caption_ids[row])} must be >= 0 and one of its image's captions, which are "
            f"{image_caption_ids[row].tolist()}."
        )
    return image_caption_ids.shape[1]


def _is_caption_of(caption_ids: Tensor, image_caption_ids: Tensor) -> Tensor:
    """Whether captions (...) are among the captions (..., K) of images, broadcast over all dimensions but K."""
    # One K at a time, for a (..., K) comparison would be K times the tile.
    matches = image_caption_ids[..., 0] == caption_ids
    for k in range(1, image_caption_ids.shape[-1]):
        matches |= image_caption_ids[..., k] == caption_ids
    return matches


def _unit(x: Tensor) -> Tensor:
    """Rows scaled to unit length, at least in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
