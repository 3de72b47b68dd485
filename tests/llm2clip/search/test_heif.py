"""HEIC files of a folder, with pillow-heif and without."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from llm2clip.data import heif
from llm2clip.search.results import ResultImages
from llm2clip.search.search_index import SearchIndex

from .helpers import Model, as_json, error, index, picture


@pytest.fixture
def photos(pictures: Path) -> Path:
    """The folder of pictures, one of which is HEIC."""
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    pillow_heif.from_pillow(picture(40).resize((256, 256))).save(pictures / "photo.HEIC")
    return pictures


def test_heic_files_are_indexed_searched_by_and_shown(
    photos: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert index(photos, model[0], tmp_path / "index") == (13, 0, 0, 0, 13)
    (found,) = as_json(capsys, tmp_path / "index", "--image", photos / "photo.HEIC")
    assert found["results"][0]["key"] == "photo.HEIC"
    opened = SearchIndex.open(tmp_path / "index")
    (best,) = opened.search(photos / "photo.HEIC", 1)
    assert best.key == "photo.HEIC"
    shown = ResultImages(opened.manifest).load(best)
    assert shown is not None
    assert shown.size == (256, 256)


def test_without_pillow_heif_the_message_says_what_to_install(
    photos: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heif._registered.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    monkeypatch.setattr("llm2clip.search.index_update.DECODERS", ("pillow",))  # as its metadata are not there either
    for kind in ("HEIF", "AVIF"):  # that other tests may have registered
        monkeypatch.delitem(Image.OPEN, kind, raising=False)
    try:
        assert index(photos, model[0], tmp_path / "index") == (12, 0, 0, 1, 12)
        assert "pip install 'llm2clip[search]'" in (tmp_path / "index" / "manifest.json").read_text()
        message = error(capsys, "search", tmp_path / "index", "--image", photos / "photo.HEIC")
        assert "HEIC needs pillow-heif" in message
    finally:
        heif._registered.cache_clear()
    monkeypatch.undo()
    assert index(photos, model[0], tmp_path / "index") == (1, 12, 0, 0, 13)
