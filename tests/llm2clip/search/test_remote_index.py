"""An index at a URL: the same as one in a folder, with the same promises to readers and after kills."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from llm2clip import cli
from llm2clip.search import store
from llm2clip.search.lance_store import HINT, LanceStore
from llm2clip.search.search_index import SearchIndex
from modeling_llm2clip import LLM2CLIPModel
from tests.object_store import KIND, LocalObjects

from .conftest import Forwards, content, encoded, index, picture

Model = tuple[Path, LLM2CLIPModel]
QUERY = np.ones((1, 24), np.float32) / 24**0.5


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of local files in tmp_path / "store", which are read and written as an object store's."""
    fsspec.register_implementation(KIND, LocalObjects, clobber=True)
    monkeypatch.setattr(store, "OBJECT_STORES", (KIND,))
    return f"{KIND}://{tmp_path}/store"


def files(folder: Path) -> dict[str, int]:
    """The times of the files of an index."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("index_type", ["flat", "ivf_rq", "faiss"])
def test_an_index_at_a_url_is_that_of_a_folder(
    index_type: str, place: str, pictures: Path, model: Model, tmp_path: Path
) -> None:
    for output in (place, tmp_path / "index"):
        assert index(pictures, model[0], output, index_type=index_type) == (12, 0, 0, 0, 12)
    assert content(place) == content(tmp_path / "index")
    written = files(tmp_path / "store")
    listed = json.loads((tmp_path / "store" / ".llm2clip.json").read_text())["files"]
    assert set(listed) | {".llm2clip.json", HINT} == set(written)
    assert all((tmp_path / "store" / name).stat().st_size == size for name, size in listed.items() if name[0] == "i")
    assert index(pictures, model[0], place, index_type=index_type) == (0, 12, 0, 0, 12)
    assert files(tmp_path / "store") == written
    before = SearchIndex.open(place)
    found = before.search(QUERY, 20)
    (pictures / "00.png").unlink()
    (pictures / "new.png").write_bytes(encoded(picture(99)))
    (pictures / "broken.png").write_bytes(b"broken")
    for output in (f"{place}/", tmp_path / "index"):
        assert index(pictures, model[0], output, index_type=index_type) == (1, 11, 1, 1, 12)
    assert before.search(QUERY, 20) == found
    assert content(place) == content(tmp_path / "index")
    after = [SearchIndex.open(output).search(QUERY, 20) for output in (place, tmp_path / "index")]
    assert after[0] == after[1] != found
    index(pictures, model[0], place, overwrite=True)
    assert before.search(QUERY, 20) == found
    assert len(SearchIndex.open(place).search(QUERY, 20, "folder = 'a'")[0]) == 4


def test_search_reads_a_url(place: str, pictures: Path, model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    index(pictures, model[0], place)
    capsys.readouterr()
    assert cli.main(["search", place, "--image", str(pictures / "a" / "07.png"), "--json", "--top", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["index"] == place
    assert found["queries"][0]["results"][0]["key"] == "a/07.png"


def test_a_killed_run_at_a_url_is_resumed(
    place: str, pictures: Path, model: Model, tmp_path: Path, forwards: Forwards
) -> None:
    index(pictures, model[0], tmp_path / "whole", part_size=4)
    del forwards.sizes[:]
    forwards.limit = 0
    with pytest.raises(KeyboardInterrupt):
        index(pictures, model[0], f"{place}-none", part_size=4)
    assert not files(tmp_path / "store-none"), "a run that ends before its first image leaves nothing"
    forwards.limit = 2
    with pytest.raises(KeyboardInterrupt):
        index(pictures, model[0], place, part_size=4)
    with pytest.raises(FileNotFoundError, match="it is not finished; run the same llm2clip index again"):
        SearchIndex.open(place)
    forwards.limit = None
    assert index(pictures, model[0], place, part_size=4) == (12, 0, 0, 0, 12)
    assert forwards.sizes == [4, 4, 4]
    assert content(place) == content(tmp_path / "whole")


@pytest.mark.parametrize("has_index", [False, True])
def test_a_second_run_is_noticed_by_what_it_writes(
    has_index: bool, place: str, pictures: Path, model: Model, forwards: Forwards
) -> None:
    if has_index:
        index(pictures, model[0], place)
        for number in range(12):
            (pictures / f"new {number}.png").write_bytes(encoded(picture(50 + number)))
    done = len(forwards.sizes)
    forwards.meanwhile = lambda number: index(pictures, model[0], place, part_size=4) if number == done + 1 else None
    with pytest.raises(ValueError, match=f"another run writes to the index {place}, and this one has stopped"):
        index(pictures, model[0], place, part_size=4)
    count = 24 if has_index else 12
    assert index(pictures, model[0], place) == (0, count, 0, 0, count)
    keys = [row["key"] for row in content(place)["rows"]]
    assert len(set(keys)) == len(keys) == count


def other_rows(place: str, own: LanceStore) -> None:
    """Append the first rows of a run once more, as another run does that has begun where it began."""
    table = LanceStore(place)._open(None)
    table.add(own._written.search().limit(4).to_arrow().select(own._written.schema.names))


def test_two_runs_that_write_in_the_same_moment_both_stop_and_nothing_stays_twice(
    place: str, pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(pictures, model[0], tmp_path / "whole")
    require = LanceStore._require_version

    def late(self: LanceStore, version: int) -> None:
        require(self, version)
        if self._written.count_rows():
            other_rows(place, self)

    with monkeypatch.context() as patch:
        patch.setattr(LanceStore, "_require_version", late)
        with pytest.raises(ValueError, match="another run writes to the index"):
            index(pictures, model[0], place, part_size=4)
    assert LanceStore(place)._open(None).count_rows() == 12  # two parts of four, and the first once more
    assert index(pictures, model[0], place, part_size=4)[-1] == 12
    assert sorted(row["key"] for row in content(place)["rows"]) == sorted(
        row["key"] for row in content(tmp_path / "whole")["rows"]
    )


def test_rows_of_another_run_are_not_published(
    place: str, pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(pictures, model[0], place)
    before = content(place)
    (pictures / "new.png").write_bytes(encoded(picture(99)))
    index_columns = LanceStore._index_columns

    def late(self: LanceStore) -> None:
        other_rows(place, self)
        index_columns(self)

    with monkeypatch.context() as patch:
        patch.setattr(LanceStore, "_index_columns", late)
        with pytest.raises(ValueError, match="another run writes to the index"):
            index(pictures, model[0], place)
    assert content(place) == before
    assert index(pictures, model[0], place) == (1, 12, 0, 0, 13)
    assert len(content(place)["rows"]) == 13


def test_a_folder_of_others_at_a_url_is_not_replaced(place: str, pictures: Path, model: Model, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "theirs.txt").write_text("theirs")
    for output in (place, f"{place}/theirs.txt"):
        with pytest.raises((FileExistsError, NotADirectoryError), match=r"llm2clip index did not write it|is a file"):
            index(pictures, model[0], output, overwrite=True)
    assert files(tmp_path / "store").keys() == {"theirs.txt"}


def test_what_cannot_be_read_at_a_url_is_not_deleted(place: str, pictures: Path, model: Model, tmp_path: Path) -> None:
    """It may be a matter of the connection."""
    index(pictures, model[0], place)
    for path in (tmp_path / "store" / "images.lance" / "_versions").iterdir():
        path.write_bytes(b"")
    before = files(tmp_path / "store")
    for overwrite in (False, True):
        with pytest.raises(ConnectionError, match=r"cannot be read \(.*delete it and build it again"):
            index(pictures, model[0], place, overwrite=overwrite)
    assert files(tmp_path / "store") == before
    (tmp_path / "store" / "manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match=r"its format is 1, and this version reads 2\); build it again"):
        SearchIndex.open(place)


def test_a_store_that_does_not_answer_ends_in_one_line(
    place: str, pictures: Path, model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class UnreachableError(Exception):
        """As those of botocore."""

    def fails(*arguments: Any, **options: Any) -> None:
        raise UnreachableError("no credentials")

    for name in ("ls", "cat_file"):
        monkeypatch.setattr(LocalFileSystem, name, fails)
    for command in (["index", pictures, "--model", model[0], "--output-dir", place], ["search", place, "a text"]):
        assert cli.main([*map(str, command)]) == 2
        message = capsys.readouterr().err
        assert f"{place}" in message
        assert "cannot be reached: no credentials" in message
        assert "Traceback" not in message


def test_a_url_of_another_kind_is_no_index() -> None:
    with pytest.raises(ValueError, match=r"a folder or a URL \(s3://, gs://, az://\), not https://a/b; one in"):
        SearchIndex.open("https://a/b")


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(ImportError, match=r"s3://bucket/index cannot be opened: Install s3fs.*: pip install s3fs"):
        SearchIndex.open("s3://bucket/index")
