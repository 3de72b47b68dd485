"""Bringing an index up to date: only what is new is embedded, also after a killed run."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip.search.search_index import SearchIndex
from llm2clip.search.verify_index import verify_index
from llm2clip.store import Store
from tests.builders import tiny
from tests.processes import run_python

from .conftest import Forwards
from .helpers import QUERY, Model, embeddings, encoded, index, picture, rows, save_table
from .places import content


def test_only_new_and_changed_images_are_embedded(indexed: Path, pictures: Path, model: Model, tmp_path: Path) -> None:
    output, before = indexed, embeddings(indexed)
    assert index(pictures, model[0], output) == (0, 12, 0, 0, 12)
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    assert index(pictures, model[0], output) == (1, 12, 0, 0, 13)
    (pictures / "new.png").write_bytes(encoded(picture(51)))
    os.utime(pictures / "new.png", ns=(1, 1))
    (pictures / "00.png").unlink()
    assert index(pictures, model[0], output) == (1, 11, 1, 0, 12)
    after = embeddings(output)
    assert set(after) == (set(before) | {"new.png"}) - {"00.png"}
    assert all((after[key] == before[key]).all() for key in after if key != "new.png")
    index(pictures, model[0], tmp_path / "fresh")
    np.testing.assert_allclose(after["new.png"], embeddings(tmp_path / "fresh")["new.png"], atol=1e-3)
    query = after["new.png"][None].astype(np.float32)
    assert SearchIndex.open(output).search(query, 1)[0][0].key == "new.png"


def test_rows_of_a_data_set_are_identified_by_content(model: Model, tmp_path: Path) -> None:
    def save(seeds: list[int]) -> None:
        save_table(tmp_path / "data.parquet", seeds, caption=[f"number {seed}" for seed in seeds])

    save([1, 2, 3, 4, 5, 5])
    output = tmp_path / "index"
    assert index(tmp_path / "data.parquet", model[0], output) == (6, 0, 0, 0, 6)
    # Moved, removed, added.
    save([9, 5, 4, 3, 1])
    assert index(tmp_path / "data.parquet", model[0], output) == (1, 4, 1, 0, 5)
    found = sorted(rows(output), key=lambda row: row["row"])
    assert [row["caption"] for row in found] == [f"number {seed}" for seed in (9, 5, 4, 3, 1)]
    expected = model[1].encode_image([picture(seed) for seed in (9, 5, 4, 3, 1)], tiny.processor())
    torch.testing.assert_close(torch.tensor([row["vector"] for row in found]), expected, atol=1e-3, rtol=0)


def test_an_approximate_index_reuses_the_embeddings(
    pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"index_type": "ivf_rq", "cells": 2, "probes": 2, "refine": 3}
    monkeypatch.setattr("llm2clip.search.lance_rows.EXACT_MATCHES", 0)
    output = tmp_path / "index"
    index(pictures, model[0], output)
    # The embeddings are kept; only the table is written again.
    assert index(pictures, model[0], output, **settings) == (0, 12, 0, 0, 12)
    opened = SearchIndex.open(output)
    stored = opened.manifest.index
    assert {"index_type": stored["type"], **stored}.items() >= settings.items()
    for key, embed in embeddings(output).items():
        queries = embed[None].astype(np.float32)
        assert opened.search(queries, 1)[0][0].key == key
        found = opened.search(queries, 20, where="folder = 'a'")[0]
        assert {row.key for row in found} == {"a/01.png", "a/04.png", "a/07.png", "a/10.png"}
        assert found[0].score >= found[-1].score
    # Searched together or alone, queries find the same.
    queries = np.stack(list(embeddings(output).values())).astype(np.float32)
    once = [opened.search(query[None], 3, "folder = 'a'")[0] for query in queries[:2]]
    assert once == opened.search(queries, 3, "folder = 'a'")[:2]
    # It is brought up to date as the rows are, and goes with a change of the type.
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    assert index(pictures, model[0], output, **settings) == (1, 12, 0, 0, 13)
    opened = SearchIndex.open(output)
    new = embeddings(output)["new.png"].astype(np.float32)
    assert opened.search(new[None], 1)[0][0].key == "new.png"
    assert index(pictures, model[0], output, index_type="flat") == (0, 13, 0, 0, 13)
    table = lancedb.connect(str(output)).open_table(SearchIndex.open(output).manifest.stored["table"])
    assert {index.columns[0] for index in table.list_indices()} == {"folder", "extension"}


def test_equal_images_of_a_data_set_are_embedded_once(model: Model, tmp_path: Path, forwards: Forwards) -> None:
    path = save_table(tmp_path / "data.parquet", [1, 2, 1, 3, 2, 1, 4, 5, 6, 1])
    assert index(path, model[0], tmp_path / "index", shard_size=4) == (10, 0, 0, 0, 10)
    assert sum(forwards.sizes) == 6
    vectors = embeddings(tmp_path / "index")
    assert (vectors["0"] == vectors["9"]).all()
    assert (vectors["0"] != vectors["1"]).any()


def test_an_index_of_which_most_images_are_gone_stays_as_it_is(
    indexed: Path, pictures: Path, model: Model, tmp_path: Path
) -> None:
    """As when a disk is not mounted: the folder is there, and almost nothing in it."""
    output, before = indexed, content(indexed)
    files = sorted(pictures.rglob("[0-9]*.png"))
    for file in files[:7]:
        file.rename(tmp_path / file.name)
    with pytest.raises(
        ValueError, match=r"7 of the 12 images or captions of the index .* are gone .*--allow-removals"
    ):
        index(pictures, model[0], output)
    assert content(output) == before
    files[6].write_bytes((tmp_path / files[6].name).read_bytes())
    # Half of them may go.
    assert index(pictures, model[0], output)[2:] == (6, 0, 6)
    for file in files[6:11]:
        file.unlink()
    assert index(pictures, model[0], output, allow_removals=True) == (0, 1, 5, 0, 1)


def stored(folder: Path) -> Store:
    return Store.open(folder / "rows")


def test_only_what_is_new_is_read_and_embedded(
    pictures: Path, model: Model, tmp_path: Path, forwards: Forwards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what a killed run has listed is not read again."""
    read, digest = [], hashlib.file_digest

    def counted(file: Any, kind: Any) -> Any:
        if kind != "sha256":  # of a file that this run has written
            read.append(file.name)
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    forwards.limit = 1
    with pytest.raises(KeyboardInterrupt):
        index(pictures, model[0], tmp_path / "index", shard_size=4)
    assert len(read) == 12
    forwards.limit = None
    index(pictures, model[0], tmp_path / "index", shard_size=4)
    assert len(read) == 12
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "index" / "rows").glob("shard-*")}
    del read[:], forwards.sizes[:]
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    shutil.copyfile(pictures / "00.png", pictures / "copy.png")
    (pictures / "a" / "01.png").rename(pictures / "moved.png")
    assert index(pictures, model[0], tmp_path / "index", shard_size=4) == (1, 13, 1, 0, 14)
    assert sorted(Path(name).name for name in read) == ["copy.png", "moved.png", "new.png"]
    assert forwards.sizes == [1]
    assert all(path.stat().st_mtime_ns == time for path, time in shards.items())
    found = embeddings(tmp_path / "index")
    assert (found["copy.png"] == found["00.png"]).all()


def test_embeddings_of_removed_images_are_dropped_when_they_are_many(
    indexed: Path, pictures: Path, model: Model, forwards: Forwards
) -> None:
    before, files = embeddings(indexed), sorted(pictures.rglob("[0-9]*.png"))
    for count, left in ((3, 12), (4, 8)):
        for file in files[:count]:
            file.unlink(missing_ok=True)
        index(pictures, model[0], indexed)
        assert len(stored(indexed)) == left
        after = embeddings(indexed)
        assert set(after) == {file.relative_to(pictures).as_posix() for file in files[count:]}
        assert all((after[key] == before[key]).all() for key in after)
    assert forwards.sizes == []


def test_images_that_could_not_be_decoded_are_tried_again_when_that_may_have_changed(
    pictures: Path, model: Model, tmp_path: Path
) -> None:
    (pictures / "large.png").write_bytes(encoded(Image.new("RGB", (300, 300))))
    assert index(pictures, model[0], tmp_path / "index", max_pixels=80_000) == (12, 0, 0, 1, 12)
    assert index(pictures, model[0], tmp_path / "index", max_pixels=80_000) == (0, 12, 0, 1, 12)
    assert index(pictures, model[0], tmp_path / "index") == (1, 12, 0, 0, 13)
    assert "large.png" in embeddings(tmp_path / "index")


def test_an_image_that_changes_during_the_run_is_embedded_by_the_next(
    pictures: Path, model: Model, tmp_path: Path, forwards: Forwards
) -> None:
    last = pictures / "b" / "c" / "11.png"
    copy, content = pictures / "z.png", last.read_bytes()
    forwards.meanwhile = lambda number: number == 0 and last.write_bytes(encoded(picture(60)) + b" ")
    assert index(pictures, model[0], tmp_path / "index", batch_size=1, num_workers=0)[3:] == (1, 11)
    forwards.meanwhile = lambda number: None
    copy.write_bytes(content)
    assert index(pictures, model[0], tmp_path / "index") == (2, 11, 0, 0, 13)
    assert (embeddings(tmp_path / "index")["z.png"] != embeddings(tmp_path / "index")["b/c/11.png"]).any()


def test_the_clock_and_the_times_of_files_do_not_matter(indexed: Path, pictures: Path, model: Model) -> None:
    ten_days, expected = 10 * 24 * 60 * 60, embeddings(indexed)
    for moved in (-ten_days, ten_days):
        opened = SearchIndex.open(indexed)
        found = opened.search(QUERY, 20)
        for path in indexed.rglob("*"):
            now = path.stat().st_mtime
            os.utime(path, (now + moved, now + moved))
        (pictures / "new.png").write_bytes(encoded(picture(50 + (moved > 0))))
        index(pictures, model[0], indexed)
        assert opened.search(QUERY, 20) == found
        assert SearchIndex.open(indexed).search(QUERY, 20) != found
        assert verify_index(indexed).faults == []
    assert all((embeddings(indexed)[key] == row).all() for key, row in expected.items())


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_equal(tmp_path: Path) -> None:
    """See `kills`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run_python(["-m", "tests.llm2clip.search.kills", str(tmp_path), "10"], **environment)
