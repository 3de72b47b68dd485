"""Labels of all images, written to a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llm2clip import cli
from llm2clip.search.search_index import SearchIndex

from .helpers import Model, error, rows, save_table
from .helpers import index as run_index

LABELS = ["dog", "steam train", "house", "river", "tree"]


def test_each_image_gets_the_labels_whose_captions_are_nearest(indexed: Path, tmp_path: Path) -> None:
    labels, output = tmp_path / "labels.txt", tmp_path / "made" / "tags.jsonl"
    labels.write_text("\n".join([*LABELS, "", " dog "]) + "\n")
    options = ["--output", str(output), "--top", "3", "--template", "a photo of a {}"]
    assert cli.main(["tags", str(indexed), str(labels), *options]) == 0
    captions = SearchIndex.open(indexed).embed([f"a photo of a {label}" for label in LABELS])
    found = {line["key"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert len(found) == 12
    for row in rows(indexed):
        embed = np.asarray(row["vector"], np.float32)
        cosines = captions @ embed / np.linalg.norm(embed)
        best = np.argsort(-cosines)[:3]
        assert found[row["key"]]["labels"] == [LABELS[number] for number in best]
        assert found[row["key"]]["scores"] == pytest.approx(cosines[best].tolist(), abs=1e-5)


def test_an_interrupted_run_leaves_the_old_file(
    indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    (tmp_path / "tags.jsonl").write_text("old")
    monkeypatch.setattr("llm2clip.search.top_k.top_k", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    command = ["tags", str(indexed), str(tmp_path / "labels.txt"), "--output", str(tmp_path / "tags.jsonl")]
    assert cli.main(command) != 0
    assert (tmp_path / "tags.jsonl").read_text() == "old"
    assert [path.name for path in tmp_path.glob(".*.tmp")] == []


def test_what_has_no_labels_is_an_error(
    indexed: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none.txt").write_text(" \n\n")
    (tmp_path / "labels.txt").write_text("dog")
    assert "none.txt has no label" in error(capsys, "tags", indexed, tmp_path / "none.txt")
    assert "missing.txt" in error(capsys, "tags", indexed, tmp_path / "missing.txt")
    assert "template is 'a'" in error(capsys, "tags", indexed, tmp_path / "labels.txt", "--template", "a")
    data = save_table(tmp_path / "data.parquet", [0], caption=["one"])
    run_index(data, model[0], tmp_path / "captions", embed="caption")
    assert "is of captions" in error(capsys, "tags", tmp_path / "captions", tmp_path / "labels.txt")
