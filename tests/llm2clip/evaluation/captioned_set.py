"""A set of a stranger, whose file `captions.json` has the captions of each image by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from llm2clip import Benchmark, BenchmarkImages, RetrievalData
from tests.llm2clip.data.conftest import png


def read(folder: Path) -> RetrievalData:
    captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    images = BenchmarkImages([folder / name for name in captions]).require_files("Tiny")
    return RetrievalData.from_captions(images, list(captions.values()))


BENCHMARKS = [
    Benchmark(
        name="tiny", title="Tiny", groups=("short", "paper"), folder="tiny", needs=("captions.json",),
        files="captions.json", counts={"images": 3, "texts": 5}, license="MIT", source="This test.", read=read,
        protocol="retrieval", note="A trap.",
    )
]  # fmt: skip


def write_set(data: Path, captions: Mapping[str, list[str]]) -> Path:
    """Write the set below a folder of sets, with an image of each name; returns its own folder."""
    folder = data / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "captions.json").write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8")
    for shade, name in enumerate(captions):
        (folder / name).write_bytes(png(shade))
    return folder
