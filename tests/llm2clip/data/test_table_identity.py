"""The identity of data: commits on the Hub, checksums of local files, keys of images."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from llm2clip.data import CaptionSource, load_source, table_identity
from llm2clip.data.table_identity import data_revision
from tests.builders.tables import write_table
from tests.loopback_hub import File, LoopbackHub, Repo


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_local_files_are_identified_by_their_content_and_names(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "a.jsonl").write_bytes(b"x" * 300_000)
    (folder / "b.jsonl").write_bytes(b"y")
    first = data_revision(str(folder))
    assert first == data_revision(str(folder / "**" / "*.jsonl"))
    assert data_revision(str(folder / "b.jsonl")) not in (None, first)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    moved = folder.rename(tmp_path / "moved")
    large = moved / "train" / "a.jsonl"
    os.utime(large, (1, 1))
    assert data_revision(str(moved)) == first
    seen = {first}
    for content in (b"x" * 299_999 + b"z", b"z" + b"x" * 299_999, b"x" * 300_001):
        large.write_bytes(content)
        seen.add(data_revision(str(moved)))
    (moved / "b.jsonl").rename(moved / "c.jsonl")
    assert len({*seen, data_revision(str(moved))}) == 5


@pytest.mark.parametrize("fields", [{}, {"revision": "main"}])
def test_a_hub_id_gives_its_commit_online_and_from_the_cache(
    fields: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
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


def test_unknown_data_sets_keep_the_given_revision(caplog: pytest.LogCaptureFixture) -> None:
    assert data_revision({"path": "https://example.org/a.parquet", "revision": "v1"}) == "v1"
    assert data_revision("someone/nothing") is None
    assert data_revision({"path": "someone/nothing", "revision": "v1"}) == "v1"
    assert "the commit of someone/nothing is unknown" in caplog.text


def keys_of(folder: Path, images: list[Any]) -> list[list[int]]:
    path = write_table(folder / "rows.parquet", {"image": images, "caption": ["a dog"] * len(images)})
    table = load_source(CaptionSource(path))
    return table_identity.image_keys(table, "image").tolist()


def test_keys_of_images_follow_the_content_of_bytes_and_files(tmp_path: Path) -> None:
    def key(content: bytes) -> list[int]:
        return np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), "<i8").tolist()

    assert keys_of(tmp_path, [b"one", b"two", b"one"]) == [key(b"one"), key(b"two"), key(b"one")]
    files = [tmp_path / name for name in ("a.png", "b.png", "missing.png")]
    for path, content in zip(files, (b"one", b"two"), strict=False):
        path.write_bytes(content)
    assert keys_of(tmp_path, list(map(str, files)))[:2] == [key(b"one"), key(b"two")]
    files[1].write_bytes(b"TWO")
    os.utime(files[1], ns=(1, 1))
    files[2].write_bytes(b"three")
    assert keys_of(tmp_path, list(map(str, files))) == [key(b"one"), key(b"TWO"), key(b"three")]
