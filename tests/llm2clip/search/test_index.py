"""Indexing: which files and rows are indexed, which are skipped and why, and what an index stores of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from llm2clip.search.index import IndexConfig, run
from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.search_index import SearchIndex
from modeling_llm2clip import LLM2CLIPModel
from tests.builders import tiny
from tests.builders.early_errors import assert_found_early
from tests.tars import write_tar

from .helpers import QUERY, Model, as_json, encoded, error, index, picture, rows, save_broken, save_table
from .places import content


def test_a_folder_is_indexed_as_unit_embeddings_by_relative_path(pictures: Path, model: Model, tmp_path: Path) -> None:
    (pictures / ".hidden.png").write_bytes(encoded(picture(1)))
    assert index(pictures, model[0], tmp_path / "index", stored_dtype="float32") == (12, 0, 0, 0, 12)
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
    index(pictures, model[0], tmp_path / "exact")
    assert not decoded_to_tensors
    index(pictures, model[0], tmp_path / "fast", image_backend="fast")
    assert decoded_to_tensors
    with pytest.raises(ValueError, match="was built with image_backend fast, not exact"):
        index(pictures, model[0], tmp_path / "fast")
    assert SearchIndex.open(tmp_path / "fast").update()["kept"] == 12


def test_the_model_computes_in_the_type_that_is_asked_for(
    pictures: Path, model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any, monkeypatch: Any
) -> None:
    shutil.copytree(model[0], tmp_path / "half")
    LLM2CLIPModel.from_pretrained(model[0]).half().save_pretrained(tmp_path / "half")
    used = {}
    for dtype, backend in (("auto", "exact"), ("auto", "fast"), ("bfloat16", "exact")):
        folder = tmp_path / f"{dtype}_{backend}"
        index(pictures, tmp_path / "half", folder, dtype=dtype, image_backend=backend)
        used[folder.name] = SearchIndex.open(folder).manifest.identity["dtype"]
    # float16, the type of the files, is slow on a CPU.
    assert used == {"auto_exact": "float32", "auto_fast": "float32", "bfloat16_exact": "bfloat16"}
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    with caplog.at_level("WARNING"):
        assert index(pictures, tmp_path / "half", tmp_path / "bfloat16_exact") == (1, 12, 0, 0, 13)
    assert "was computed in bfloat16, and new rows are in float32" in caplog.text
    opened: list[str] = []
    require = IndexManifest.require_model
    monkeypatch.setattr(IndexManifest, "require_model", lambda *call: opened.append(call[2].dtype) or require(*call))
    assert as_json(capsys, tmp_path / "auto_fast", "a dog", "--dtype", "bfloat16")
    assert opened == ["bfloat16"]


def test_unusable_files_are_skipped_and_listed_with_the_reason(
    pictures: Path, model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {
        "empty.png": (b"", "zero bytes"),
        "notes.txt": (b"these are words", "does not recognize its format"),
        "cut.png": (encoded(picture(3))[:60], ""),
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
        assert index(pictures, model[0], output, max_pixels=80_000) == (12, 0, 0, 9, 12)
    failures = {entry["key"]: entry["reason"] for entry in SearchIndex.open(output).manifest.failures}
    expected = {name: reason for name, (_, reason) in bad.items()}
    expected |= {"gone.png": "No such file", "pipe.png": "not a regular file", "?.png": "not valid UTF-8"}
    expected["linked"] = "link to a folder, and links are not followed"
    assert set(failures) == set(expected)
    for name, reason in expected.items():
        assert reason in failures[name]
        assert f"{name}: " in caplog.text
    # A repaired file is indexed.
    (pictures / "empty.png").write_bytes(encoded(picture(60)))
    assert index(pictures, model[0], output, max_pixels=80_000) == (1, 12, 0, 8, 13)


def test_webdataset_shards_and_saved_data_sets_are_indexed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "shards"
    for shard in range(2):
        keys = [f"{shard}-{number}" for number in range(3)]
        images = [(f"{key}.png", encoded(picture(number + 3 * shard))) for number, key in enumerate(keys)]
        texts = [(f"{key}.txt", b"a caption") for key in keys]
        write_tar(shards / f"{shard}.tar", [member for pair in zip(images, texts, strict=True) for member in pair])
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


def test_a_row_whose_metadata_changed_keeps_its_embedding(model: Model, tmp_path: Path) -> None:
    columns = {"source": ["noto", "other", "noto", "other"], "id": [5, 6, 7, 8]}
    path = save_table(tmp_path / "data.parquet", [1, 2, 3, 4], **columns)
    settings = {"metadata_columns": list(columns)}
    assert index(path, model[0], tmp_path / "index", **settings)[0] == 4
    where = "source = 'noto' AND id > 5"
    assert [row.key for row in SearchIndex.open(tmp_path / "index").search(QUERY, 10, where)[0]] == ["2"]
    save_table(path, [1, 2, 3, 4], **(columns | {"source": ["noto"] * 4}))
    assert index(path, model[0], tmp_path / "index", **settings) == (0, 4, 0, 0, 4)
    assert len(SearchIndex.open(tmp_path / "index").search(QUERY, 10, where)[0]) == 3
    assert index(path, model[0], tmp_path / "index", metadata_columns=["source"]) == (0, 4, 0, 0, 4)
    assert SearchIndex.open(tmp_path / "index").search(QUERY, 1)[0][0].metadata == {"source": "noto"}


def test_metadata_columns_that_cannot_be_stored_are_refused(pictures: Path, model: Model, tmp_path: Path) -> None:
    path = save_table(tmp_path / "data.parquet", [1], tags=[["a", "b"]], row=[1])
    for column, reason in (("tags", "holds list"), ("row", "has a name that the index needs"), ("licence", "")):
        with pytest.raises(ValueError, match=f"{column}.*{reason}"):
            index(path, model[0], tmp_path / "index", metadata_columns=[column])
    for name in ("metadata_columns", "caption_columns"):
        with pytest.raises(ValueError, match=rf"{name} is .*licence.*, but .* is a folder of image files"):
            index(pictures, model[0], tmp_path / "index", **{name: ["licence"]})
    with pytest.raises(ValueError, match=r"split is test, but .* is a folder of image files"):
        index(pictures, model[0], tmp_path / "index", split="test")


def test_a_model_with_broken_embeddings_ends_with_one_error_and_skips_nothing(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = save_broken(tmp_path / "broken", "visual_projection")
    (pictures / "00.png").write_bytes(b"no image")
    command = ["index", pictures, "--model", broken, "--output-dir", tmp_path / "index"]
    message = error(capsys, *command, "--batch-size", 4, "--num-workers", 0)
    assert "3 of 3 images are NaN or infinite: 03.png, 06.png, 09.png. A model gives such values" in message
    assert "skipped" not in message
    assert not (tmp_path / "index").exists()


def test_other_models_sources_and_settings_are_refused(
    indexed: Path, pictures: Path, model: Model, tmp_path: Path
) -> None:
    changed = LLM2CLIPModel.from_pretrained(model[0])
    with torch.no_grad():
        weight = changed.vision_model.blocks[0].mlp.w1.weight
        weight.view(-1)[1] += 1
    changed.save_pretrained(tmp_path / "weight")
    tiny.processor().save_pretrained(tmp_path / "weight")
    shutil.copytree(model[0], tmp_path / "processor")
    processor = tiny.processor()
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    processor.save_pretrained(tmp_path / "processor")
    for name in ("weight", "processor"):
        with pytest.raises(ValueError, match=rf"{tmp_path / name} .*other weights"):
            index(pictures, tmp_path / name, indexed)
    tiny.save(tmp_path / "wide", projection_dim=40)
    with pytest.raises(ValueError, match=r"wide have 40 values, .* add --truncate-dim 24"):
        index(pictures, tmp_path / "wide", indexed)
    with pytest.raises(ValueError, match="was built with source kind folder"):
        index(pictures / "a", model[0], indexed)
    with pytest.raises(ValueError, match="was built with stored_dtype float16, not float32"):
        index(pictures, model[0], indexed, stored_dtype="float32")
    with pytest.raises(ValueError, match="99 cells needs at least 99 images, but there are 12"):
        index(pictures, model[0], indexed, index_type="ivf_rq", cells=99)
    assert index(pictures, tmp_path / "weight", indexed, overwrite=True)[0] == 12


def test_mistakes_in_names_are_found_before_anything_large_is_imported(tmp_path: Path, indexed: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "manifest.json").write_text('{"model": "/no/mine.py:load"}')
    mistakes = {
        "no file or folder nowhere": ["index", "nowhere", "--model", "a/b"],
        "no model ./no/model": ["index", "folder", "--model", "./no/model"],
        "the file no.py does not exist": ["index", "folder", "--model", "no.py:load"],
        "the model is": ["index", "nowhere/*/", "--model", ""],
        "did you mean 'index'? To create one: llm2clip index": ["search", "indexs", "a dog"],
        "(no manifest.json). If these are the images": ["search", "folder", "a dog"],
        "the query is missing": ["search", "index"],
        "there is no image file no.png": ["search", "index", "--image", "no.png"],
        "there is no model ./no/such": ["search", "index", "a dog", "--model", "./no/such"],
        "the model in /no/mine.py:load, which no longer exists; give its new place": ["search", "moved", "a dog"],
        "html is the folder folder; give a file in it": ["search", "index", "a dog", "--html", "folder"],
        "top must be at least 1": ["search", "index", "a dog", "--top", "0"],
    }
    assert_found_early(mistakes, tmp_path, "numpy", "rich")


def test_a_source_without_images_is_an_error_and_leaves_nothing(model: Model, tmp_path: Path) -> None:
    source = tmp_path / "source"
    with pytest.raises(OSError, match="there is no file or folder"):
        index(source, model[0], tmp_path / "index")
    source.mkdir()
    with pytest.raises(OSError, match="there are no files in"):
        index(source, model[0], tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_a_folder_with_a_manifest_of_others_and_a_file_are_not_replaced(pictures: Path, model: Model) -> None:
    (pictures / "a" / "manifest.json").write_text("{}")  # a built model has one of this name
    with pytest.raises(FileExistsError, match="llm2clip index did not write it"):
        index(pictures, model[0], pictures / "a", overwrite=True)
    with pytest.raises(NotADirectoryError, match="is a file"):
        index(pictures, model[0], pictures / "00.png")
    assert len(list(pictures.rglob("*.png"))) == 12


@pytest.mark.parametrize("theirs", ["rows.csv", "rows/data.csv", "listing.txt"])
def test_files_of_others_with_names_like_those_of_an_index_stay(theirs: str, model: Model, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("words")
    file = tmp_path / "place" / theirs
    file.parent.mkdir(parents=True)
    file.write_text("theirs")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="llm2clip index did not write it"):
            index(tmp_path / "texts", model[0], tmp_path / "place", overwrite=overwrite)
    with pytest.raises(ValueError, match="none of the 1 files"):
        index(tmp_path / "texts", model[0], tmp_path / "texts" / "index")
    assert file.read_text() == "theirs"
    assert [path.name for path in (tmp_path / "texts").iterdir()] == ["a.txt"]


def test_an_index_and_captions_inside_the_image_folder_are_no_images(pictures: Path, model: Model) -> None:
    (pictures / "a" / "metadata.jsonl").write_text('{"file_name": "07.png", "caption": "noise"}\n')
    assert index(pictures, model[0], pictures / "index") == (12, 0, 0, 0, 12)
    assert index(pictures, model[0], pictures / "index") == (0, 12, 0, 0, 12)


POSTGRES = {"postgres": "postgresql:///images"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"table": "index"}, "no database is given: add --postgres URL"),
        ({"index_type": "hnsw"}, "such an index has one of auto, flat, ivf_rq"),
        ({"rows_dir": "rows"}, "rows_dir is rows"),
        ({"index_type": "flat", "cells": 7}, "an index of the type flat does not use it"),
        ({"ef_search": 50}, "an index of the type ivf_rq does not use it"),
        ({**POSTGRES, "output_dir": "index"}, "output_dir is index"),
        ({**POSTGRES, "index_type": "ivf_rq"}, "one of auto, flat, hnsw"),
        ({**POSTGRES, "refine": 3}, "refine is 3, but an index of the type hnsw does not use it"),
        ({**POSTGRES, "ef_search": 1001}, "ef_search up to 1000"),
        ({"caption_columns": ["caption", "long"]}, "add --embed caption"),
        ({"embed": "caption", "kind": "folder"}, "kind is folder"),
        ({"embed": "caption", "image_backend": "fast"}, "image_backend is fast"),
        ({"embed": "caption", "num_workers": 2}, "num_workers is 2"),
        ({"embed": "text"}, "embed is 'text'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndexConfig(folder="pictures", model="model", **settings)
