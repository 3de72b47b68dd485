"""The list of a folder's files: what has changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llm2clip.encoders import OurEncoder
from llm2clip.files.atomic import read_json, sha256
from llm2clip.files.manifests import (
    FOLDER_MANIFEST,
    MANIFEST_CHECKSUM,
    damage,
    faults,
    folder_files,
    own_files,
    refuse_damaged,
    with_checksum,
    write_manifest,
)
from tests.builders import students, tiny
from tests.damage import flip


def model(folder: Path) -> Path:
    for name in ("model.safetensors", "modeling.py", "config.json", "README.md", "LICENSE", "1_Normalize/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    return folder


def test_a_flipped_bit_of_any_file_is_found_and_named(tmp_path: Path) -> None:
    assert "written last" in str(damage(model(tmp_path)))
    write_manifest(tmp_path, "merge")
    for name in ("model.safetensors", "modeling.py", "config.json", "1_Normalize/config.json"):
        with flip(tmp_path / name):
            assert damage(tmp_path) is None  # its size is the same
            assert list(faults(tmp_path)) == [f"{name} has changed: its checksum is not that in {FOLDER_MANIFEST}"]
            with pytest.raises(ValueError, match=rf"{name} .*\.llm2clip\.json"):
                refuse_damaged(tmp_path)
    (tmp_path / "README.md").write_text("what people write")
    (tmp_path / "LICENSE").unlink()
    refuse_damaged(tmp_path)
    (tmp_path / "modeling.py").write_bytes(b"12")
    assert damage(tmp_path) == "modeling.py has 2 bytes instead of 22"
    (tmp_path / "modeling.py").unlink()
    assert damage(tmp_path) == "modeling.py is missing"
    (tmp_path / FOLDER_MANIFEST).write_bytes(b"")
    assert "is not valid JSON" in str(damage(tmp_path))


def test_a_changed_model_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path)
    OurEncoder.load(str(tmp_path))  # not written by a command
    write_manifest(tmp_path, "stage2")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        with flip(tmp_path / name), pytest.raises(ValueError, match=rf"\({name} "):
            OurEncoder.load(str(tmp_path))
    OurEncoder.load(str(tmp_path))
    monkeypatch.setattr("llm2clip.files.shared_files.sha256", None)  # each file is read once
    OurEncoder.load(str(tmp_path))


def test_a_changed_llm_or_query_encoder_is_not_loaded(tmp_path: Path) -> None:
    tiny.save_apart(tmp_path)
    write_manifest(tmp_path / "llm", "stage1")
    OurEncoder.load(str(tmp_path / "clip"))
    refused = pytest.raises(ValueError, match=r"llm .*\(model\.safetensors ")
    with flip(tmp_path / "llm" / "model.safetensors"), refused:
        OurEncoder.load(str(tmp_path / "clip"))
    tiny.save(tmp_path / "whole")
    students.add_query_encoder(tmp_path / "whole")
    write_manifest(tmp_path / "whole", "build")
    refused = pytest.raises(ValueError, match=r"\(query_encoder/model\.safetensors ")
    with flip(tmp_path / "whole" / "query_encoder" / "model.safetensors"), refused:
        OurEncoder.load(str(tmp_path / "whole"))


def test_a_list_that_was_written_at_a_url_has_sizes_alone(tmp_path: Path) -> None:
    write_manifest(model(tmp_path), "build")
    fields = read_json(tmp_path / FOLDER_MANIFEST)
    del fields["sha256"], fields[MANIFEST_CHECKSUM]
    (tmp_path / FOLDER_MANIFEST).write_text(json.dumps(with_checksum(fields)))
    with flip(tmp_path / "config.json"):
        assert damage(tmp_path, contents=True) is None
    (tmp_path / "config.json").write_text("cut")
    assert damage(tmp_path, contents=True) == "config.json has 3 bytes instead of 22"
    assert sorted(own_files(tmp_path, "build") or ()) == folder_files(tmp_path)


def test_what_people_edit_has_no_checksum(tmp_path: Path) -> None:
    (model(tmp_path) / "example.PNG").write_text("a picture of the card")
    write_manifest(tmp_path, "build")
    listed = read_json(tmp_path / FOLDER_MANIFEST)
    names = ("1_Normalize/config.json", "config.json", "model.safetensors", "modeling.py")
    assert listed["sha256"] == {name: sha256(tmp_path / name) for name in names}
    assert set(listed["files"]) == {*names, "README.md", "LICENSE", "example.PNG"}
    for name in ("README.md", "LICENSE", "example.PNG"):
        (tmp_path / name).unlink()
    assert list(faults(tmp_path)) == []


@pytest.mark.parametrize("name", ["/etc/passwd", "part/../../outside"])
def test_a_list_that_leaves_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    write_manifest(model(tmp_path), "build")
    fields = read_json(tmp_path / FOLDER_MANIFEST)
    fields["files"][name] = 1
    del fields[MANIFEST_CHECKSUM]  # which whoever writes such a list can compute
    (tmp_path / FOLDER_MANIFEST).write_text(json.dumps(with_checksum(fields)))
    assert "is outside of the folder" in next(faults(tmp_path))


def test_a_changed_list_is_blamed_and_not_the_files(tmp_path: Path) -> None:
    write_manifest(model(tmp_path), "build")
    path = tmp_path / FOLDER_MANIFEST
    checksum = read_json(path)["sha256"]["config.json"]
    path.write_text(path.read_text().replace(checksum, checksum[::-1]))
    [fault] = faults(tmp_path)
    assert f"{FOLDER_MANIFEST} has changed since it was written" in fault


@pytest.mark.skipif(os.name != "posix", reason="needs modes of files")
@pytest.mark.parametrize(("umask", "mode"), [(0o027, 0o640), (0o077, 0o600)])
def test_weights_are_readable_by_whom_the_umask_lets_read(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        write_manifest(tmp_path, "stage2")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ("model.safetensors", "config.json", FOLDER_MANIFEST), mode
    )
