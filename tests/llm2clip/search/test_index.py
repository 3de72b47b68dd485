"""Indexing: which files are indexed, which are skipped and why, updates, and killed runs."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import datasets
import faiss
import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip import cli
from llm2clip.data import decode_image
from llm2clip.embedding.image_embedder import ImageEmbedder
from llm2clip.search.image_index import ImageIndex
from llm2clip.search.index import IndexConfig, run
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPVisionModelWithProjection
from tests.modeling_llm2clip import tiny

from .conftest import content, encoded, header_bomb, index, picture, save_broken

Model = tuple[Path, LLM2CLIPModel]


def embeddings(output: Path) -> dict[str, np.ndarray]:
    rows = datasets.load_from_disk(str(output)).with_format("numpy", dtype=np.float16)
    return dict(zip(rows["key"], rows["embedding"], strict=True))


def test_a_folder_is_indexed_as_unit_embeddings_by_relative_path(pictures: Path, model: Model, tmp_path: Path) -> None:
    (pictures / ".hidden.png").write_bytes(encoded(picture(1)))
    assert index(pictures, model[0], tmp_path / "index", dtype="float32") == (12, 0, 0, 0, 12)
    rows = datasets.load_from_disk(str(tmp_path / "index"))
    assert rows.features["embedding"] == datasets.List(datasets.Value("float32"), length=24)
    files = [pictures / key for key in rows["key"]]
    assert sorted(files) == sorted(pictures.rglob("[0-9]*.png"))
    assert rows["size"][:] == [file.stat().st_size for file in files]
    assert rows["mtime_ns"][:] == [file.stat().st_mtime_ns for file in files]
    expected = model[1].encode_image([str(file) for file in files], tiny.processor())
    actual = torch.tensor(rows["embedding"][:])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert (manifest["model"], manifest["width"], manifest["images"]) == (str(model[0]), 24, 12)
    assert not (tmp_path / "index.unfinished").exists()


def test_datasets_can_load_and_search_the_index(pictures: Path, model: Model, tmp_path: Path) -> None:
    index(pictures, model[0], tmp_path / "index")
    rows = datasets.load_from_disk(str(tmp_path / "index"))
    rows.load_faiss_index("embedding", str(tmp_path / "index" / "index.faiss"))
    query = np.asarray(rows[7]["embedding"], dtype=np.float32)
    assert rows.get_nearest_examples("embedding", query, k=1).examples["key"] == [rows[7]["key"]]


def test_worker_processes_do_not_change_the_index(pictures: Path, model: Model, tmp_path: Path) -> None:
    index(pictures, model[0], tmp_path / "none")
    index(pictures, model[0], tmp_path / "two", num_workers=2)
    assert content(tmp_path / "none") == content(tmp_path / "two")


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


def test_only_new_and_changed_images_are_embedded(pictures: Path, model: Model, tmp_path: Path) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output)
    before = embeddings(output)
    assert index(pictures, model[0], output) == (0, 12, 0, 0, 12)
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    assert index(pictures, model[0], output) == (1, 12, 0, 0, 13)
    (pictures / "new.png").write_bytes(encoded(picture(51)))
    os.utime(pictures / "new.png", ns=(1, 1))
    (pictures / "00.png").unlink()
    assert index(pictures, model[0], output) == (1, 11, 1, 0, 12)
    after = embeddings(output)
    assert set(after) == (set(before) | {"new.png"}) - {"00.png"}
    assert all((after[key] == before[key]).all() for key in after if key != "new.png")
    shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
    index(pictures, model[0], tmp_path / "fresh")
    np.testing.assert_allclose(after["new.png"], embeddings(tmp_path / "fresh")["new.png"], atol=1e-3)
    opened = ImageIndex.open(output)
    found = opened.search(after["new.png"][None].astype(np.float32), top=1)
    assert found[0][0][1]["key"] == "new.png"


def test_a_run_without_changes_does_not_rewrite_the_index(pictures: Path, model: Model, tmp_path: Path) -> None:
    index(pictures, model[0], tmp_path / "index")
    written = (tmp_path / "index" / "index.faiss").stat().st_mtime_ns
    index(pictures, model[0], tmp_path / "index")
    assert (tmp_path / "index" / "index.faiss").stat().st_mtime_ns == written


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


def test_a_killed_run_is_resumed_with_an_equal_result(
    pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pictures / "02 broken.png").write_bytes(b"broken")
    index(pictures, model[0], tmp_path / "whole", part_size=4)
    embedded: list[int] = []
    forward = ImageEmbedder._forward

    def killed(self: ImageEmbedder, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(embedded) == 2:
            raise KeyboardInterrupt
        embedded.append(len(inputs["pixel_values"]))
        return forward(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(ImageEmbedder, "_forward", killed)
        with pytest.raises(KeyboardInterrupt):
            index(pictures, model[0], tmp_path / "index", part_size=4)
    assert not (tmp_path / "index").exists()
    assert len(list((tmp_path / "index.unfinished").glob("part-*"))) == 2
    # Half of a part, as a process killed while writing leaves it.
    (tmp_path / "index.unfinished" / "part-000002.tmp").write_bytes(b"half")
    again: list[int] = []

    def counted(self: ImageEmbedder, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        again.append(len(inputs["pixel_values"]))
        return forward(self, inputs)

    monkeypatch.setattr(ImageEmbedder, "_forward", counted)
    assert index(pictures, model[0], tmp_path / "index", part_size=4) == (12, 0, 0, 1, 12)
    assert sum(embedded) + sum(again) == 12
    assert content(tmp_path / "index") == content(tmp_path / "whole")
    assert not (tmp_path / "index.unfinished").exists()


def test_a_failed_update_leaves_the_index_unchanged(
    pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(pictures, model[0], tmp_path / "index")
    before = content(tmp_path / "index")
    (pictures / "new.png").write_bytes(encoded(picture(50)))

    def full(*arguments: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(faiss, "write_index", full)
        with pytest.raises(OSError, match="no space"):
            index(pictures, model[0], tmp_path / "index")
    assert content(tmp_path / "index") == before
    assert index(pictures, model[0], tmp_path / "index") == (1, 12, 0, 0, 13)


def test_rows_of_a_data_set_are_identified_by_content(model: Model, tmp_path: Path) -> None:
    def save(seeds: list[int]) -> None:
        rows = {"image": [{"bytes": encoded(picture(seed)), "path": None} for seed in seeds]}
        rows["caption"] = [f"number {seed}" for seed in seeds]
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")

    save([1, 2, 3, 4, 5, 5])
    output = tmp_path / "index"
    assert index(tmp_path / "data.parquet", model[0], output) == (6, 0, 0, 0, 6)
    # Moved, removed, added.
    save([9, 5, 4, 3, 1])
    assert index(tmp_path / "data.parquet", model[0], output) == (1, 4, 1, 0, 5)
    rows = datasets.load_from_disk(str(output))
    assert (rows["row"][:], rows["caption"][1]) == ([0, 1, 2, 3, 4], "number 5")
    expected = model[1].encode_image([picture(seed) for seed in (9, 5, 4, 3, 1)], tiny.processor())
    torch.testing.assert_close(torch.tensor(rows["embedding"][:]), expected, atol=1e-3, rtol=0)


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
    rows = datasets.load_from_disk(str(tmp_path / "of_shards"))
    assert (rows["key"][4], rows["caption"][4]) == ("1-1", "a caption")
    assert index(shards, model[0], tmp_path / "of_folder")[0] == 6
    saved = {"image": [picture(seed) for seed in range(4)]}
    datasets.Dataset.from_dict(saved).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    assert index(tmp_path / "saved", model[0], tmp_path / "of_saved") == (4, 0, 0, 0, 4)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"index_type": "ivf", "ivf_cells": 3, "ivf_probes": 2}, faiss.IndexIVFFlat),
        ({"index_type": "hnsw", "hnsw_links": 8, "hnsw_search": 20}, faiss.IndexHNSWFlat),
    ],
)
def test_approximate_indexes_reuse_the_embeddings(
    settings: dict[str, Any], kind: type, pictures: Path, model: Model, tmp_path: Path
) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output)
    # The embeddings are kept; only the faiss index is built again.
    assert index(pictures, model[0], output, **settings) == (0, 12, 0, 0, 12)
    opened = ImageIndex.open(output)
    vectors = faiss.downcast_index(opened.vectors)
    assert isinstance(vectors, kind)
    assert vectors.nprobe == 2 if kind is faiss.IndexIVFFlat else vectors.hnsw.efSearch == 20
    for key, embed in embeddings(output).items():
        assert opened.search(embed[None].astype(np.float32), top=1)[0][0][1]["key"] == key
    if kind is faiss.IndexIVFFlat:
        with pytest.raises(ValueError, match="99 cells needs at least 99 images, but there are 12"):
            index(pictures, model[0], output, index_type="ivf", ivf_cells=99)


def test_the_vision_half_updates_an_index_of_the_whole_model(pictures: Path, model: Model, tmp_path: Path) -> None:
    half = tmp_path / "half"
    LLM2CLIPVisionModelWithProjection.from_pretrained(model[0]).save_pretrained(half)
    tiny.processor().image_processor.save_pretrained(half)
    index(pictures, model[0], tmp_path / "whole")
    # Built with one and updated with the other.
    assert index(pictures, half, tmp_path / "whole")[:2] == (0, 12)


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
    assert not (tmp_path / "index.unfinished").exists()
    assert index(pictures, tmp_path / "other", output, overwrite=True)[0] == 12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), "there are no files in"),
        (lambda folder: None, "There is no file or folder"),
        (lambda folder: (folder.mkdir(), (folder / "a.txt").write_text("words")), "none of the 1 files or rows"),
    ],
)
def test_a_source_without_images_is_an_error(make: Any, message: str, model: Model, tmp_path: Path) -> None:
    make(tmp_path / "source")
    with pytest.raises((ValueError, OSError), match=message):
        index(tmp_path / "source", model[0], tmp_path / "index")
    assert not (tmp_path / "index").exists()
    assert not (tmp_path / "index.unfinished").exists()


def test_a_folder_of_other_files_is_not_replaced(pictures: Path, model: Model, tmp_path: Path) -> None:
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="llm2clip index did not write it"):
            index(pictures, model[0], pictures / "a", overwrite=overwrite)
    with pytest.raises(NotADirectoryError, match="is a file"):
        index(pictures, model[0], pictures / "00.png")
    assert len(list(pictures.rglob("*.png"))) == 12


def test_an_index_inside_the_image_folder_is_excluded(pictures: Path, model: Model) -> None:
    assert index(pictures, model[0], pictures / "index") == (12, 0, 0, 0, 12)
    assert index(pictures, model[0], pictures / "index") == (0, 12, 0, 0, 12)


def test_a_second_concurrent_run_is_refused(
    pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(*arguments: Any) -> Any:
        with pytest.raises(ValueError, match="another process is updating the index"):
            index(pictures, model[0], tmp_path / "index")
        raise KeyboardInterrupt

    forward = ImageEmbedder._forward
    monkeypatch.setattr(ImageEmbedder, "_forward", second)
    with pytest.raises(KeyboardInterrupt):
        index(pictures, model[0], tmp_path / "index")
    monkeypatch.setattr(ImageEmbedder, "_forward", forward)
    assert index(pictures, model[0], tmp_path / "index")[0] == 12


def test_a_plain_clip_is_refused(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_vision(tmp_path / "plain")
    assert cli.main(["index", str(pictures), "--model", str(tmp_path / "plain")]) == 2
    assert "is not an LLM2CLIP model" in capsys.readouterr().err


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
    assert not (tmp_path / "index.unfinished").exists()
