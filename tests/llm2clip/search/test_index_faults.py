"""An index that is damaged, cut short or on a full disk: refused in clear words, and repaired as they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lancedb
import pytest
from lancedb.table import LanceTable

from llm2clip.files.atomic import write_json
from llm2clip.files.manifests import write_manifest
from llm2clip.search.lance_store import HINT
from llm2clip.search.search_index import SearchIndex
from llm2clip.search.verify_index import verify_index
from tests.damage import flip

from .conftest import Forwards
from .helpers import QUERY, Model, encoded, error, index, picture
from .places import content

# As LanceDB 0.40 words it.
FULL = (
    "lance error: LanceError(IO): Generic LocalFileSystem error: Unable to copy data to file: No space left on device "
    "(os error 28), lance-table-13.0.0/src/io/commit.rs:1663:50"
)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("damage", "spoil", "index_type"),
    [
        ("images.lance/data/*", cut, "flat"),
        ("images.lance/data/*", Path.unlink, "flat"),
        ("images.lance/_versions/*", cut, "flat"),
        ("manifest.json", cut, "flat"),
        ("vectors-*.faiss", cut, "faiss"),
    ],
    ids=["rows", "no-rows", "versions", "manifest", "faiss"],
)
def test_a_damaged_index_is_repaired_as_its_error_message_says(
    damage: str, spoil: Any, index_type: str, pictures: Path, model: Model, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "index"
    index(pictures, model[0], output, index_type=index_type)
    before = content(output)
    for path in list(output.glob(damage)):
        spoil(path)
    assert "--overwrite" in error(capsys, "search", output, "a dog")
    assert index(pictures, model[0], output, index_type=index_type, overwrite=True)[-1] == 12
    assert content(output) == before


def test_an_index_of_an_earlier_format_is_refused_and_replaced(pictures: Path, model: Model, tmp_path: Path) -> None:
    output = tmp_path / "index"
    output.mkdir()
    (output / "index.faiss").write_bytes(b"earlier")
    (output / "manifest.json").write_text('{"format_version": 1}')
    write_manifest(output, "index")
    for use in (lambda: SearchIndex.open(output), lambda: index(pictures, model[0], output)):
        with pytest.raises(ValueError, match=r"its format is 1, and this version reads 2\); build it again"):
            use()
    assert index(pictures, model[0], output, overwrite=True)[0] == 12
    assert not (output / "index.faiss").exists()


def test_an_index_with_a_flipped_bit_is_not_searched(indexed: Path) -> None:
    (rows,) = (indexed / "images.lance" / "data").iterdir()
    with flip(rows), pytest.raises(ValueError, match=rf"is damaged: images\.lance/data/{rows.name} has changed"):
        SearchIndex.open(indexed)
    assert len(SearchIndex.open(indexed).search(QUERY, 20)[0]) == 12


def make_older(folder: Path, days: int) -> None:
    """Let all versions of the table of an index have been made so many days earlier, as if the clock had moved."""

    def varint(number: int) -> bytes:
        return b"" if not number else bytes([number & 127 | (128 if number > 127 else 0)]) + varint(number >> 7)

    times = lancedb.connect(str(folder)).open_table("images").list_versions()
    seconds = {int(version["timestamp"].timestamp()) for version in times}
    for path in (folder / "images.lance" / "_versions").glob("*.manifest"):
        written = path.read_bytes()
        for second in sorted(seconds):  # so that none is moved twice
            written = written.replace(varint(second), varint(second - days * 24 * 60 * 60))
        path.write_bytes(written)
    write_manifest(folder, "index", unlisted={HINT})


def test_versions_are_deleted_when_no_reader_can_have_them_open(pictures: Path, model: Model, tmp_path: Path) -> None:
    output = tmp_path / "index"
    for number in range(2):
        (pictures / "new.png").write_bytes(encoded(picture(50 + number)))
        index(pictures, model[0], output)
        make_older(output, days=8)
    table = lancedb.connect(str(output)).open_table("images")
    before = {version["version"] for version in table.list_versions()}
    replaced = SearchIndex.open(output)
    found = replaced.search(QUERY, 20)
    (pictures / "new.png").write_bytes(encoded(picture(99)))
    index(pictures, model[0], output)
    kept = before & {version["version"] for version in table.list_versions()}
    assert len(kept) < len(before)
    assert replaced.manifest.stored["version"] in kept, "a reader may have opened it just now"
    assert replaced.search(QUERY, 20) == found
    assert SearchIndex.open(output).search(QUERY, 20) != found
    assert verify_index(output).faults == []


def test_an_old_index_is_found_at_each_moment_of_an_update_and_after_one_that_was_stopped(
    pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output)
    make_older(output, days=8)
    before, seen = content(output), []
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    (pictures / "00.png").unlink()

    def watched(name: str) -> Any:
        original = getattr(LanceTable, name)

        def call(self: LanceTable, *arguments: Any, **options: Any) -> Any:
            result = original(self, *arguments, **options)
            seen.append(name)
            assert content(output) == before, f"after {seen}"
            return result

        return call

    def stopped(path: Path, fields: Any) -> None:
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        write_json(path, fields)

    with monkeypatch.context() as patch:
        for name in ("add", "delete", "create_index", "optimize"):
            patch.setattr(LanceTable, name, watched(name))
        patch.setattr("llm2clip.search.lance_store.write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            index(pictures, model[0], output, index_type="ivf_rq")
    assert set(seen) == {"add", "delete", "create_index", "optimize"}
    assert content(output) == before
    assert verify_index(output).faults == []
    index(pictures, model[0], output, index_type="ivf_rq")
    index(pictures, model[0], tmp_path / "whole", index_type="ivf_rq")
    assert content(output) == content(tmp_path / "whole")


@pytest.mark.parametrize("files", ["data/*", "_versions/*.manifest"])
def test_an_unfinished_run_whose_files_are_cut_is_dropped(
    files: str, pictures: Path, model: Model, tmp_path: Path, forwards: Forwards, caplog: pytest.LogCaptureFixture
) -> None:
    index(pictures, model[0], tmp_path / "whole")
    forwards.limit = len(forwards.sizes) + 2
    with pytest.raises(KeyboardInterrupt):
        index(pictures, model[0], tmp_path / "index", part_size=4)
    forwards.limit = None
    for path in (tmp_path / "index" / "images.lance").glob(files):
        cut(path)
    assert index(pictures, model[0], tmp_path / "index") == (12, 0, 0, 0, 12)
    assert "dropped" in caplog.text
    assert content(tmp_path / "index") == content(tmp_path / "whole")


def test_a_full_disk_is_named(pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise RuntimeError(FULL)

    index(pictures, model[0], tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(LanceTable, "add", full)
        with pytest.raises(OSError, match=r"cannot be written \(No space left on device \(os error 28\)\)"):
            index(pictures, model[0], tmp_path / "index")
    assert index(pictures, model[0], tmp_path / "index")[-1] == 12
    assert content(tmp_path / "index") == content(tmp_path / "whole")
