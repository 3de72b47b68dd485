"""An index at a URL, where no lock keeps other runs out; see test_store_contract.py for the rest."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from llm2clip.search.search_index import SearchIndex

from .conftest import Forwards
from .helpers import Model, as_json, encoded, error, index, picture
from .places import Place

AT_URL = pytest.mark.parametrize("place", ["local_url"], indirect=True)


@AT_URL
def test_of_two_runs_on_two_machines_the_last_one_is_found_and_is_whole(
    place: Place, pictures: Path, model: Model, forwards: Forwards
) -> None:
    """No lock keeps the other machine out, which has stored embeddings of its own."""
    settings = {"output_dir": place.location("index"), "rows_dir": str(pictures.parent / "other machine")}
    place.index(pictures, model[0])
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    forwards.meanwhile = lambda number: index(pictures, model[0], None, **settings)
    assert place.index(pictures, model[0]) == (1, 12, 0, 0, 13)
    forwards.meanwhile = lambda number: None
    assert len(place.content()["rows"]) == 13
    assert index(pictures, model[0], None, **settings) == (0, 13, 0, 0, 13)


@AT_URL
def test_the_stored_embeddings_are_in_a_folder_of_the_index_by_default(
    place: Place, pictures: Path, model: Model, tmp_path: Path, default_rows: Path
) -> None:
    for name in ("one/photos", "two/photos"):
        index(pictures, model[0], place.location(name))
    assert len(list(default_rows.glob("*_photos-*/rows/index.manifest"))) == 2
    with pytest.raises(ValueError, match="rows_dir is other"):
        index(pictures, model[0], tmp_path / "index", rows_dir="other")


@AT_URL
def test_search_reads_a_url_and_a_store_that_does_not_answer_ends_in_one_line(
    place: Place, pictures: Path, model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class UnreachableError(Exception):
        """As those of botocore."""

    def fails(*arguments: Any, **options: Any) -> None:
        raise UnreachableError("no credentials")

    there = place.location("index")
    place.index(pictures, model[0])
    (found,) = as_json(capsys, there, "--image", pictures / "a" / "07.png", "--top", "3")
    assert found["results"][0]["key"] == "a/07.png"
    for name in ("ls", "cat_file"):
        monkeypatch.setattr(LocalFileSystem, name, fails)
    for command in (["index", pictures, "--model", model[0], "--output-dir", there], ["search", there, "a text"]):
        message = error(capsys, *command)
        assert there in message
        assert "cannot be reached: no credentials" in message
        assert "Traceback" not in message


def test_another_kind_of_url_and_a_missing_library_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"s3://, gs://, az://\), not https://a/b"):
        SearchIndex.open("https://a/b")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(ImportError, match=r"s3://bucket/index cannot be opened: .*pip install s3fs"):
        SearchIndex.open("s3://bucket/index")
