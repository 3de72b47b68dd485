"""Which texts of all ranks match which images of this rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.losses.gather import exchange_counts, gather_rows
from llm2clip.losses.tiles import Positives


class GatheredBatch(NamedTuple):
    """The texts of all ranks and their matches with the images of this rank.

    Attributes:
        texts: (m, d), with gradient.
        own_columns: The rows of `texts` that belong to this rank.
        weight: Factor that turns a sum over this rank's rows into its share of the mean over all rows, times the
            number of ranks.
    """

    texts: Tensor
    own_columns: slice
    positives: Positives
    weight: float


def gather_batch(
    name: str, image_embeds: Tensor, text_embeds: Tensor, caption_ids: Tensor | None, image_caption_ids: Tensor | None
) -> GatheredBatch:
    """Validate the batch of the loss `name` and gather its texts; see [`clip_loss`] for arguments and errors."""
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape:
        raise ValueError(
            f"{name} needs image and text embeddings of the same shape (n, d), paired by row, but got "
            f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}."
        )
    num_rows = len(image_embeds)
    _check_ids(caption_ids, image_caption_ids, image_embeds, name)
    counts = exchange_counts([num_rows, int(caption_ids is not None)], image_embeds.device)
    rows_per_rank = [rows for rows, _ in counts]
    if not any(rows_per_rank):
        raise ValueError(f"{name} needs at least one pair on some rank, but there is none.")
    with torch.autocast(image_embeds.device.type, enabled=False):
        texts = gather_rows(text_embeds, rows_per_rank)
    if caption_ids is None or image_caption_ids is None:
        if any(has_ids for _, has_ids in counts):
            raise ValueError(f"Other ranks gave caption ids to {name}, but this one did not; give them on all ranks.")
        positives = single_positives(texts.offset + torch.arange(num_rows, device=image_embeds.device))
    else:
        if not all(has_ids for _, has_ids in counts):
            raise ValueError(f"This rank gave caption ids to {name}, but another did not; give them on all ranks.")
        positives = _positives_of_ids(caption_ids, gather_rows(caption_ids, rows_per_rank).rows, image_caption_ids)
    own_columns = slice(texts.offset, texts.offset + num_rows)
    return GatheredBatch(texts.rows, own_columns, positives, len(counts) / sum(rows_per_rank))


def single_positives(columns: Tensor) -> Positives:
    """Make [`Positives`] of one correct column (n,) per row."""
    return lambda start, stop: (torch.arange(stop - start, device=columns.device), columns[start:stop])


def _positives_of_ids(own_ids: Tensor, caption_ids: Tensor, image_caption_ids: Tensor) -> Positives:
    """Find the captions (m,) of images (n, K) by binary search; comparing all pairs needs the memory of a tile.

    Raises:
        ValueError: If the caption of an image (n,) is not among all of it.
    """
    sorted_ids, order = caption_ids.sort()
    wanted = image_caption_ids.sort(dim=1).values
    # A caption that an image has twice counts once. The padding of -1 matches nothing, since ids are not negative.
    wanted = wanted.masked_fill(F.pad(wanted[:, 1:] == wanted[:, :-1], (1, 0)), -1)
    first = torch.searchsorted(sorted_ids, wanted)
    counts = torch.searchsorted(sorted_ids, wanted, right=True) - first
    valid = (image_caption_ids == own_ids[:, None]).any(dim=1) & (own_ids >= 0)
    # The only time that the host waits for the device: for the number of matches up to every row.
    is_valid, *ends = torch.cat([valid.all()[None], counts.sum(dim=1).cumsum(0)]).tolist()
    if not is_valid:
        row = int((~valid).nonzero()[0])
        raise ValueError(
            f"Row {row}: caption id {int(own_ids[row])} must be >= 0 and one of its image's captions, which are "
            f"{image_caption_ids[row].tolist()}."
        )
    ends.insert(0, 0)

    def pairs(start: int, stop: int) -> tuple[Tensor, Tensor]:
        number, begin = counts[start:stop].flatten(), first[start:stop].flatten()
        index = torch.arange(len(number), device=number.device)
        index = index.repeat_interleave(number, output_size=ends[stop] - ends[start])
        within = torch.arange(len(index), device=number.device) - (number.cumsum(0) - number)[index]
        return index // wanted.shape[1], order[begin[index] + within]

    return pairs


def _check_ids(caption_ids: Tensor | None, image_caption_ids: Tensor | None, image_embeds: Tensor, name: str) -> None:
    num_rows, device = len(image_embeds), image_embeds.device
    if caption_ids is None or image_caption_ids is None:
        if caption_ids is image_caption_ids:
            return
        raise ValueError(f"{name} needs both caption_ids and image_caption_ids or neither, but got only one of them.")
    types, shape = {caption_ids.dtype, image_caption_ids.dtype}, image_caption_ids.shape
    if types != {torch.int64} or caption_ids.shape != (num_rows,) or shape[:-1] != (num_rows,) or shape[-1] == 0:
        raise ValueError(
            f"{name} needs int64 caption_ids of shape ({num_rows},) and image_caption_ids of shape ({num_rows}, K "
            f">= 1), but got {caption_ids.dtype} {tuple(caption_ids.shape)} and {image_caption_ids.dtype} "
            f"{tuple(image_caption_ids.shape)}."
        )
    if {caption_ids.device, image_caption_ids.device} != {device}:
        raise ValueError(
            f"{name} needs caption_ids and image_caption_ids on {device}, as the embeddings are, but they are on "
            f"{caption_ids.device} and {image_caption_ids.device}."
        )
