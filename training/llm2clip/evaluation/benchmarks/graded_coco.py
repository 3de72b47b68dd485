"""ECCV Caption and CxC: the COCO test images with all captions that people found right for them."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.caption_files import KarpathyImage, read_karpathy
from llm2clip.evaluation.benchmarks.coco import FOLDER, IMAGE_FOLDERS, KARPATHY_FILES
from llm2clip.evaluation.benchmarks.files import captions_data, first_file
from llm2clip.evaluation.data import GradedData
from llm2clip.evaluation.reading import read_json, read_text
from llm2clip.utils.logs import shortened

PACKAGE = "eccv_caption"
GALLERY = "original_image_to_caption.json"
RATINGS = "cxc/sits_test.csv"
POSITIVE = 3.0

Pairs = Iterable[tuple[int, int]]


def find_eccv_files(folder: Path) -> Path | None:
    """Return the folder of the json files of ECCV Caption: `eccv_caption` below a folder, or that of the package.

    The package is not imported.
    """
    places = [folder / PACKAGE, folder / PACKAGE / "data"]
    spec = importlib.util.find_spec(PACKAGE)
    places += [Path(place) / "data" for place in (spec.submodule_search_locations or [] if spec else [])]
    return next((place for place in places if (place / GALLERY).is_file()), None)


@dataclass(frozen=True)
class EccvBenchmark(Benchmark):
    """A benchmark whose judgements may lie in the installed package `eccv_caption`."""

    def find(self, data: Path) -> Path | None:
        """As that of [`Benchmark`]; None also if the json files are neither there nor in the package."""
        folder = super().find(data)
        return folder if folder is not None and find_eccv_files(folder) is not None else None


def read_eccv(title: str, prefix: str, folder: Path) -> GradedData:
    """Read `PREFIX_caption_to_image.json` and `PREFIX_image_to_caption.json` of ECCV Caption.

    The gallery is that of `original_image_to_caption.json`: five captions of each image.

    Raises:
        BenchmarkError: Files or images are missing, or the gallery is not that of the Karpathy test split.
    """
    place = find_eccv_files(folder)
    if place is None:
        raise BenchmarkError(f"{title} needs the json files of the package {PACKAGE}, below {folder / PACKAGE}.")
    gallery = _judgements(place / GALLERY)
    images = read_karpathy(first_file(folder, KARPATHY_FILES))
    kept = [
        KarpathyImage(image.file, *_kept(image, set(gallery.get(_id(image), []))), image.image_id) for image in images
    ]
    missing = {caption for captions in gallery.values() for caption in captions} - {
        caption for image in kept for caption in image.caption_ids
    }
    if missing:
        raise BenchmarkError(f"{title}: the Karpathy test split lacks captions {shortened(list(map(str, missing)))}.")
    texts = _judgements(place / f"{prefix}_caption_to_image.json")
    of_images = _judgements(place / f"{prefix}_image_to_caption.json")
    return _graded(title, folder, kept, _pairs(texts), _pairs(of_images))


def read_cxc(title: str, folder: Path) -> GradedData:
    """Read the ratings of captions and images: right are those of 3 and more of 5, and the captions' own images.

    The gallery has all captions, which are all queries.

    Raises:
        BenchmarkError: A row is broken, or images are missing.
    """
    images = read_karpathy(first_file(folder, KARPATHY_FILES))
    right = {(caption, _id(image)) for image in images for caption in image.caption_ids}
    rows = csv.DictReader(io.StringIO(read_text(folder / RATINGS), newline=""))
    for number, row in enumerate(rows, start=2):
        try:
            caption, score = int(row["caption"].rsplit(":", 1)[1]), float(row["agg_score"])
            image = int(Path(row["image"]).stem.rsplit("_", 1)[1])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise BenchmarkError(f"line {number} of {RATINGS} is not a rating of a caption and an image.") from error
        if score >= POSITIVE:
            right.add((caption, image))
    return _graded(title, folder, images, right, ((image, caption) for caption, image in right))


def _graded(title: str, folder: Path, images: list[KarpathyImage], texts: Pairs, of_images: Pairs) -> GradedData:
    """Replace ids by positions; `texts` are pairs of caption and image, `of_images` of image and caption."""
    data = captions_data(title, folder, [(image.file, image.captions) for image in images], IMAGE_FOLDERS)
    image_rows = {_id(image): row for row, image in enumerate(images)}
    ids = [caption for image in images for caption in image.caption_ids]
    text_rows = {caption: row for row, caption in enumerate(ids)}
    matches, outside = _positions(texts, text_rows, image_rows)
    image_matches, more = _positions(of_images, image_rows, text_rows)
    words = [f"caption {one}, image {other}" for one, other in outside]
    words += [f"image {one}, caption {other}" for one, other in more]
    return GradedData(data.images, data.texts, data.owners, matches, image_matches, words)


def _positions(pairs: Pairs, first: dict[int, int], second: dict[int, int]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the positions of the pairs of ids, `(pairs, 2)` sorted, and the pairs with an unknown id, sorted."""
    distinct = set(pairs)
    known = sorted((first[one], second[other]) for one, other in distinct if one in first and other in second)
    unknown = sorted((one, other) for one, other in distinct if one not in first or other not in second)
    return torch.tensor(known, dtype=torch.int64).reshape(-1, 2), unknown


def _judgements(path: Path) -> dict[int, list[int]]:
    content = read_json(path) if path.is_file() else None
    if not isinstance(content, dict) or not all(isinstance(others, list) for others in content.values()):
        raise BenchmarkError(f"there is no file {path} with lists by id.")
    return {int(one): [int(other) for other in others] for one, others in content.items()}


def _pairs(judgements: dict[int, list[int]]) -> Pairs:
    return ((one, other) for one, others in judgements.items() for other in others)


def _kept(image: KarpathyImage, gallery: set[int]) -> tuple[list[str], list[int]]:
    pairs = zip(image.captions, image.caption_ids, strict=True)
    kept = [(text, caption) for text, caption in pairs if caption in gallery]
    return [text for text, _ in kept], [caption for _, caption in kept]


def _id(image: KarpathyImage) -> int:
    if image.image_id is None:
        raise BenchmarkError(f"the image {image.file} has no cocoid.")
    return image.image_id


_JUDGED = "val2014; the json files of eccv_caption in eccv_caption, unless that package is installed"
_eccv = partial(
    EccvBenchmark,
    groups=("short",),
    folder=FOLDER,
    needs=(KARPATHY_FILES,),
    source="The package eccv_caption; otherwise as coco-karpathy.",
)
BENCHMARKS = [
    _eccv(
        name="eccv-caption", title="ECCV Caption",
        files=f"dataset_coco.json; {_JUDGED} (original_image_to_caption, eccv_*)",
        counts={"images": 5000, "texts": 25_000, "text_queries": 1332, "image_queries": 1261,
                "right_images": 11_279, "right_texts": 22_550},
        license="MIT (judgements), CC BY 4.0 (captions), terms of Flickr (images)",
        read=partial(read_eccv, "ECCV Caption", "eccv"), protocol="graded-precision",
        note="Needs the ids of Karpathy's file; the json of Salesforce has none.",
    ),
    _eccv(
        name="cxc-eccv", title="CxC, rated pairs",
        files=f"dataset_coco.json; {_JUDGED} (original_image_to_caption, cxc_*)",
        counts={"images": 5000, "texts": 25_000, "text_queries": 24_972, "right_images": 35_585},
        license="that of Crisscrossed-Captions (ratings), CC BY 4.0 (captions), terms of Flickr (images)",
        read=partial(read_eccv, "CxC", "cxc"), protocol="graded-recall",
        note="As eccv_caption measures CxC: 28 captions without a rating of 3 or more are no queries.",
    ),
    Benchmark(
        name="cxc", title="CxC", groups=("short",), folder=FOLDER, needs=(KARPATHY_FILES, RATINGS),
        files=f"dataset_coco.json; {RATINGS}; val2014",
        counts={"images": 5000, "texts": 25_010, "text_queries": 25_010, "image_queries": 5000, "outside": 0},
        license="that of Crisscrossed-Captions (ratings), CC BY 4.0 (captions), terms of Flickr (images)",
        source="The folder data of the repository Crisscrossed-Captions of Google; otherwise as coco-karpathy.",
        read=partial(read_cxc, "CxC"), protocol="graded-recall",
        note="Right are ratings of 3 and more, and each caption's own image.",
    ),
]  # fmt: skip
