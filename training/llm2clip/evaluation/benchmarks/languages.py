"""Captions in many languages: Crossmodal-3600, photographs from all over the world in 36, and XTD10, of COCO in 11."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from llm2clip.evaluation.benchmark import Benchmark
from llm2clip.evaluation.benchmarks.coco import COCO_2014_FOLDERS
from llm2clip.evaluation.benchmarks.files import find_images, first_file
from llm2clip.evaluation.data import BenchmarkImages, MultilingualData, RetrievalData
from llm2clip.evaluation.reading import read_json_lines, read_lines

XM3600 = "XM3600"
XM3600_FILE = "captions.jsonl"
XM3600_LANGUAGES = (
    *("ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fil", "fr", "he", "hi", "hr", "hu", "id", "it"),
    *("ja", "ko", "mi", "nl", "no", "pl", "pt", "quz", "ro", "ru", "sv", "sw", "te", "th", "tr", "uk", "vi", "zh"),
)
WITHOUT_ENGLISH = tuple(language for language in XM3600_LANGUAGES if language != "en")
XTD10 = "XTD10"
XTD10_NAMES = ("XTD10/test_image_names.txt", "test_image_names.txt")
# Japanese has the code `jp` in its files. English, German and French are from MIC, Japanese from STAIR.
XTD10_LANGUAGES = ("de", "en", "es", "fr", "it", "jp", "ko", "pl", "ru", "tr", "zh")
XTD10_FOLDERS = ("XTD10", "MIC", "STAIR", "")


def read_xm3600(first: int | None, folder: Path) -> MultilingualData:
    """Read the captions of each language; images without one in a language stay in its gallery.

    Args:
        first: Captions of each image that are taken; None for all.
    """
    rows = read_json_lines(folder / XM3600_FILE)
    images = find_images(XM3600, folder, [f"images/{row['image/key']}.jpg" for row in rows])
    captions = {
        language: [row[language]["caption"][:first] if language in row else [] for row in rows]
        for language in XM3600_LANGUAGES
    }
    return _by_language(images, captions)


def read_xtd10(folder: Path) -> MultilingualData:
    """Read line i of each language's file as the caption of line i of the names, also if it is empty."""
    names = read_lines(first_file(folder, XTD10_NAMES))
    captions: dict[str, list[list[str]]] = {}
    for language in XTD10_LANGUAGES:
        files = [folder / part / f"test_1kcaptions_{language}.txt" for part in XTD10_FOLDERS]
        file = next((file for file in files if file.is_file()), None)
        if file is not None:
            captions[language] = [[line] for _, line in zip(names, read_lines(file), strict=True)]
    return _by_language(find_images(XTD10, folder, names, ("images", *COCO_2014_FOLDERS)), captions)


def _by_language(images: BenchmarkImages, captions: dict[str, list[list[str]]]) -> MultilingualData:
    """Make data of the captions of each image, by language; the images are the same ones in all."""
    return MultilingualData(
        {name: RetrievalData.from_captions(images, texts) for name, texts in captions.items() if any(texts)}
    )


_xm3600 = partial(
    Benchmark, folder="xm3600", needs=(XM3600_FILE,), files=f"{XM3600_FILE}; images/KEY.jpg",
    license="CC BY 4.0 (captions), CC BY 2.0 (images, of Open Images)",
    source="captions.zip and images.tgz from the page of Crossmodal-3600 by Google.",
    protocol="multilingual-retrieval",
)  # fmt: skip
_all_captions = partial(
    _xm3600, counts={"images": 3600, "languages": 36, "texts": 261_375}, read=partial(read_xm3600, None)
)

BENCHMARKS = [
    _all_captions(
        name="xm3600", title=XM3600, groups=("languages", "paper"),
        note="All captions, mean over 36 languages with English: big_vision, MetaCLIP 2 and mteb.",
    ),
    _all_captions(
        name="xm3600-without-english", title=f"{XM3600} without English", groups=("languages",),
        options={"mean_over": WITHOUT_ENGLISH},
        note="All captions, mean over the 35 other languages; papers call this XM3600 too, so ask which mean one has.",
    ),
    _xm3600(
        name="xm3600-first", title=f"{XM3600}, first captions", groups=("languages",),
        counts={"images": 3600, "languages": 36, "texts": 129_600}, read=partial(read_xm3600, 1),
        note="The first caption alone, mean over 36 languages with English: CLIP_benchmark and FLAME.",
    ),
    Benchmark(
        name="xtd10", title=XTD10, groups=("languages",), folder="xtd10", needs=(XTD10_NAMES,),
        files="the folders XTD10, MIC and STAIR of its repository; train2014 and val2014, here or in coco",
        counts={"images": 1000, "languages": 11, "texts": 11_000},
        license="Adobe Research License, not commercial (captions); terms of Flickr (images)",
        source="The repository Cross-lingual-Test-Dataset-XTD10 of Adobe Research; the images from the COCO site.",
        read=read_xtd10, protocol="multilingual-retrieval",
        note="Images of train2014 and val2014. The mean is over all eleven languages, with English.",
    ),
]  # fmt: skip
