"""What the readers of benchmarks return: images with captions, labels, or choices between them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llm2clip.command_line.logs import shortened
from llm2clip.command_line.progress import track
from llm2clip.data import (
    DEFAULT_MAX_PIXELS,
    CaptionSource,
    PairDataset,
    PairSource,
    caption_id,
    decode_image,
    load_source,
)
from llm2clip.data.rows import column_texts
from llm2clip.data.sources import SourceError, source_columns
from llm2clip.data.table_identity import KEY_VERSION, content_keys, distinct, file_paths
from llm2clip.encoders.images import ChosenImages, ImageList, ImageSet, TableImages
from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks.encoded_images import EncodedImages, files_origin
from llm2clip.evaluation.prompts import prompts
from llm2clip.files.shared_files import shared_file

# Fields of sources by which training draws rows and texts.
PAIRS_OF_TRAINING = (
    *("negative_column", "group_column", "instruction", "instruction_table", "positive_instruction"),
    *("random_negative", "symmetric"),
)
Positives = Literal["distinct", "rows"]


class BenchmarkImages(ImageList):
    """The images of a benchmark: paths of files, or encoded bytes, decoded on demand."""

    def content_keys(self) -> np.ndarray:
        """Hash the encoded images, `(images, 2)` int64: those of files once on this machine, while the files stay."""
        images, origin = self.images, None
        if isinstance(images, EncodedImages):
            origin = images.origin()
        elif images and all(isinstance(image, Path) for image in images):
            origin = files_origin(images)
        if origin is None:
            return super().content_keys()

        def write(path: Path) -> None:
            path.write_bytes(content_keys(track(images, "Hashing images", "image")).astype("<i8").tobytes())

        path = shared_file("benchmark-keys", {"version": KEY_VERSION, "images": origin}, write)
        return np.memmap(path, dtype="<i8", mode="r", shape=(len(images), 2))

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
class DataPart:
    """Rows of some data, which `llm2clip check-data` checks.

    Attributes:
        rows: Of each row the key of its image, or another name of what it belongs to, and its texts.
        columns: Names of the texts of a row, such as their language.
        images: The images of these rows; parts may share them.
        label_map: Reads the label map of an image of `images`, or raises.
    """

    rows: Sequence[tuple[str, ...]] = ()
    columns: tuple[str, ...] = ()
    images: ImageSet | None = None
    label_map: Callable[[int], Tensor] | None = None


class BenchmarkData(Protocol):
    """What a reader returns. Protocols read the fields of a class; all else asks for its counts and its parts."""

    def counts(self) -> dict[str, int]:
        """Return the counts that are compared with the published ones."""
        ...

    def parts(self) -> list[DataPart]:
        """Return the rows and images, to check them."""
        ...


@dataclass
class RetrievalData:
    """Images and captions for retrieval in both directions.

    Attributes:
        images: The corpus of the texts, as the texts are that of the images.
        texts: Every caption row is a query of its own: repeats and empty ones stay.
        owners: `(texts,)` int64, the image that each text belongs to, which alone is right.
        qrels: `(pairs, 2)` int64, text and image of all that is right, if that is more than the owners, or None.
    """

    images: ImageSet
    texts: list[str]
    owners: Tensor
    qrels: Tensor | None = None

    @classmethod
    def from_captions(cls, images: ImageSet, captions: Sequence[Sequence[str]]) -> RetrievalData:
        """Take the captions of each image, in their order."""
        owners = [image for image, texts in enumerate(captions) for _ in texts]
        texts = [text for texts in captions for text in texts]
        return cls(images, texts, torch.tensor(owners, dtype=torch.int64))

    @classmethod
    def from_source(
        cls,
        source: CaptionSource,
        positives: Positives = "distinct",
        max_pixels: int = DEFAULT_MAX_PIXELS,
        require_files: bool = False,
    ) -> RetrievalData:
        """Read the images and captions of a source.

        An image may have several captions, and rows that name the same file are one image. An image whose caption
        columns are all empty is a candidate that is never right.

        Args:
            positives: `distinct`: equal captions are one query, which is right for all images that have it, in
                whatever case and white space. `rows`, the rule of published benchmarks: each caption of each row is a
                query, repeats included, and the image of its row alone is right.
            max_pixels: Largest width x height of an image that is decoded.
            require_files: Files that are not there are an error.

        Raises:
            SourceError: The source cannot be read, or lacks a column or files of images.
            ValueError: No row has a caption.
        """
        source = replace(source.require_unset(["embedding_cache"]), streaming=False)
        table = load_source(source)
        assert isinstance(table, datasets.Dataset)
        columns = source_columns(source, table)
        assert columns.image is not None
        files = list(file_paths(table, columns.image))
        named = [file for file in dict.fromkeys(files) if file and "://" not in file] if require_files else []
        if missing := [file for file in named if not os.path.exists(file)]:
            raise SourceError(f"{source.path} lacks {len(missing):,} images that it names: {shortened(missing)}.")
        first, image_of = distinct([file or row for row, file in enumerate(files)])
        images = ChosenImages(TableImages(table, columns, max_pixels), first)
        rows = table.remove_columns([name for name in (columns.image, columns.key) if name is not None])
        captions: list[list[str]] = [[] for _ in first]
        for image, row in zip(image_of, rows, strict=True):
            captions[image] += [text for column in columns.captions for text in column_texts(row, column)]
        if not any(captions):
            raise ValueError(f"no row of {source.path} has a caption in {', '.join(source.caption_columns)}.")
        if positives == "rows":
            return cls.from_captions(images, captions)
        owners: dict[int, dict[int, None]] = {}
        for image, texts in enumerate(captions):
            for text in texts:
                owners.setdefault(caption_id(text), {})[image] = None
        queries = list(dict.fromkeys(text for texts in captions for text in texts))
        matching_images = [list(owners[caption_id(text)]) for text in queries]
        pairs = [(number, image) for number, matching in enumerate(matching_images) for image in matching]
        return cls(images, queries, torch.tensor([matching[0] for matching in matching_images]), torch.tensor(pairs))

    @property
    def pairs(self) -> Tensor:
        """The pairs that are right, `(pairs, 2)` int64: text and image."""
        if self.qrels is not None:
            return self.qrels
        return torch.stack([torch.arange(len(self.texts)), self.owners], dim=1)

    def image(self, row: int) -> Image.Image:
        """Decode an image."""
        return self.images.decode(row, decode_image)

    def captions_of(self, row: int) -> list[str]:
        """Return the texts that an image is right for."""
        return [self.texts[text] for text in self.pairs[self.pairs[:, 1] == row, 0].tolist()]

    def select(self, images: Sequence[int]) -> RetrievalData:
        """Keep some images, and the texts that one of them is right for.

        Args:
            images: Their positions, ascending.
        """
        positions = torch.full((len(self.images),), -1)
        positions[torch.as_tensor(images, dtype=torch.int64)] = torch.arange(len(images))
        pairs = torch.stack([self.pairs[:, 0], positions[self.pairs[:, 1]]], dim=1)
        pairs = pairs[pairs[:, 1] >= 0]
        texts, pairs[:, 0] = pairs[:, 0].unique(return_inverse=True)
        owners = torch.full((len(texts),), len(images)).scatter_reduce_(0, pairs[:, 0], pairs[:, 1], "amin")
        chosen = [self.texts[text] for text in texts.tolist()]
        return RetrievalData(ChosenImages(self.images, images), chosen, owners, None if self.qrels is None else pairs)

    def counts(self) -> dict[str, int]:
        """Numbers of images and texts."""
        return {"images": len(self.images), "texts": len(self.texts)}

    def parts(self) -> list[DataPart]:
        """Return the captions, by image."""
        keys = [self.images.key(owner) for owner in self.owners.tolist()]
        rows = list(zip(keys, self.texts, strict=True))
        return [DataPart(rows, ("captions",), self.images)]


class MultilingualData(dict[str, RetrievalData]):
    """The captions of images by language, of the languages that have some."""

    def counts(self) -> dict[str, int]:
        """Numbers of languages, of the texts of all, and of the images of the language that has most of them."""
        return {
            "images": max((len(part.images) for part in self.values()), default=0),
            "languages": len(self),
            "texts": sum(len(part.texts) for part in self.values()),
        }

    def parts(self) -> list[DataPart]:
        """Return the captions of each language, by image."""
        return [replace(part, columns=(name,)) for name, data in self.items() for part in data.parts()]


@dataclass
class ClassificationData:
    """Labelled images.

    Attributes:
        labels: `(images,)` int64, a class of each image.
        classnames: Name of each class, as it stands in a prompt.
        templates: Prompts with `{c}` for the name, unless the user chooses others.
        train: Images for a linear probe, with the same classes.
        mean_per_class: Whether the accuracy that is compared is the mean of the classes.
    """

    images: ImageSet
    labels: Tensor
    classnames: list[str]
    templates: list[str] = field(default_factory=lambda: ["a photo of a {c}."])
    train: ClassificationData | None = None
    mean_per_class: bool = False

    def counts(self) -> dict[str, int]:
        """Numbers of images and of classes that have some."""
        return {"images": len(self.images), "classes": len(self.labels.unique())}

    def parts(self) -> list[DataPart]:
        """Return the prompts by class, the images, and those for a probe."""
        names = [name for name in self.classnames for _ in self.templates]
        texts = list(zip(names, prompts(self.classnames, self.templates), strict=True))
        sets = [self] if self.train is None else [self, self.train]
        return [DataPart(texts, ("prompts",)), *(DataPart(images=part.images) for part in sets)]


class SeveralSets(dict[str, ClassificationData]):
    """Sets of classification by name, of which the mean is measured."""

    def counts(self) -> dict[str, int]:
        """Number of sets, and the counts of each after its name, such as `cifar10 images`."""
        counts = {"sets": len(self)}
        for name, data in self.items():
            counts |= {f"{name} {what}": count for what, count in data.counts().items()}
        return counts

    def parts(self) -> list[DataPart]:
        """Return the parts of each set."""
        return [part for data in self.values() for part in data.parts()]


@dataclass
class CaptionPairData:
    """Two captions of each of some images, without the images.

    Attributes:
        queries, targets: A caption of each image, and another one, in the same order.
        qrels: `(pairs, 2)` int64, query and target of all that is right; None if row i belongs to row i.
    """

    queries: list[str]
    targets: list[str]
    qrels: Tensor | None = None

    @classmethod
    def from_source(cls, source: PairSource) -> CaptionPairData:
        """Take the anchors of a source as queries and its positives as targets, or its first two caption columns.

        Equal texts, in whatever case and white space, are one query or one target.
        """
        dataset = PairDataset(source.require_unset(PAIRS_OF_TRAINING))
        rows = [dataset[index] for index in range(len(dataset))]
        sides = [[row[name] for row in rows] for name in ("anchor", "positive")]
        firsts, numbers = zip(*(distinct([caption_id(text) for text in side]) for side in sides), strict=True)
        pairs = sorted(set(zip(*numbers, strict=True)))
        queries, targets = ([side[row] for row in first] for side, first in zip(sides, firsts, strict=True))
        return cls(queries, targets, torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2))

    def counts(self) -> dict[str, int]:
        """Number of pairs."""
        return {"pairs": len(self.queries)}

    def parts(self) -> list[DataPart]:
        """Return the pairs."""
        rows = [("", *texts) for texts in zip(self.queries, self.targets, strict=True)]
        return [DataPart(rows, ("queries", "targets"))]


@dataclass
class PairData:
    """Pairs of images, each with two captions: of each pair, caption 0 is of image 0 and caption 1 of image 1.

    Attributes:
        images: The two images of each pair, one pair after another.
        texts: Their captions, in the same order.
        kinds: The part that each pair belongs to, such as a visual pattern.
    """

    images: ImageSet
    texts: list[str]
    kinds: list[str]

    def counts(self) -> dict[str, int]:
        """Numbers of pairs and kinds."""
        return {"pairs": len(self.kinds), "kinds": len(set(self.kinds))}

    def parts(self) -> list[DataPart]:
        """Return the pairs, by their first image."""
        keys = [self.images.key(row) for row in range(0, len(self.images), 2)]
        rows = list(zip(keys, self.texts[::2], self.texts[1::2], strict=True))
        return [DataPart(rows, ("first", "second"), self.images)]


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

    def parts(self) -> list[DataPart]:
        """Return the choices, by image."""
        keys = [self.images.key(owner) for owner in self.owners.tolist()]
        return [DataPart(list(zip(keys, self.right, self.wrong, strict=True)), ("right", "wrong"), self.images)]
