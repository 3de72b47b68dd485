"""An index that is damaged, cut short or on a full disk: refused in clear words, and repaired as they say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from lancedb.db import LanceDBConnection

from llm2clip.search.search_index import SearchIndex
from llm2clip.search.verify_index import verify_index
from tests.damage import flip

from .conftest import Forwards
from .helpers import QUERY, Model, error, index
from .places import content

# As LanceDB 0.40 words it.
FULL = (
    "lance error: LanceError(IO): Generic LocalFileSystem error: Unable to copy data to file: No space left on device "
    "(os error 28), lance-table-13.0.0/src/io/commit.rs:1663:50"
)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("damage", "spoil"),
    [
        ("images-*.lance/data/*", cut),
        ("images-*.lance/data/*", Path.unlink),
        ("images-*.lance/_versions/*.manifest", cut),
        ("images-*.lance/_indices/*/*", cut),
        ("images-*.lance", shutil.rmtree),
        ("listing-*.arrow", cut),
        ("listing-*.arrow", Path.unlink),
        ("rows/shard-00000.safetensors", cut),
        ("rows", shutil.rmtree),
    ],
)
def test_what_is_damaged_is_made_again_by_the_same_command(
    damage: str, spoil: Any, pictures: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output, index_type="ivf_rq")
    before = content(output)
    for path in list(output.glob(damage)):
        spoil(path)
    if damage.startswith("images"):
        assert "the same llm2clip index again" in error(capsys, "search", output, "a dog")
    else:
        assert content(output) == before
    count = 12 if damage.startswith("rows") else 0
    assert index(pictures, model[0], output, index_type="ivf_rq") == (count, 12 - count, 0, 0, 12)
    assert content(output) == before
    assert verify_index(output).faults == []


def test_an_index_whose_manifest_is_damaged_or_of_an_earlier_format_is_refused_and_replaced(
    pictures: Path, model: Model, tmp_path: Path, forwards: Forwards
) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output)
    before = content(output)
    for spoiled, reason in (("{", "is not valid JSON"), ('{"format_version": 1}', "its format is 1")):
        (output / "manifest.json").write_text(spoiled)
        for use in (lambda: SearchIndex.open(output), lambda: index(pictures, model[0], output)):
            with pytest.raises(ValueError, match=f"{reason}.*; build it again: add --overwrite"):
                use()
        assert index(pictures, model[0], output, overwrite=True)[-1] == 12
        assert content(output) == before


def test_an_index_with_a_flipped_bit_is_not_searched(indexed: Path) -> None:
    (rows,) = indexed.glob("images-*.lance/data/*")
    with flip(rows), pytest.raises(ValueError, match=rf"is damaged: images-.*/data/{rows.name} has changed"):
        SearchIndex.open(indexed)
    assert len(SearchIndex.open(indexed).search(QUERY, 20)[0]) == 12


def test_a_full_disk_is_named(pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise RuntimeError(FULL)

    index(pictures, model[0], tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(LanceDBConnection, "create_table", full)
        with pytest.raises(OSError, match=r"cannot be written \(No space left on device \(os error 28\)\)"):
            index(pictures, model[0], tmp_path / "index")
    assert index(pictures, model[0], tmp_path / "index")[-1] == 12
    assert content(tmp_path / "index") == content(tmp_path / "whole")
