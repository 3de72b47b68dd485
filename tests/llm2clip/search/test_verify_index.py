"""Verification of an index in a folder: a flip in every file, and no false alarm after updates and kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm2clip import cli
from llm2clip.search.lance_store import HINT
from llm2clip.search.listing import Listing
from llm2clip.search.verify_index import verify_index
from tests.damage import flip

from .conftest import Forwards
from .helpers import Model, encoded, index, picture


def files(folder: Path) -> list[Path]:
    unlisted = (".lock", Path(HINT).name)
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in unlisted)


def test_a_flip_in_every_file_of_an_index_is_found(
    pictures: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output, index_type="ivf_rq")
    assert cli.main(["verify", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "num_images: 12" in shown
    assert "num_indexed: 12" in shown
    for path in files(output):
        with flip(path):
            assert cli.main(["verify", str(output)]) == 2
            assert path.name in capsys.readouterr().err
        path.rename(tmp_path / "moved")
        assert cli.main(["verify", str(output)]) == 2
        (tmp_path / "moved").rename(path)
    (hint,) = output.glob(f"*.lance/{HINT}")
    for place in range(hint.stat().st_size):
        with flip(hint, place):
            assert cli.main(["verify", str(output)]) == 0
            assert cli.main(["search", str(output), "a dog"]) == 0


def test_an_index_whose_update_was_killed_is_whole(
    indexed: Path, pictures: Path, model: Model, forwards: Forwards, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(8):
        (pictures / f"new {number}.png").write_bytes(encoded(picture(50 + number)))
    forwards.limit = 1
    with pytest.raises(KeyboardInterrupt):
        index(pictures, model[0], indexed, shard_size=4)
    assert cli.main(["verify", str(indexed)]) == 0
    assert "was interrupted; run the same `llm2clip index` again" in capsys.readouterr().err


def test_rows_of_another_list_are_a_fault(indexed: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Listing.take

    def other(self: Listing, rows: Any) -> Any:
        return take(self, (rows + 1) % 12)

    with monkeypatch.context() as patch:
        patch.setattr(Listing, "take", other)
        (fault,) = verify_index(indexed).faults
    assert "does not fit its list of rows" in fault.what
