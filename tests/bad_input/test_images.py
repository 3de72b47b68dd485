"""A file is an image or a refusal that names it, the same one at every door."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from llm2clip.checks.check_data import check_data
from llm2clip.data import CaptionImageDataset, CaptionSource, EvalTransform, SkippedSample, decode_image
from llm2clip.data.sampling import SampleIndex
from llm2clip.data.transforms import decode_tensor
from llm2clip.search.index import IndexConfig, run
from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError
from tests.bad_input.images import BadImage, write
from tests.modeling_llm2clip import awkward_images, tiny

PROCESSOR = tiny.processor(awkward_images.SIDE)
# Seconds for a file, on a busy machine.
PATIENCE = 10


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


def test_the_corpus_is_large_and_mixed(images: list[BadImage], refused: set[str]) -> None:
    assert len(images) == len({image.name for image in images}) > 250
    for image in images:
        if image.outcome != "either":
            assert (image.name in refused) == (image.outcome == "refused"), image.name
    unclear = {image.name for image in images if image.outcome == "either"}
    assert len(unclear & refused) > 50 < len(unclear - refused)


def from_bytes(image: BadImage, path: Path) -> Any:
    return decode_image(image.content, image.name)


def from_path(image: BadImage, path: Path) -> Any:
    return decode_image(str(path), image.name)


def from_file(image: BadImage, path: Path) -> Any:
    with path.open("rb") as file:
        return decode_image(file, image.name)


def from_record(image: BadImage, path: Path) -> Any:
    return decode_image({"bytes": image.content, "path": None}, image.name)


def evaluation(image: BadImage, path: Path) -> Any:
    transform = EvalTransform(PROCESSOR.image_processor)
    return transform.inputs(transform.decode(image.content, image.name), image.name)


def processor(image: BadImage, path: Path) -> Any:
    return PROCESSOR(images=image.content, return_tensors="pt")


@pytest.mark.parametrize(
    "door", [from_bytes, from_path, from_file, from_record, evaluation, processor], ids=lambda door: door.__name__
)
def test_every_door_refuses_the_same_files(
    door: Callable[[BadImage, Path], Any], folder: Path, images: list[BadImage], refused: set[str]
) -> None:
    found = set()
    for image in images:
        begun, message = time.monotonic(), None
        try:
            door(image, folder / image.name)
        except DamagedImageError as error:
            message = str(error)
        if message is not None:
            found.add(image.name)
            # A processor knows no names.
            assert repr(image.name) in message or door is processor
            assert len(message.splitlines()) == 1, message
        assert time.monotonic() - begun < PATIENCE, image.name
    assert found == refused


def test_the_decoder_to_tensors_gives_an_image_or_a_refusal(images: list[BadImage], refused: set[str]) -> None:
    """It takes JPEGs apart by other code, which may accept other damages; it refuses all that are no JPEG."""
    for image in images:
        try:
            assert decode_tensor(image.content, image.name).shape[0] == 3
        except DamagedImageError:
            assert image.outcome != "image", image.name
        else:
            assert image.name not in refused or ".jpg" in image.name, image.name


@pytest.mark.parametrize("backend", ["exact", "fast"])
def test_an_index_lists_the_refused_files(
    backend: str, folder: Path, images: list[BadImage], refused: set[str], tmp_path: Path
) -> None:
    tiny.save(tmp_path / "model")
    settings: dict[str, Any] = {"model": str(tmp_path / "model"), "output_dir": str(tmp_path / "index")}
    result = run(IndexConfig(folder=str(folder), image_backend=backend, num_workers=2, **settings))
    failures = {entry["key"]: entry["reason"] for entry in json.loads((tmp_path / "index/failures.json").read_text())}
    assert result["images"] + len(failures) == len(images)
    assert all(failures.values())
    if backend == "exact":
        assert set(failures) == refused


def table(folder: Path, images: list[BadImage], path: Path) -> str:
    records = [{"bytes": image.content, "path": None} for image in images]
    columns = {"image": records, "caption": [image.name for image in images], "key": [image.name for image in images]}
    features = datasets.Features({
        "image": datasets.Image(), "caption": datasets.Value("string"), "key": datasets.Value("string"),
    })  # fmt: skip
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return str(path)


def test_training_skips_and_check_data_counts_them(
    folder: Path, images: list[BadImage], refused: set[str], tmp_path: Path
) -> None:
    source = CaptionSource(table(folder, images, tmp_path / "images.parquet"))
    data = CaptionImageDataset(source, EvalTransform(PROCESSOR.image_processor), on_error="skip")
    samples = [data[SampleIndex(0, row)] for row in range(len(images))]
    assert {sample.key for sample in samples if isinstance(sample, SkippedSample)} == refused
    report = check_data(source)
    assert report["rows"] - report["usable_rows"] == len(refused)
    strict = CaptionImageDataset(source, EvalTransform(PROCESSOR.image_processor))
    row = next(row for row, image in enumerate(images) if image.name in refused)
    with pytest.raises(DamagedImageError, match=images[row].name):
        strict[SampleIndex(0, row)]


def test_pillow_does_not_run_programs_for_them(monkeypatch: pytest.MonkeyPatch, images: list[BadImage]) -> None:
    """Pillow hands EPS files to Ghostscript."""
    (script,) = [image for image in images if image.name.endswith(".eps")]
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(DamagedImageError, match="EPS is a program, which is not run"):
        decode_image(script.content, script.name)
