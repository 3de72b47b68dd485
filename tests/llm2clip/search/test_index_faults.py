"""Disks that fail while an index is written, and what killed runs leave: nothing has to be mended by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from lancedb.table import LanceTable

from llm2clip.utils.files import temporary_name
from modeling_llm2clip import LLM2CLIPModel

from .conftest import Forwards, content, encoded, index, picture

Model = tuple[Path, LLM2CLIPModel]
# As LanceDB 0.40 words it.
FULL = (
    "lance error: LanceError(IO): Generic LocalFileSystem error: Unable to copy data to file: No space left on device "
    "(os error 28), lance-table-13.0.0/src/io/commit.rs:1663:50"
)


def killed_run(pictures: Path, model: Model, output: Path, forwards: Forwards) -> set[Path]:
    """Run until two parts are stored; returns the files of data that this has made."""
    before = set(output.glob("images.lance/data/*"))
    forwards.limit = len(forwards.sizes) + 2
    with pytest.raises(KeyboardInterrupt):
        index(pictures, model[0], output, part_size=4)
    forwards.limit = None
    return set(output.glob("images.lance/data/*")) - before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("files", "warning"),
    [
        ("data/*", "what an unfinished run has stored is dropped: the index"),
        ("_versions/*.manifest", "cannot be read; it is dropped."),
    ],
)
def test_an_unfinished_run_whose_files_are_cut_is_dropped(
    files: str,
    warning: str,
    pictures: Path,
    model: Model,
    tmp_path: Path,
    forwards: Forwards,
    caplog: pytest.LogCaptureFixture,
) -> None:
    index(pictures, model[0], tmp_path / "whole")
    killed_run(pictures, model, tmp_path / "index", forwards)
    for path in (tmp_path / "index" / "images.lance").glob(files):
        cut(path)
    caplog.clear()
    assert index(pictures, model[0], tmp_path / "index") == (12, 0, 0, 0, 12)
    assert warning in caplog.text
    assert content(tmp_path / "index") == content(tmp_path / "whole")


def test_a_cut_unfinished_update_goes_back_to_the_complete_index(
    pictures: Path, model: Model, tmp_path: Path, forwards: Forwards, caplog: pytest.LogCaptureFixture
) -> None:
    index(pictures, model[0], tmp_path / "index")
    for number in range(20, 32):
        (pictures / f"{number}.png").write_bytes(encoded(picture(number)))
    for path in killed_run(pictures, model, tmp_path / "index", forwards):
        cut(path)
    caplog.clear()
    assert index(pictures, model[0], tmp_path / "index") == (12, 12, 0, 0, 24)
    assert "what an unfinished run has stored is dropped: the index" in caplog.text
    assert len(content(tmp_path / "index")["rows"]) == 24


@pytest.mark.parametrize("failing", ["add", "optimize"])
def test_a_full_disk_is_named(
    failing: str, pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise RuntimeError(FULL)

    index(pictures, model[0], tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(LanceTable, failing, full)
        with pytest.raises(OSError, match=r"index .* cannot be written \(No space left on device \(os error 28\)\)"):
            index(pictures, model[0], tmp_path / "index")
    assert index(pictures, model[0], tmp_path / "index")[-1] == 12
    assert content(tmp_path / "index") == content(tmp_path / "whole")


def test_the_next_run_removes_unfinished_files(
    pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output)
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: 2**22 + 1)  # no process has this number
        left = temporary_name(output / "failures.json")
    left.write_text("[]")
    index(pictures, model[0], output)
    assert not left.exists()
