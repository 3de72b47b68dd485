"""ECCV Caption and CxC: the COCO test images with all captions that people found right for them."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llm2clip.command_line.logs import shortened
from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.caption_files import KarpathyImage, read_karpathy
from llm2clip.evaluation.benchmarks.coco import FOLDER, IMAGE_FOLDERS, KARPATHY_FILES
from llm2clip.evaluation.benchmarks.files import captions_data, first_file
from llm2clip.evaluation.data import GradedData
from llm2clip.evaluation.reading import read_json, read_text

PACKAGE, GALLERY = "eccv_caption", "original_image_to_caption.json"
RATINGS = "cxc/sits_test.csv"
POSITIVE = 3.0

Pairs = Iterable[tuple[int, int]]


def find_gallery(folder: Path) -> Path | None:
    """Find the json files of ECCV Caption below a folder, or in the installed package, which is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    installed = [Path(path) / "data" for path in (spec.submodule_search_locations or [] if spec else [])]
    folders = [folder / PACKAGE, folder / PACKAGE / "data", *installed]
    return next((path / GALLERY for path in folders if (path / GALLERY).is_file()), None)


@dataclass(frozen=True, kw_only=True)
class EccvBenchmark(Benchmark):
    """A benchmark whose judgements may lie in the installed package `eccv_caption`."""

    def located(self, folder: Path) -> list[Path | None]:
        """As that of [`Benchmark`], and the judgements where they are found."""
        captions, _ = super().located(folder)
        return [captions, find_gallery(folder)]


def read_eccv(title: str, prefix: str, folder: Path) -> GradedData:
    """Read `PREFIX_caption_to_image.json` and `PREFIX_image_to_caption.json` of ECCV Caption.

    The gallery is that of `original_image_to_caption.json`: five captions of each image.
    """
    file = find_gallery(folder)
    if file is None:
        raise BenchmarkError(f"{title} needs the json files of the package {PACKAGE}, below {folder / PACKAGE}.")
    gallery = _judgements(file)
    kept = []
    for image in read_karpathy(first_file(folder, KARPATHY_FILES)):
        pairs = zip(image.captions, image.caption_ids, strict=True)
        five = [(text, caption) for text, caption in pairs if caption in gallery.get(image.image_id, [])]
        kept.append(replace(image, captions=[text for text, _ in five], caption_ids=[caption for _, caption in five]))
    there = {caption for image in kept for caption in image.caption_ids}
    missing = [str(caption) for captions in gallery.values() for caption in captions if caption not in there]
    if missing:
        raise BenchmarkError(f"{title}: the Karpathy test split lacks captions {shortened(missing)}.")
    texts, of_images = (
        _judgements(file.with_name(f"{prefix}_{direction}.json"))
        for direction in ("caption_to_image", "image_to_caption")
    )
    return _graded(title, folder, kept, _pairs(texts), _pairs(of_images))


def read_cxc(title: str, folder: Path) -> GradedData:
    """Read the ratings of captions and images: right are those of 3 and more of 5, and the captions' own images.

    The gallery has all captions, which are all queries.
    """
    images = read_karpathy(first_file(folder, KARPATHY_FILES))
    right = {(caption, image.image_id) for image in images for caption in image.caption_ids}
    for row in csv.DictReader(io.StringIO(read_text(folder / RATINGS), newline="")):
        if float(row["agg_score"]) >= POSITIVE:
            right.add((int(row["caption"].rsplit(":", 1)[1]), int(Path(row["image"]).stem.rsplit("_", 1)[1])))
    return _graded(title, folder, images, right, ((image, caption) for caption, image in right))


def _graded(title: str, folder: Path, images: list[KarpathyImage], texts: Pairs, of_images: Pairs) -> GradedData:
    """Replace ids by positions; `texts` are pairs of caption and image, `of_images` of image and caption."""
    data = captions_data(title, folder, [(image.file, image.captions) for image in images], IMAGE_FOLDERS)
    image_rows = {image.image_id: row for row, image in enumerate(images)}
    ids = [caption for image in images for caption in image.caption_ids]
    text_rows = {caption: row for row, caption in enumerate(ids)}
    matches, outside = _positions(texts, text_rows, image_rows)
    image_matches, more = _positions(of_images, image_rows, text_rows)
    words = [f"caption {query}, image {candidate}" for query, candidate in outside]
    words += [f"image {query}, caption {candidate}" for query, candidate in more]
    return GradedData(data.images, data.texts, data.owners, matches, image_matches, words)


def _positions(pairs: Pairs, first: dict[int, int], second: dict[int, int]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the positions of the pairs of ids, `(pairs, 2)` sorted, and the pairs with an unknown id, sorted."""
    distinct = set(pairs)
    known = sorted(
        (first[query], second[candidate]) for query, candidate in distinct if query in first and candidate in second
    )
    unknown = sorted(
        (query, candidate) for query, candidate in distinct if query not in first or candidate not in second
    )
    return torch.tensor(known, dtype=torch.int64).reshape(-1, 2), unknown


def _judgements(path: Path) -> dict[int, list[int]]:
    return {int(query): [int(candidate) for candidate in candidates] for query, candidates in read_json(path).items()}


def _pairs(judgements: dict[int, list[int]]) -> Pairs:
    return ((query, candidate) for query, candidates in judgements.items() for candidate in candidates)


_JUDGED = "val2014; the json files of eccv_caption in eccv_caption, unless that package is installed"
_eccv = partial(
    EccvBenchmark,
    groups=("short",),
    folder=FOLDER,
    needs=(KARPATHY_FILES, f"{PACKAGE}/{GALLERY}"),
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
