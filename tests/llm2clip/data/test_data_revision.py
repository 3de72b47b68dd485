"""The identity of data: commits on the Hub, checksums of local files."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest

from llm2clip.data import CaptionSource, load_source
from llm2clip.data.table_identity import data_revision
from tests.loopback_hub import File, LoopbackHub, Repo


def test_local_files_are_identified_by_their_content(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    file = folder / "train" / "a.jsonl"
    file.write_bytes(b"x" * 300_000)
    (folder / "b.jsonl").write_bytes(b"y")
    first = data_revision(str(folder))
    assert first is not None
    assert len(first) == 16
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    os.utime(file, (1, 1))
    moved = folder.rename(tmp_path / "moved")
    assert data_revision(str(moved)) == first
    seen = {first}
    for place, change in (
        (file, lambda path: path.write_bytes(b"x" * 299_999 + b"z")),
        (file, lambda path: path.write_bytes(b"z" + b"x" * 299_999)),
        (file, lambda path: path.write_bytes(b"x" * 300_001)),
        (folder / "b.jsonl", lambda path: path.rename(path.with_name("c.jsonl"))),
    ):
        change(moved / place.relative_to(folder))
        seen.add(str(data_revision(str(moved))))
    assert len(seen) == 5


def test_files_and_patterns_have_checksums_and_urls_their_revision(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    one, both = data_revision(str(tmp_path / "a.jsonl")), data_revision(str(tmp_path / "*.jsonl"))
    assert both == data_revision(str(tmp_path))
    assert one not in (None, both)
    assert data_revision({"path": "https://example.org/a.parquet", "revision": "v1"}) == "v1"


@pytest.mark.parametrize("fields", [{}, {"revision": "main"}])
def test_a_hub_id_gives_its_commit_online_and_from_the_cache(
    fields: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    source = {"path": "someone/captions", **fields}
    with LoopbackHub() as hub:
        hub.redirect(monkeypatch, tmp_path / "hub")
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        repo = Repo("someone/captions", "dataset")
        commit = repo.commit("main", {"train.jsonl": File(b'{"caption": "a dog"}\n', lfs=False)}, "data")
        hub.repos["dataset", repo.name] = repo
        assert data_revision(source) == commit
        load_source(CaptionSource(**source), with_images=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert data_revision(source) == commit


def test_unknown_data_sets_keep_the_given_revision_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert data_revision("someone/nothing") is None
    assert data_revision({"path": "someone/nothing", "revision": "v1"}) == "v1"
    assert "the commit of someone/nothing is unknown" in caplog.text
