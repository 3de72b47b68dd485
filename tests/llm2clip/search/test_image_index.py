"""The index on disk: what it may replace, how a damaged one is repaired, and the recorded versions."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import faiss
import pytest
import torch

from llm2clip.search.image_index import ImageIndex
from llm2clip.utils.vision_identity import earlier_vision_fingerprint
from modeling_llm2clip import LLM2CLIPModel, __version__
from tests.modeling_llm2clip import tiny

from .conftest import content, encoded, index, picture

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


def record(folder: Path, fingerprint: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vision_fingerprint": fingerprint}))


def test_an_index_refuses_a_change_of_one_weight_and_of_the_preprocessing(
    pictures: Path, model: Model, tmp_path: Path
) -> None:
    index(pictures, model[0], tmp_path / "index")
    changed = LLM2CLIPModel.from_pretrained(model[0])
    with torch.no_grad():
        # Not one of the 1,024 evenly spaced values that earlier releases read.
        weight = changed.vision_model.blocks[0].mlp.w1.weight
        weight.view(-1)[1] += 1
        assert weight.numel() > 1024
    changed.save_pretrained(tmp_path / "weight")
    tiny.processor().save_pretrained(tmp_path / "weight")
    shutil.copytree(model[0], tmp_path / "processor")
    processor = tiny.processor()
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    processor.save_pretrained(tmp_path / "processor")
    for name in ("weight", "processor"):
        with pytest.raises(ValueError, match=r"other weights, other settings of the vision tower or another preproc"):
            index(pictures, tmp_path / name, tmp_path / "index")


def test_an_index_of_an_earlier_release_is_recognised(
    pictures: Path, model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output)
    earlier = earlier_vision_fingerprint(model[1])
    record(output, earlier)
    (pictures / "new.png").write_bytes(encoded(picture(99)))
    assert index(pictures, model[0], output)[:2] == (1, 12)
    assert "was made by an earlier release. It fits by the rule of that release" in caplog.text
    # The doubt about the kept embeddings stays on record until they are computed again.
    assert ImageIndex.open(output).manifest.vision_fingerprint == earlier
    assert index(pictures, model[0], output, overwrite=True)[:2] == (13, 0)
    assert ImageIndex.open(output).manifest.vision_fingerprint.startswith("2-")
    record(output, "0" * 32)
    with pytest.raises(ValueError, match=rf"fingerprint 0{{32}}\), but the model is .* fingerprint {earlier}\)"):
        index(pictures, model[0], output)
