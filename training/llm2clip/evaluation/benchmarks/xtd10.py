"""XTD10: 1,000 COCO images with one caption each in English and ten other languages."""

from __future__ import annotations

from pathlib import Path

from llm2clip.evaluation.benchmarks.base import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.coco_cn import COCO_2014_FOLDERS
from llm2clip.evaluation.benchmarks.data import RetrievalData
from llm2clip.evaluation.benchmarks.files import find_images, first_file, read_lines
from llm2clip.evaluation.protocols.retrieval import MultilingualRetrieval

TITLE = "XTD10"
NAMES = "test_image_names.txt"
# Japanese has the code `jp` in its files. English, German and French are from MIC, Japanese from STAIR.
LANGUAGES = ("de", "en", "es", "fr", "it", "jp", "ko", "pl", "ru", "tr", "zh")
FOLDERS = ("XTD10", "MIC", "STAIR", "")


def read(folder: Path) -> dict[str, RetrievalData]:
    """Read line i of each language's file as the caption of line i of the names, also if it is empty.

    Raises:
        BenchmarkError: A file has more or fewer lines than there are names, or images are missing.
    """
    names = read_lines(first_file(folder, (f"XTD10/{NAMES}", NAMES)))
    images = find_images(TITLE, folder, names, ("images", *COCO_2014_FOLDERS))
    found = {}
    for language in LANGUAGES:
        files = [folder / part / f"test_1kcaptions_{language}.txt" for part in FOLDERS]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            # The count of languages tells.
            continue
        captions = read_lines(file)
        if len(captions) != len(names):
            raise BenchmarkError(f"{file} has {len(captions):,} lines for {len(names):,} images.")
        found[language] = RetrievalData.from_captions(images, [[caption] for caption in captions])
    return found


BENCHMARKS = [
    Benchmark(
        name="xtd10",
        title=TITLE,
        groups=("languages",),
        folder="xtd10",
        marker=f"XTD10/{NAMES}",
        other_markers=(NAMES,),
        files="the folders XTD10, MIC and STAIR of its repository; train2014 and val2014, here or in coco",
        counts={"images": 1000, "languages": 11, "texts": 11_000},
        license="Adobe Research License, not commercial (captions); terms of Flickr (images)",
        source="The repository Cross-lingual-Test-Dataset-XTD10 of Adobe Research; the images from the COCO site.",
        read=read,
        protocol=MultilingualRetrieval(),
        languages=LANGUAGES,
        note="Images of train2014 and val2014. The mean is over all eleven languages, with English.",
    )
]
