"""Small data sets in every supported format, and a temporary cache for `datasets`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import datasets
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from tests.tars import write_tar

EXAMPLES = Path(__file__).parents[3] / "examples" / "data"
CONCEPTS = str(EXAMPLES / "concepts")
GLOSSES = str(EXAMPLES / "glosses")
ROWS = 6
SIZE = 16


@pytest.fixture(scope="session")
def _prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("datasets_cache")


@pytest.fixture(autouse=True)
def _private_cache(_prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", _prepared)
    # After each pass over streamed parquet, datasets waits five seconds for the threads of Arrow.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)


@pytest.fixture(scope="session")
def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def png(shade: int, size: tuple[int, int] = (20, 18)) -> bytes:
    """Encode a PNG of one color, whose red channel identifies its row."""
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def captions(row: int) -> list[str]:
    return [f"short {row}", f"a long caption of {row}"]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with the same six captioned images in each format."""
    root = tmp_path_factory.mktemp("made")
    names = [f"{row}.png" for row in range(ROWS)]

    folder = root / "csv"
    (folder / "images").mkdir(parents=True)
    for row, name in enumerate(names):
        (folder / "images" / name).write_bytes(png(row))
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with (folder / f"data.{suffix}").open("w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["image", "caption", "id"])
            writer.writerows([f"images/{name}", captions(row)[0], 100 + row] for row, name in enumerate(names))

    records = [{"image": f"images/{name}", "caption": captions(row)} for row, name in enumerate(names)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "data.json").write_text(json.dumps(records))

    folder = root / "imagefolder" / "train"
    folder.mkdir(parents=True)
    for row, name in enumerate(names):
        (folder / name).write_bytes(png(row))
    metadata = [{"file_name": name, "caption": captions(row)} for row, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, metadata)))

    for shard in range(2):
        files = []
        for row in range(shard * 3, shard * 3 + 3):
            record = json.dumps({"caption": captions(row)[0], "nested": {"long": captions(row)[1]}})
            files += [(f"sample{row}.png", png(row)), (f"sample{row}.json", record.encode())]
        write_tar(root / "webdataset" / f"{shard:05d}.tar", files)

    table = datasets.Dataset.from_dict(
        {"image": [png(row) for row in range(ROWS)], "caption": [captions(row) for row in range(ROWS)]}
    )
    table.to_parquet(str(root / "bytes.parquet"))
    table = table.cast_column("image", datasets.Image())
    table.save_to_disk(str(root / "saved"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(root / "saved_splits"))
    return root
