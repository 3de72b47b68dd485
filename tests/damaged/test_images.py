"""Commands on hundreds of damaged images go on with the others, and list every one of them."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from llm2clip.checks.check_data import check_data
from llm2clip.data import CaptionImageDataset, CaptionSource, EvalTransform, SkippedSample, decode_image
from llm2clip.data.sampling import SampleIndex
from llm2clip.search.index import IndexConfig, run
from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError
from tests.damaged.images import BadImage, hostile, write
from tests.modeling_llm2clip import awkward_images, tiny

PROCESSOR = tiny.processor(awkward_images.SIDE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad") / "images"


@pytest.fixture(scope="module")
def images(folder: Path) -> list[BadImage]:
    return write(folder)


@pytest.fixture(scope="module")
def refused(images: list[BadImage]) -> set[str]:
    """The names of those that the decoder refuses."""
    found = set()
    for image in images:
        try:
            decode_image(image.content, image.name)
        except DamagedImageError:
            found.add(image.name)
    return found


def test_images_of_all_formats_are_read_and_other_files_refused(images: list[BadImage], refused: set[str]) -> None:
    assert [image.name for image in images if image.outcome == "image" and image.name in refused] == []
    assert [image.name for image in images if image.outcome == "refused" and image.name not in refused] == []


@pytest.mark.parametrize("backend", ["exact", "fast"])
def test_an_index_lists_the_images_that_it_lacks(
    backend: str, folder: Path, images: list[BadImage], refused: set[str], tmp_path: Path
) -> None:
    tiny.save(tmp_path / "model")
    config = IndexConfig(folder=str(folder), model=str(tmp_path / "model"), output_dir=str(tmp_path / "index"))
    config.image_backend, config.num_workers = backend, 2
    result = run(config)
    failures = {entry["key"]: entry["reason"] for entry in json.loads((tmp_path / "index/failures.json").read_text())}
    assert result["images"] + len(failures) == len(images)
    assert all(failures.values())
    # The fast one takes JPEGs apart by other code, which may accept other damages.
    assert backend == "fast" or set(failures) == refused


def test_training_skips_or_names_them_and_check_data_counts_them(
    images: list[BadImage], refused: set[str], tmp_path: Path
) -> None:
    path, names = str(tmp_path / "images.parquet"), [image.name for image in images]
    columns = {"image": [{"bytes": image.content, "path": None} for image in images], "caption": names, "key": names}
    table = datasets.Dataset.from_dict(columns)
    table.cast_column("image", datasets.Image(decode=False)).to_parquet(path)
    source = CaptionSource(path)
    data = CaptionImageDataset(source, EvalTransform(PROCESSOR.image_processor), on_error="skip")
    samples = [data[SampleIndex(0, row)] for row in range(len(images))]
    assert {sample.key for sample in samples if isinstance(sample, SkippedSample)} == refused
    report = check_data(source)
    assert report["rows"] - report["usable_rows"] == len(refused)
    strict = CaptionImageDataset(source, EvalTransform(PROCESSOR.image_processor))
    row = next(row for row, name in enumerate(names) if name in refused)
    with pytest.raises(DamagedImageError, match=names[row]):
        strict[SampleIndex(0, row)]


def test_pillow_runs_no_programs_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(DamagedImageError, match="EPS is a program"):
        decode_image(hostile()["script.eps"], "script.eps")
