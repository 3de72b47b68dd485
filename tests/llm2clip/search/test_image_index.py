"""The index on disk: what it may replace, how a damaged one is repaired, and the recorded versions."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import faiss
import pytest

from llm2clip.search.image_index import ImageIndex
from modeling_llm2clip import LLM2CLIPModel, __version__

from .conftest import content, index

Model = tuple[Path, LLM2CLIPModel]


def test_a_folder_with_a_manifest_of_another_kind_is_not_replaced(
    pictures: Path, model: Model, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "manifest.json").write_text("{}")  # a caption cache has one of this name
    with pytest.raises(FileExistsError, match="llm2clip index did not write it"):
        index(pictures, model[0], cache, overwrite=True)


@pytest.mark.parametrize(
    ("name", "overwrite"),
    [("index.faiss", False), ("failures.json", False), ("manifest.json", True), ("data-00000-of-00001.arrow", True)],
)
@pytest.mark.parametrize("damage", ["cut", "deleted"])
def test_a_damaged_index_is_repaired_as_its_error_message_says(
    name: str, overwrite: bool, damage: str, pictures: Path, model: Model, tmp_path: Path
) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output)
    before = content(output)
    if damage == "deleted":
        (output / name).unlink()
    else:
        (output / name).write_bytes((output / name).read_bytes()[:40])
    if name != "failures.json":  # searching does not need it
        with pytest.raises((ValueError, FileNotFoundError), match="--overwrite" if overwrite else "index again"):
            ImageIndex.open(output)
    assert index(pictures, model[0], output, overwrite=overwrite)[-1] == 12
    assert content(output) == before
    ImageIndex.open(output)


def test_the_faiss_version_does_not_depend_on_the_distribution_name(
    pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if "faiss" in name or name == "llm2clip":
            raise importlib.metadata.PackageNotFoundError(name)
        return importlib.metadata.version(name)

    monkeypatch.setattr("llm2clip.search.image_index.version", version)
    index(pictures, model[0], tmp_path / "index")
    versions = json.loads((tmp_path / "index" / "manifest.json").read_text())["versions"]
    assert (versions["faiss"], versions["llm2clip"]) == (faiss.__version__, __version__)
