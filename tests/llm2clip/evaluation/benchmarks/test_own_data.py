"""Data of a stranger's own class: counts and parts are all that messages, checksums and check-data ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llm2clip import Benchmark, BenchmarkImages, DataPart
from llm2clip.evaluation.benchmarks.checksum import data_checksum
from llm2clip.evaluation.check_benchmark import check_benchmark
from tests.llm2clip.data.conftest import png


@dataclass
class Rated:
    """Images, each with a text and how well it fits."""

    images: BenchmarkImages
    texts: list[str]
    ratings: list[float]

    def counts(self) -> dict[str, int]:
        return {"ratings": len(self.ratings)}

    def parts(self) -> list[DataPart]:
        keys = [self.images.key(row) for row in range(len(self.images))]
        rows = list(zip(keys, self.texts, strict=True))
        return [DataPart(rows, ("texts",), self.images)]


def read(folder: Path) -> Rated:
    return Rated(BenchmarkImages([folder / "a.png", folder / "b.png"]), ["a dog", "a dog"], [1.0, 0.5])


RATED = Benchmark(
    name="rated", title="Rated", groups=(), folder="rated", needs=("a.png",), files="a.png, b.png",
    counts={"ratings": 2}, license="yours", source="here", read=read, protocol="none of these",
)  # fmt: skip


def test_own_data_are_counted_checked_and_identified(tmp_path: Path) -> None:
    folder = tmp_path / "rated"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(png(1))
    data = read(folder)
    assert RATED.differences(data.counts()) == []
    assert replace(RATED, counts={"ratings": 3}).differences(data.counts()) == ["2 ratings instead of 3"]
    assert data_checksum(data) == data_checksum(read(folder)) != data_checksum(replace(data, ratings=[1.0, 0.25]))
    report = check_benchmark(RATED, tmp_path, num_workers=0)
    assert (report["stops"], report["counts"], report["rows"], report["usable_rows"]) == ([], {"ratings": 2}, 2, 2)
    assert report["findings"]["repeated captions"]["count"] == 1
