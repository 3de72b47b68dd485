"""What is computed from whole data sets is computed once per machine and takes no memory of its own."""

from __future__ import annotations

import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from llm2clip.data import PairDataset, PairSource
from llm2clip.data.pairs import PairTable, _load
from llm2clip.utils.shared_files import shared_file
from tests.llm2clip import tiny

ROWS = 20_000


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs of texts; half of the anchors are equal to the one before."""
    return tiny.write_text_pairs(tmp_path_factory.mktemp("rows") / "rows.parquet", ROWS)


def forbidden(*arguments: Any) -> Any:
    raise AssertionError("computed again")


def pair_source(path: str, **fields: Any) -> PairSource:
    return PairSource(path, anchor_column="short", positive_column="long", **fields)


def test_the_first_process_writes_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    calls = []

    def write(path: Path) -> None:
        calls.append(path)
        time.sleep(0.2)
        path.write_text("content")

    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: shared_file("kind", {"a": 1}, write), range(4)))
    assert len(set(paths)) == len(calls) == 1
    assert paths[0].read_text() == "content"
    assert shared_file("kind", {"a": 2}, write) != paths[0]
    # The lock that a killed process has left, too: that of a file that exists has no use.
    Path(f"{paths[0]}.lock").touch()
    shared_file("kind", {"a": 1}, write)
    assert len(list((tmp_path / "llm2clip").iterdir())) == 2


def test_an_error_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)

    def write(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        shared_file("kind", {}, write)
    assert shared_file("kind", {}, lambda path: path.write_text("whole") and None).read_text() == "whole"


def test_the_keys_of_pairs_are_computed_once_and_shared(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pair_source(rows)
    built = PairTable(source, _load(source), "rows")
    monkeypatch.setattr(PairTable, "_build", forbidden)
    table = _load(source)
    tracemalloc.start()
    again = PairTable(source, table, "rows")
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 8 * ROWS
    for name in ("rows", "own_keys", "own_starts", "negative_keys", "negative_starts"):
        assert np.array_equal(getattr(again, name), getattr(built, name))
    assert PairDataset(source)[7]["anchor"] == "a picture of thing 3"
    for other in (pair_source(rows, max_samples=50), pair_source(rows, group_column="short")):
        with pytest.raises(AssertionError, match="computed again"):
            PairDataset(other)
