"""Exact search for the best candidates of many queries, in tiles, without an index."""

from __future__ import annotations

import torch
from torch import Tensor

from llm2clip.models.embeddings import inner_products

# With the default tile size, a tile of scores takes 16 MiB.
QUERIES_AT_ONCE = 256
DEFAULT_TILE_SIZE = 16384
# Candidates per group; only groups with a high maximum are searched further.
GROUP = 32


@torch.no_grad()
def top_k(queries: Tensor, candidates: Tensor, k: int, tile_size: int = DEFAULT_TILE_SIZE) -> tuple[Tensor, Tensor]:
    """Find the candidates with the largest inner products, exactly, without the full score matrix in memory.

    Scores are float32. Candidates with equal scores are ranked in their order.

    Args:
        queries: (q, d).
        candidates: (c, d), on the device that computes; tiles of queries are moved there.
        k: Number of candidates per query; all if there are fewer.
        tile_size: Number of candidates per tile.

    Returns:
        Scores (q, min(k, c)) float32, best first, and the candidates' rows (q, min(k, c)) int64, on the candidates'
        device.

    Raises:
        ValueError: The shapes do not match, or k or tile_size is less than 1.
    """
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"queries and candidates must be matrices of equal width, but are {tuple(queries.shape)} and "
            f"{tuple(candidates.shape)}."
        )
    if k < 1 or tile_size < 1:
        raise ValueError(f"k and tile_size must be at least 1, but are {k} and {tile_size}.")
    device = candidates.device
    k = min(k, len(candidates))
    keys = torch.empty(len(queries), k, dtype=torch.int64, device=device)
    buffer = torch.empty(QUERIES_AT_ONCE, min(tile_size, len(candidates)), device=device)
    with torch.autocast(device.type, enabled=False):
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            tile = queries[start : start + QUERIES_AT_ONCE].to(device).float()
            best = keys.new_empty(len(tile), 0)
            for first in range(0, len(candidates), tile_size):
                others = candidates[first : first + tile_size]
                scores = inner_products(tile, others, buffer[: len(tile), : len(others)])
                best = torch.cat([best, _best_keys(scores, k, first)], dim=1)
                best = best.topk(min(k, best.shape[1]), dim=1).values
            keys[start : start + QUERIES_AT_ONCE] = best
    return _scores(keys), _rows(keys)


def _best_keys(scores: Tensor, k: int, first: int) -> Tensor:
    """Return the keys of the k best scores of a tile (n, c) whose column 0 is candidate `first`."""
    groups = scores.shape[1] // GROUP
    if groups <= k:
        columns = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    else:
        # The k best lie in the k groups with the highest maxima, ties included, or in the rest after the last group.
        grouped = scores[:, : groups * GROUP].unflatten(1, (groups, GROUP)).amax(dim=2)
        numbers = torch.arange(groups, device=scores.device)
        chosen = _rows(_keys(grouped, numbers).topk(k, dim=1).values)
        columns = (chosen[:, :, None] * GROUP + torch.arange(GROUP, device=scores.device)).flatten(1)
        rest = torch.arange(groups * GROUP, scores.shape[1], device=scores.device).expand(len(scores), -1)
        columns = torch.cat([columns, rest], dim=1)
    keys = _keys(scores.gather(1, columns), columns + first)
    return keys.topk(min(k, keys.shape[1]), dim=1).values


def _keys(scores: Tensor, rows: Tensor) -> Tensor:
    """Encode score and row in one integer that sorts by score, and by row in reverse order for equal scores."""
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0 turns -0.0 into 0.0
    # The bit patterns of negative floats sort in reverse order.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) | (0xFFFFFFFF - rows)


def _rows(keys: Tensor) -> Tensor:
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _scores(keys: Tensor) -> Tensor:
    ordered = keys >> 32
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).int().view(torch.float32)
