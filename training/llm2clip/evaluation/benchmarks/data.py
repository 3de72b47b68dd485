"""What the readers of benchmarks return: images with captions, labels, or choices between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.encoders.batches import ImageList
from llm2clip.evaluation.benchmarks.base import BenchmarkError
from llm2clip.utils.logs import shortened


class BenchmarkImages(ImageList):
    """The images of a benchmark: paths of files, or encoded bytes, decoded on demand."""

    def require_files(self, title: str) -> BenchmarkImages:
        """Return self if all files exist.

        Raises:
            BenchmarkError: Files are missing; the message names them.
        """
        missing = [str(image) for image in self.images if isinstance(image, Path) and not image.is_file()]
        if missing:
            raise BenchmarkError(f"{title} lacks {len(missing):,} of {len(self):,} images: {shortened(missing)}.")
        return self


@dataclass
class RetrievalData:
    """Images and captions for retrieval in both directions.

    Attributes:
        images: The gallery.
        texts: Every caption row is a query of its own: repeats and empty ones stay.
        owners: `(texts,)` int64, the image that each text belongs to, which alone is right.
        matches: `(pairs, 2)` int64, text and image of all that is right, where human judges found more than the
            owners (ECCV Caption, CxC); None otherwise.
    """

    images: BenchmarkImages
    texts: list[str]
    owners: Tensor
    matches: Tensor | None = None

    @classmethod
    def from_captions(cls, images: BenchmarkImages, captions: Sequence[Sequence[str]]) -> RetrievalData:
        """Take the captions of each image, in their order."""
        owners = [image for image, texts in enumerate(captions) for _ in texts]
        texts = [text for texts in captions for text in texts]
        return cls(images, texts, torch.tensor(owners, dtype=torch.int64))

    def counts(self) -> dict[str, int]:
        """Numbers of images and texts."""
        return {"images": len(self.images), "texts": len(self.texts)}


@dataclass
class ClassificationData:
    """Labelled images.

    Attributes:
        labels: `(images,)` int64, a class of each image.
        classnames: Name of each class, as it stands in a prompt.
        templates: Prompts with `{c}` for the name, unless the user chooses others.
        train: Images for a linear probe, with the same classes.
        validation: Images by which a probe chooses its strength of regularisation, if the set has such a part.
        mean_per_class: Whether the accuracy that is compared is the mean of the classes.
    """

    images: BenchmarkImages
    labels: Tensor
    classnames: list[str]
    templates: list[str] = field(default_factory=lambda: ["a photo of a {c}."])
    train: ClassificationData | None = None
    validation: ClassificationData | None = None
    mean_per_class: bool = False

    def counts(self) -> dict[str, int]:
        """Numbers of images and of classes that have some."""
        return {"images": len(self.images), "classes": len(self.labels.unique())}


@dataclass
class CaptionPairData:
    """Two captions of each of some images, without the images.

    Attributes:
        queries, targets: A caption of each image, and another one, in the same order.
    """

    queries: list[str]
    targets: list[str]

    def counts(self) -> dict[str, int]:
        """Number of pairs."""
        return {"pairs": len(self.queries)}


@dataclass
class PairData:
    """Pairs of images, each with two captions: of each pair, caption 0 is of image 0 and caption 1 of image 1.

    Attributes:
        images: The two images of each pair, one pair after another.
        texts: Their captions, in the same order.
        kinds: The part that each pair belongs to, such as a visual pattern.
    """

    images: BenchmarkImages
    texts: list[str]
    kinds: list[str]

    def counts(self) -> dict[str, int]:
        """Numbers of pairs and kinds."""
        return {"pairs": len(self.kinds), "kinds": len(set(self.kinds))}


@dataclass
class HardNegativeData:
    """Images with a right caption and a wrong one that differs little.

    Attributes:
        images: Each image once.
        owners: `(choices,)` int64, the image of each choice.
        right, wrong: The two captions of each choice.
        kinds: The part that each choice belongs to, such as `swap_obj`.
    """

    images: BenchmarkImages
    owners: Tensor
    right: list[str]
    wrong: list[str]
    kinds: list[str]

    def counts(self) -> dict[str, int]:
        """Number of choices of each kind."""
        return dict(Counter(self.kinds))


@dataclass
class GradedData(RetrievalData):
    """Images and captions with all pairs that human judges found right; only some are queries.

    Attributes:
        matches: `(pairs, 2)` int64, text and image, of the texts that are queries.
        image_matches: `(pairs, 2)` int64, image and text, of the images that are queries. Judges saw other candidates
            in the two directions, so that these need not be the same pairs.
        outside: Judged right pairs whose image or caption is not in the gallery, in words.
    """

    image_matches: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.int64))
    outside: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Numbers of images and texts, of queries of both kinds, of what is right for them, and of pairs outside."""
        assert self.matches is not None
        return super().counts() | {
            "text_queries": len(self.matches[:, 0].unique()),
            "image_queries": len(self.image_matches[:, 0].unique()),
            "right_images": len(self.matches),
            "right_texts": len(self.image_matches),
            "outside": len(self.outside),
        }


def counts_of(data: Any) -> dict[str, int]:
    """Return the counts of what a reader returned: its `counts()`, or those of a mapping from languages to data.

    Of a mapping: `languages`, the `texts` of all, and the `images` of the language that has most of them.
    """
    if not isinstance(data, Mapping):
        return data.counts()
    parts = [part.counts() for part in data.values()]
    counts = {name: max(part[name] for part in parts) for name in (parts[0] if parts else {})}
    return counts | {"languages": len(parts), "texts": sum(part.get("texts", 0) for part in parts)}
