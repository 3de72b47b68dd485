"""ECCV Caption and CxC: the COCO test images with all captions that people found right for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from llm2clip.evaluation.benchmark import Benchmark
from llm2clip.evaluation.benchmarks.caption_files import read_karpathy
from llm2clip.evaluation.benchmarks.coco import FOLDER, IMAGE_FOLDERS, KARPATHY_FILES
from llm2clip.evaluation.benchmarks.files import captions_data, first_file
from llm2clip.evaluation.graded_data import PACKAGE, GradedData, Qrels, eccv_caption


@dataclass(frozen=True, kw_only=True)
class GradedBenchmark(Benchmark):
    """A benchmark whose judgements are those of the package `eccv_caption`, which has to be installed."""

    def located(self, folder: Path) -> list[Path | None]:
        """As that of [`Benchmark`], and the package, without importing it."""
        spec = find_spec(PACKAGE)
        return [super().located(folder)[0], Path(spec.origin) if spec is not None and spec.origin else None]


def read_graded(title: str, judgements: str, folder: Path) -> GradedData:
    """Read the Karpathy test split, with the five captions of each image that the package has.

    Args:
        judgements: The attribute of `eccv_caption.Metrics` that holds them.
    """
    known = eccv_caption().Metrics()
    corpus = {caption for captions in known.coco_gts["i2t"].values() for caption in captions}
    images = read_karpathy(first_file(folder, KARPATHY_FILES))
    pairs = [
        [(number, text) for number, text in zip(image.caption_ids, image.captions, strict=True) if number in corpus]
        for image in images
    ]
    captions = [(image.file, [text for _, text in own]) for image, own in zip(images, pairs, strict=True)]
    data = captions_data(title, folder, captions, IMAGE_FOLDERS)
    image_ids, text_ids = [image.image_id for image in images], [number for own in pairs for number, _ in own]
    qrels: dict[str, Qrels] = getattr(known, judgements)
    return GradedData(
        data.images,
        data.texts,
        data.owners,
        image_ids=image_ids,
        text_ids=text_ids,
        text_qrels={number: qrels["t2i"][number] for number in text_ids if number in qrels["t2i"]},
        image_qrels={number: qrels["i2t"][number] for number in image_ids if number in qrels["i2t"]},
    )


_graded = partial(
    GradedBenchmark,
    groups=("short",),
    folder=FOLDER,
    needs=(KARPATHY_FILES, f"the package {PACKAGE} (pip install 'llm2clip[eccv]')"),
    files=f"dataset_coco.json; val2014; and the package {PACKAGE}: pip install 'llm2clip[eccv]'",
    source="The package eccv_caption; otherwise as coco-karpathy.",
)
BENCHMARKS = [
    _graded(
        name="eccv-caption", title="ECCV Caption",
        counts={"images": 5000, "texts": 25_000, "text_queries": 1332, "image_queries": 1261,
                "right_images": 11_279, "right_texts": 22_550},
        license="MIT (judgements), CC BY 4.0 (captions), terms of Flickr (images)",
        read=partial(read_graded, "ECCV Caption", "eccv_gts"), protocol="graded-precision",
        note="Needs the ids of Karpathy's file; the json of Salesforce has none.",
    ),
    _graded(
        name="cxc-eccv", title="CxC, rated pairs",
        counts={"images": 5000, "texts": 25_000, "text_queries": 24_972, "image_queries": 5000,
                "right_images": 35_585, "right_texts": 35_585},
        license="that of Crisscrossed-Captions (ratings), CC BY 4.0 (captions), terms of Flickr (images)",
        read=partial(read_graded, "CxC", "cxc_gts"), protocol="graded-recall",
        note="As eccv_caption measures CxC: 28 captions without a rating of 3 or more are no queries.",
    ),
]  # fmt: skip
