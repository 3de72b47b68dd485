"""The lists of a folder's files: what has changed, and who has which checksum."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm2clip.encoders import OurEncoder
from llm2clip.utils.files import read_json, sha256
from llm2clip.utils.manifests import (
    FOLDER_MANIFEST,
    MANIFEST_CHECKSUM,
    MODEL_MANIFEST,
    damage,
    faults,
    fits_checksum,
    folder_files,
    foreign_files,
    listed_files,
    refuse_changed_model,
    refuse_damaged,
    with_checksum,
    write_manifest,
    write_model_manifest,
)
from tests.damage import flip
from tests.modeling_llm2clip import tiny


def model(folder: Path) -> Path:
    for name in ("model.safetensors", "modeling.py", "config.json", "README.md", "LICENSE", "1_Normalize/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    return folder


def test_a_flipped_bit_of_any_file_is_found_and_named(tmp_path: Path) -> None:
    write_manifest(model(tmp_path), "merge")
    assert damage(tmp_path, contents=True) is None
    for name in ("model.safetensors", "modeling.py", "config.json", "1_Normalize/config.json"):
        with flip(tmp_path / name):
            assert damage(tmp_path) is None  # its size is the same
            assert list(faults(tmp_path)) == [f"{name} has changed: its checksum is not that in {FOLDER_MANIFEST}"]
            with pytest.raises(
                ValueError, match=f"is not what was written .{name} has changed.*delete .llm2clip.json"
            ):
                refuse_damaged(tmp_path)
    refuse_damaged(tmp_path)
    refuse_damaged("someone/model")
    (tmp_path / "README.md").write_text("what people write")
    (tmp_path / "LICENSE").unlink()
    assert list(faults(tmp_path)) == []


def test_damage_is_found_by_the_sizes_in_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    weights = tmp_path / "part" / "weights"
    weights.write_bytes(b"1234")
    assert "written last" in str(damage(tmp_path))
    write_manifest(tmp_path, "stage1")
    assert damage(tmp_path) is None
    weights.write_bytes(b"12")
    assert damage(tmp_path) == "part/weights has 2 bytes instead of 4"
    weights.unlink()
    assert damage(tmp_path) == "part/weights is missing"
    (tmp_path / FOLDER_MANIFEST).write_bytes(b"")
    assert "is not valid JSON" in str(damage(tmp_path))


def test_a_changed_model_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path)
    (tmp_path / "curves.png").touch()
    refuse_changed_model(tmp_path)  # not written by a command
    refuse_changed_model("hub/name")
    write_manifest(tmp_path, "stage2")
    (tmp_path / "curves.png").unlink()
    OurEncoder.load(str(tmp_path))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        for load in (OurEncoder.load, OurEncoder.load):
            with (
                flip(tmp_path / name),
                pytest.raises(ValueError, match=rf"is not what was written \({name} has changed"),
            ):
                load(str(tmp_path))
    OurEncoder.load(str(tmp_path))
    monkeypatch.setattr("llm2clip.utils.shared_files.sha256", None)  # each file is read once
    OurEncoder.load(str(tmp_path))


def test_a_list_that_was_written_at_a_url_has_sizes_alone(tmp_path: Path) -> None:
    write_manifest(model(tmp_path), "build")
    fields = read_json(tmp_path / FOLDER_MANIFEST)
    del fields["sha256"], fields[MANIFEST_CHECKSUM]
    (tmp_path / FOLDER_MANIFEST).write_text(json.dumps(with_checksum(fields)))
    with flip(tmp_path / "config.json"):
        assert damage(tmp_path, contents=True) is None
    (tmp_path / "config.json").write_text("cut")
    assert damage(tmp_path, contents=True) == "config.json has 3 bytes instead of 22"
    assert foreign_files(tmp_path, "build") == []


def test_a_checksum_is_in_one_of_two_lists(tmp_path: Path) -> None:
    write_model_manifest(model(tmp_path), folder_files(tmp_path))
    write_manifest(tmp_path, "build")
    travels, stays = (read_json(tmp_path / name) for name in (MODEL_MANIFEST, FOLDER_MANIFEST))
    assert travels["files"] == {
        name: sha256(tmp_path / name)
        for name in ("1_Normalize/config.json", "config.json", "model.safetensors", "modeling.py")
    }
    assert set(stays["sha256"]) == {MODEL_MANIFEST}
    assert set(stays["files"]) == {*travels["files"], MODEL_MANIFEST, "README.md", "LICENSE"}
    assert {listed.checksum for listed in listed_files(tmp_path).values()} == {
        *travels["files"].values(),
        sha256(tmp_path / MODEL_MANIFEST),
        None,
    }
    with flip(tmp_path / MODEL_MANIFEST):
        assert list(faults(tmp_path))
    (tmp_path / FOLDER_MANIFEST).unlink()  # as on another machine
    assert list(faults(tmp_path)) == []
    with flip(tmp_path / "modeling.py"):
        assert list(faults(tmp_path)) == [f"modeling.py has changed: its checksum is not that in {MODEL_MANIFEST}"]


def test_what_was_not_written_again_keeps_its_checksum(tmp_path: Path) -> None:
    write_manifest(model(tmp_path), "index")
    changed = tmp_path / "config.json"
    for name in ("config.json", "modeling.py"):
        (tmp_path / name).write_text("other")
    write_manifest(tmp_path, "index", rewritten={"config.json"})
    assert listed_files(tmp_path)["config.json"].checksum == sha256(changed)
    assert list(faults(tmp_path)) == ["modeling.py has 5 bytes instead of 22"]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "part/../../outside"])
@pytest.mark.parametrize("manifest", [FOLDER_MANIFEST, MODEL_MANIFEST])
def test_a_list_that_leaves_its_folder_is_refused(name: str, manifest: str, tmp_path: Path) -> None:
    write_model_manifest(model(tmp_path), folder_files(tmp_path))
    write_manifest(tmp_path, "build")
    fields = read_json(tmp_path / manifest)
    fields["files"][name] = 1
    if fields.pop(MANIFEST_CHECKSUM, None):  # which whoever writes such a list can compute
        fields = with_checksum(fields)
    (tmp_path / manifest).write_text(json.dumps(fields))
    assert "is outside of the folder" in next(faults(tmp_path))


def test_a_changed_list_is_blamed_and_not_the_files(tmp_path: Path) -> None:
    write_manifest(model(tmp_path), "build")
    path = tmp_path / FOLDER_MANIFEST
    checksum = read_json(path)["sha256"]["config.json"]
    path.write_text(path.read_text().replace(checksum, checksum[::-1]))
    assert list(faults(tmp_path)) == [f"{FOLDER_MANIFEST} has changed since it was written"]


def test_the_fields_of_a_manifest_are_sealed() -> None:
    fields = {"name": "über", "shards": [1, 2], "share": 0.1}
    written = json.loads(json.dumps(with_checksum(fields)))
    assert fits_checksum(written)
    assert not fits_checksum(fields)
    assert not fits_checksum({**written, "share": 0.2})
    assert not fits_checksum({**written, "more": 1})
