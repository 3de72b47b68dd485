"""An index at a URL, where no lock keeps other runs out; see test_store_contract.py for the rest."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from llm2clip.search.lance_store import LanceStore
from llm2clip.search.search_index import SearchIndex

from .conftest import Forwards
from .helpers import Model, as_json, encoded, error, picture
from .places import Place

AT_URL = pytest.mark.parametrize("place", ["local_url"], indirect=True)


def keys(place: Place) -> list[str]:
    return [row["key"] for row in place.content()["rows"]]


@AT_URL
@pytest.mark.parametrize("has_index", [False, True], ids=["new", "update"])
def test_a_second_run_is_noticed_by_what_it_writes(
    has_index: bool, place: Place, pictures: Path, model: Model, forwards: Forwards
) -> None:
    if has_index:
        place.index(pictures, model[0])
        for number in range(12):
            (pictures / f"new {number}.png").write_bytes(encoded(picture(50 + number)))
    done = len(forwards.sizes)
    forwards.meanwhile = lambda number: place.index(pictures, model[0], part_size=4) if number == done + 1 else None
    with pytest.raises(ValueError, match=r"another run writes to the index .* this one has stopped"):
        place.index(pictures, model[0], part_size=4)
    count = 24 if has_index else 12
    assert place.index(pictures, model[0]) == (0, count, 0, 0, count)
    assert len(set(keys(place))) == len(keys(place)) == count


@pytest.mark.slow
@pytest.mark.parametrize("place", ["bucket"], indirect=True)
def test_of_two_runs_at_once_in_s3_one_stops_and_nothing_is_mixed(place: Place, pictures: Path, model: Model) -> None:
    for number in range(80):
        (pictures / f"new {number:04}.png").write_bytes(encoded(picture(1000 + number)))
    run = [sys.executable, "-m", "llm2clip", "index", str(pictures), "--model", str(model[0])]
    run += ["--output-dir", place.location("index"), "--num-workers", "0", "--batch-size", "4", "--part-size", "4"]
    running = [subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in running]
    failed = [shown for process, shown in zip(running, errors, strict=True) if process.returncode]
    assert failed
    assert all("another run writes to the index s3://bucket/index" in shown for shown in failed), failed
    assert place.index(pictures, model[0])[-1] == 92
    assert len(set(keys(place))) == len(keys(place)) == 92


def other_rows(own: LanceStore) -> None:
    """Append the first rows of a run once more, as another run does that has begun where it began."""
    table = LanceStore(own.location)._open(None)
    table.add(own._written.search().limit(4).to_arrow().select(own._written.schema.names))


@AT_URL
def test_two_runs_that_write_in_the_same_moment_both_stop_and_nothing_stays_twice(
    place: Place, pictures: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    require = LanceStore._require_version

    def late(self: LanceStore, version: int) -> None:
        require(self, version)
        if self._written.count_rows():
            other_rows(self)

    with monkeypatch.context() as patch:
        patch.setattr(LanceStore, "_require_version", late)
        with pytest.raises(ValueError, match="another run writes to the index"):
            place.index(pictures, model[0], part_size=4)
    assert LanceStore(place.location("index"))._open(None).count_rows() == 12  # two parts of four, the first twice
    assert place.index(pictures, model[0], part_size=4)[-1] == 12
    assert keys(place) == sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png"))


@AT_URL
def test_rows_of_another_run_are_not_published(
    place: Place, pictures: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.index(pictures, model[0])
    before = place.content()
    (pictures / "new.png").write_bytes(encoded(picture(99)))
    index_columns = LanceStore._index_columns

    def late(self: LanceStore) -> None:
        other_rows(self)
        index_columns(self)

    with monkeypatch.context() as patch:
        patch.setattr(LanceStore, "_index_columns", late)
        with pytest.raises(ValueError, match="another run writes to the index"):
            place.index(pictures, model[0])
    assert place.content() == before
    assert place.index(pictures, model[0]) == (1, 12, 0, 0, 13)
    assert len(keys(place)) == 13


@AT_URL
def test_what_cannot_be_read_is_not_deleted_since_it_may_be_the_connection(
    place: Place, pictures: Path, model: Model, tmp_path: Path
) -> None:
    place.index(pictures, model[0])
    for path in (tmp_path / "store" / "index" / "images.lance" / "_versions").iterdir():
        path.write_bytes(b"")
    before = place.state()
    for overwrite in (False, True):
        with pytest.raises(ConnectionError, match=r"cannot be read \(.*delete it and build it again"):
            place.index(pictures, model[0], overwrite=overwrite)
    assert place.state() == before


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
