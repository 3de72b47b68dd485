"""Indexing: which files and rows are indexed, which are skipped and why, and what an index stores of them."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import lancedb
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from llm2clip import cli
from llm2clip.data import decode_image
from llm2clip.search.index import IndexConfig, run
from llm2clip.search.search_index import SearchIndex
from modeling_llm2clip import LLM2CLIPModel
from tests.modeling_llm2clip import tiny
from tests.processes import run_python

from .conftest import content, encoded, header_bomb, index, picture, rows, save_broken, save_table

Model = tuple[Path, LLM2CLIPModel]


def test_a_folder_is_indexed_as_unit_embeddings_by_relative_path(pictures: Path, model: Model, tmp_path: Path) -> None:
    (pictures / ".hidden.png").write_bytes(encoded(picture(1)))
    assert index(pictures, model[0], tmp_path / "index", dtype="float32") == (12, 0, 0, 0, 12)
    found = rows(tmp_path / "index")
    files = [pictures / row["key"] for row in found]
    assert sorted(files) == sorted(pictures.rglob("[0-9]*.png"))
    for row, file in zip(found, files, strict=True):
        place = file.parent.relative_to(pictures).as_posix()
        assert (row["folder"], row["extension"]) == (place, "png")
        assert (row["size"], row["mtime_ns"]) == (file.stat().st_size, file.stat().st_mtime_ns)
    expected = model[1].encode_image([str(file) for file in files], tiny.processor())
    actual = torch.tensor([row["vector"] for row in found])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert (manifest["model"], manifest["width"], manifest["images"]) == (str(model[0]), 24, 12)


def test_the_index_is_a_lancedb_table(pictures: Path, model: Model, tmp_path: Path) -> None:
    index(pictures, model[0], tmp_path / "index")
    table = lancedb.connect(str(tmp_path / "index")).open_table("images")
    assert table.schema.field("vector").type == pa.list_(pa.float16(), 24)
    found = table.search().where("key = 'a/07.png'").to_list()[0]
    assert table.search(np.asarray(found["vector"], np.float32)).limit(1).to_list()[0]["key"] == "a/07.png"


def test_worker_processes_do_not_change_the_index_and_are_no_forks_of_lancedb(
    pictures: Path, model: Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    index(pictures, model[0], tmp_path / "none")
    index(pictures, model[0], tmp_path / "two", num_workers=2)
    assert content(tmp_path / "none") == content(tmp_path / "two")
    assert "fork" not in capfd.readouterr().err


def test_the_fast_image_backend_decodes_to_tensors_and_is_recorded(
    pictures: Path, model: Model, tmp_path: Path, decoded_to_tensors: list[str]
) -> None:
    settings = {"model": str(model[0]), "folder": str(pictures), "num_workers": 0}
    run(IndexConfig(output_dir=str(tmp_path / "exact"), **settings))
    assert not decoded_to_tensors
    run(IndexConfig(output_dir=str(tmp_path / "fast"), image_backend="fast", **settings))
    assert decoded_to_tensors
    with pytest.raises(ValueError, match=r"was built with image_backend fast, not exact; choose another"):
        run(IndexConfig(output_dir=str(tmp_path / "fast"), **settings))
    with pytest.raises(ValueError, match="image_backend is 'quick', but it has to be one of exact, fast"):
        IndexConfig(image_backend="quick", **settings)


def test_unusable_files_are_skipped_and_listed_with_the_reason(
    pictures: Path, model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {
        "empty.png": (b"", "zero bytes"),
        "notes.txt": (b"these are words", "does not recognize its format"),
        "cut.png": (encoded(picture(3))[:60], ""),
        "bomb.png": (header_bomb(), "pixels"),
        "large.png": (encoded(Image.new("1", (300, 300))), "300 x 300 pixels exceed max_pixels (80,000)"),
        "strip.png": (encoded(Image.new("1", (1, 70_000))), "resized, they would be 28 x 1960000; cut it"),
    }
    for name, (data, _) in bad.items():
        (pictures / name).write_bytes(data)
    (pictures / "gone.png").symlink_to("nowhere.png")
    (pictures / "linked").symlink_to(pictures / "a", target_is_directory=True)
    os.mkfifo(pictures / "pipe.png")
    (Path(os.fsdecode(os.fsencode(pictures) + b"/\xff.png"))).write_bytes(encoded(picture(4)))
    output = tmp_path / "index"
    with caplog.at_level("WARNING"):
        assert index(pictures, model[0], output, max_pixels=80_000) == (12, 0, 0, 10, 12)
    failures = {entry["key"]: entry["reason"] for entry in json.loads((output / "failures.json").read_text())}
    expected = {name: reason for name, (_, reason) in bad.items()}
    expected |= {"gone.png": "No such file", "pipe.png": "not a regular file", "?.png": "not valid UTF-8"}
    expected["linked"] = "link to a folder, and links are not followed"
    assert set(failures) == set(expected)
    for name, reason in expected.items():
        assert reason in failures[name]
        assert f"{name}: " in caplog.text
    # A repaired file is indexed.
    (pictures / "empty.png").write_bytes(encoded(picture(60)))
    assert index(pictures, model[0], output, max_pixels=80_000) == (1, 12, 0, 9, 13)


def test_the_captions_of_an_image_folder_are_no_damaged_image(pictures: Path, model: Model, tmp_path: Path) -> None:
    (pictures / "a" / "metadata.jsonl").write_text('{"file_name": "07.png", "caption": "noise"}\n')
    assert index(pictures, model[0], tmp_path / "index") == (12, 0, 0, 0, 12)


def test_webdataset_shards_and_saved_data_sets_are_indexed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(2):
        with tarfile.open(shards / f"{shard}.tar", "w") as tar:
            for number in range(3):
                for suffix, data in (("png", encoded(picture(number + 3 * shard))), ("txt", b"a caption")):
                    (tmp_path / "member").write_bytes(data)
                    tar.add(tmp_path / "member", f"{shard}-{number}.{suffix}")
    monkeypatch.chdir(shards)
    assert index("*.tar", model[0], tmp_path / "of_shards") == (6, 0, 0, 0, 6)
    manifest = json.loads((tmp_path / "of_shards" / "manifest.json").read_text())
    assert manifest["source"]["path"] == str(shards / "*.tar")
    with pytest.raises(ValueError, match="needs a folder"):
        run(IndexConfig(folder="*.tar", model=str(model[0])))
    found = rows(tmp_path / "of_shards")
    assert (found[4]["key"], found[4]["caption"]) == ("1-1", "a caption")
    assert index(shards, model[0], tmp_path / "of_folder")[0] == 6
    saved = {"image": [picture(seed) for seed in range(4)]}
    datasets.Dataset.from_dict(saved).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    assert index(tmp_path / "saved", model[0], tmp_path / "of_saved") == (4, 0, 0, 0, 4)


def test_more_cells_than_images_are_refused(pictures: Path, model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="99 cells needs at least 99 images, but there are 12"):
        index(pictures, model[0], tmp_path / "index", index_type="ivf_rq", cells=99)


def test_metadata_columns_are_stored_and_filtered(model: Model, tmp_path: Path) -> None:
    columns = {"source": ["noto", "other", "noto", "other"], "id": [5, 6, 7, 8], "weight": [0.5, 1.5, 2.5, 3.5]}
    columns |= {"day": [date(2026, 1, 1 + number) for number in range(4)], "is_new": [True, False, True, True]}
    path = save_table(tmp_path / "data.parquet", [1, 2, 3, 4], **columns)
    settings = {"metadata_columns": list(columns)}
    assert index(path, model[0], tmp_path / "index", **settings)[0] == 4
    opened = SearchIndex.open(tmp_path / "index")
    query = np.ones((1, 24), np.float32) / 24**0.5
    for where, keys in (("source = 'noto' AND id > 5", {"2"}), ("day < '2026-01-03' AND NOT is_new", {"1"})):
        assert {row.key for row in opened.search(query, 10, where)[0]} == keys
    table = lancedb.connect(str(tmp_path / "index")).open_table("images")
    assert {(index.columns[0], index.index_type) for index in table.list_indices()} == {
        ("source", "Bitmap"),
        ("id", "Bitmap"),
        ("is_new", "Bitmap"),
        ("day", "BTree"),
        ("weight", "BTree"),
    }
    # A row whose metadata changed keeps its embedding.
    save_table(path, [1, 2, 3, 4], **(columns | {"source": ["noto"] * 4}))
    assert index(path, model[0], tmp_path / "index", **settings) == (0, 4, 0, 0, 4)
    assert len(SearchIndex.open(tmp_path / "index").search(query, 10, "source = 'noto'")[0]) == 4
    with pytest.raises(ValueError, match="built with metadata_columns source, id, weight, day, is_new, not source"):
        index(path, model[0], tmp_path / "index", metadata_columns=["source"])


def test_metadata_columns_that_cannot_be_stored_are_refused(pictures: Path, model: Model, tmp_path: Path) -> None:
    path = save_table(tmp_path / "data.parquet", [1], tags=[["a", "b"]], row=[1])
    with pytest.raises(ValueError, match=r"the metadata column tags of .* holds list"):
        index(path, model[0], tmp_path / "index", metadata_columns=["tags"])
    with pytest.raises(ValueError, match=r"the metadata column row of .* has a name that the index needs"):
        index(path, model[0], tmp_path / "index", metadata_columns=["row"])
    with pytest.raises(ValueError, match="licence"):
        index(path, model[0], tmp_path / "index", metadata_columns=["licence"])
    with pytest.raises(ValueError, match=r"metadata_columns is licence, but .* is a folder of image files"):
        index(pictures, model[0], tmp_path / "index", metadata_columns=["licence"])


def test_other_models_and_folders_are_refused(pictures: Path, model: Model, tmp_path: Path) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output)
    torch.manual_seed(5)
    tiny.save(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"made by {model[0]} .* but the model is {tmp_path / 'other'} "):
        index(pictures, tmp_path / "other", output)
    tiny.save(tmp_path / "wide", projection_dim=40)
    with pytest.raises(ValueError, match=r"\(width 24, .*\(width 40, "):
        index(pictures, tmp_path / "wide", output)
    with pytest.raises(ValueError, match="was built with source kind folder"):
        index(pictures / "a", model[0], output)
    with pytest.raises(ValueError, match="was built with dtype float16, not float32"):
        index(pictures, model[0], output, dtype="float32")
    assert index(pictures, tmp_path / "other", output, overwrite=True)[0] == 12


def test_mistakes_in_names_are_found_before_anything_large_is_imported(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    script = """
import sys
from llm2clip import cli
for folder, model in (("nowhere", "a/b"), ("pictures", "./no/model"), ("pictures", "no.py:load"), ("nowhere/*/", "")):
    assert cli.main(["index", folder, "--model", model]) == 2
print(sorted({"torch", "transformers", "lancedb", "datasets", "pyarrow", "numpy"} & set(sys.modules)))
"""
    done = run_python(["-c", script], folder=tmp_path, PYTHONPATH=":".join(sys.path))
    assert done.stdout == "[]\n"
    for message in (
        "no file or folder nowhere",
        "no model ./no/model",
        "the file no.py does not exist",
        "the model is",
    ):
        assert message in done.stderr


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), "there are no files in"),
        (lambda folder: None, "there is no file or folder"),
        (lambda folder: (folder.mkdir(), (folder / "a.txt").write_text("words")), "none of the 1 files or rows"),
        (lambda folder: (folder.mkdir(), (folder / "a.png").touch()), "none of the 1 files or rows"),
    ],
)
def test_a_source_without_images_is_an_error(make: Any, message: str, model: Model, tmp_path: Path) -> None:
    make(tmp_path / "source")
    with pytest.raises((ValueError, OSError), match=message):
        index(tmp_path / "source", model[0], tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_a_folder_of_other_files_is_not_replaced(pictures: Path, model: Model, tmp_path: Path) -> None:
    (pictures / "a" / "manifest.json").write_text("{}")  # a built model has one of this name
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="llm2clip index did not write it"):
            index(pictures, model[0], pictures / "a", overwrite=overwrite)
    with pytest.raises(NotADirectoryError, match="is a file"):
        index(pictures, model[0], pictures / "00.png")
    assert len(list(pictures.rglob("*.png"))) == 12


def test_an_index_inside_the_image_folder_is_excluded(pictures: Path, model: Model) -> None:
    assert index(pictures, model[0], pictures / "index") == (12, 0, 0, 0, 12)
    assert index(pictures, model[0], pictures / "index") == (0, 12, 0, 0, 12)


def test_decoding_reads_only_the_image_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "long.png"
    path.write_bytes(encoded(picture(1)) + bytes(10_000_000))
    with path.open("rb") as file:
        assert decode_image(file, "key").size == (32, 32)
        assert file.tell() < 1_000_000


def test_a_model_with_broken_embeddings_ends_with_one_error_and_skips_nothing(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = save_broken(tmp_path / "broken", "visual_projection")
    (pictures / "00.png").write_bytes(b"no image")
    command = ["index", pictures, "--model", broken, "--output-dir", tmp_path / "index", "--batch-size", 4]
    assert cli.main([*map(str, command), "--num-workers", "0"]) == 2
    message = capsys.readouterr().err
    assert "3 of 3 images are NaN or infinite: 03.png, 06.png, 09.png. A model gives such values" in message
    assert "skipped" not in message
    assert not (tmp_path / "index").exists()
