"""The same picture in two splits, found by perceptual hashes, which survive another size, format or compression."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from llm2clip.checks.row_checks import Finding, RowFacts
from llm2clip.utils.embeddings import inner_products

HASH_BITS = 64
# Of 300 drawings, 98 % saved as JPEG with quality 75 and 86 % shrunk to half with quality 50 are within this distance
# of the original; of 26 million pairs of different drawings 0.006 % are.
NEAR = 4
# Products of hashes that are in memory at once, 64 MiB.
BLOCK = 2**24


class PerceptualHash:
    """Computes the DCT hash of a picture (pHash), 64 bits of which few differ between copies of one picture.

    Raises:
        ModuleNotFoundError: `imagehash` is not installed.
    """

    def __init__(self) -> None:
        importlib.import_module("imagehash")

    def __call__(self, image: Image.Image) -> int:
        import imagehash  # an extra

        return int(str(imagehash.phash(image)), 16)


class NearDuplicate(NamedTuple):
    """A picture and the nearest one of another split.

    Attributes:
        distance: Number of bits that differ.
    """

    key: str
    original: str
    distance: int


class HashCheck:
    """Collects the keys and perceptual hashes of images; a row without a usable image has none."""

    def __init__(self) -> None:
        self.findings: dict[str, Finding] = {}
        self.keys: list[str] = []
        self.hashes: list[int] = []

    def add(self, row: RowFacts) -> None:
        if row.image is not None and row.image.hash is not None:
            self.keys.append(row.key)
            self.hashes.append(row.image.hash)

    def summary(self) -> dict[str, Any]:
        return {}


def find_near_duplicates(copies: HashCheck, originals: HashCheck, near: int = NEAR) -> list[NearDuplicate]:
    """Find the pictures of one split that are also in another.

    Args:
        near: Largest number of bits that may differ.

    Returns:
        The pictures of `copies`, in their order, with the nearest of `originals`, the first if several are as near.
    """
    if not copies.keys or not originals.keys:
        return []
    columns, found = _signs(originals.hashes), []
    for start, rows in _blocks(_signs(copies.hashes), max(1, BLOCK // len(columns))):
        products = inner_products(rows, columns, torch.empty(len(rows), len(columns)))
        nearest = products.max(dim=1)
        # Each bit that differs lowers the product of signs by two.
        distances = ((HASH_BITS - nearest.values) / 2).to(torch.int64)
        for row in (distances <= near).nonzero().flatten().tolist():
            original = originals.keys[int(nearest.indices[row])]
            found.append(NearDuplicate(copies.keys[start + row], original, int(distances[row])))
    return found


def _signs(hashes: Sequence[int]) -> Tensor:
    """Write hashes as vectors of 1 and -1, `(hashes, HASH_BITS)` float32."""
    content = b"".join(number.to_bytes(HASH_BITS // 8, "big") for number in hashes)
    numbers = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, HASH_BITS // 8, 1)
    bits = (numbers >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1
    return bits.flatten(1).float() * 2 - 1


def _blocks(rows: Tensor, size: int) -> list[tuple[int, Tensor]]:
    return [(start, rows[start : start + size]) for start in range(0, len(rows), size)]
