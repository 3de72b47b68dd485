"""Bringing an index up to date: only what is new is embedded, also after a killed run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pytest
import torch

from llm2clip.search.search_index import SearchIndex
from tests.builders import tiny

from .conftest import Forwards
from .helpers import Model, embeddings, encoded, index, picture, rows, save_table
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


@pytest.mark.parametrize(
    "settings",
    [
        {"index_type": "ivf_rq", "cells": 2, "probes": 2, "refine": 3},
        {"index_type": "faiss", "cells": 3, "probes": 3},
        {"precision": "int8"},
        {"index_type": "faiss", "precision": "binary"},
    ],
    ids=["ivf", "faiss", "int8", "binary"],
)
def test_approximate_indexes_reuse_the_embeddings(
    settings: dict[str, Any], pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2clip.search.lance_rows.EXACT_MATCHES", 0)
    output = tmp_path / "index"
    index(pictures, model[0], output)
    # The embeddings are kept; only the vector index is built again.
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
    table = lancedb.connect(str(output)).open_table("images")
    assert {index.columns[0] for index in table.list_indices()} == {"folder", "extension"}


def test_equal_images_of_a_data_set_are_embedded_once(model: Model, tmp_path: Path, forwards: Forwards) -> None:
    path = save_table(tmp_path / "data.parquet", [1, 2, 1, 3, 2, 1, 4, 5, 6, 1])
    assert index(path, model[0], tmp_path / "index", part_size=4) == (10, 0, 0, 0, 10)
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
