"""Crossmodal-3600: 3,600 photographs from all over the world, captioned in 36 languages."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from llm2clip.evaluation.benchmarks.base import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.data import RetrievalData
from llm2clip.evaluation.benchmarks.files import find_images, read_json_lines, text_field, texts_field
from llm2clip.evaluation.protocols.retrieval import MultilingualRetrieval

TITLE = "XM3600"
FILE = "captions.jsonl"
LANGUAGES = (
    *("ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fil", "fr", "he", "hi", "hr", "hu", "id", "it"),
    *("ja", "ko", "mi", "nl", "no", "pl", "pt", "quz", "ro", "ru", "sv", "sw", "te", "th", "tr", "uk", "vi", "zh"),
)


def read(first: int | None, folder: Path) -> dict[str, RetrievalData]:
    """Read the captions of each language; images without one in a language stay in its gallery.

    Args:
        first: Captions of each image that are taken; None for all.

    Raises:
        BenchmarkError: A row is broken, or images are missing.
    """
    rows = [(row, f"row {number} of {folder / FILE}") for number, row in enumerate(read_json_lines(folder / FILE), 1)]
    names = [f"images/{text_field(row, 'image/key', place)}.jpg" for row, place in rows]
    images = find_images(TITLE, folder, names)
    captions = {name: [_captions(row, name, place)[:first] for row, place in rows] for name in LANGUAGES}
    return {name: RetrievalData.from_captions(images, texts) for name, texts in captions.items() if any(texts)}


def _captions(row: dict[str, object], language: str, place: str) -> list[str]:
    fields = row.get(language)
    if fields is None:
        return []
    if not isinstance(fields, dict):
        raise BenchmarkError(f"{place} has no captions in {language!r}, but {fields!r:.80}.")
    return texts_field(fields, "caption", f"{place}, {language}")


_xm3600 = partial(
    Benchmark,
    folder="xm3600",
    marker=FILE,
    files=f"{FILE}; images/KEY.jpg",
    license="CC BY 4.0 (captions), CC BY 2.0 (images, of Open Images)",
    source="captions.zip and images.tgz from the page of Crossmodal-3600 by Google.",
    protocol=MultilingualRetrieval(),
    languages=LANGUAGES,
)

BENCHMARKS = [
    _xm3600(
        name="xm3600",
        title=TITLE,
        groups=("languages", "paper"),
        counts={"images": 3600, "languages": 36, "texts": 261_375},
        read=partial(read, None),
        note="All captions, mean over 36 languages with English: big_vision, MetaCLIP 2 and mteb.",
    ),
    _xm3600(
        name="xm3600-first",
        title=f"{TITLE}, first captions",
        groups=("languages",),
        counts={"images": 3600, "languages": 36, "texts": 129_600},
        read=partial(read, 1),
        note="The first caption alone, mean over 36 languages with English: CLIP_benchmark and FLAME.",
    ),
]
