"""Keys of images."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import datasets
import numpy as np
import pytest

from llm2clip.data import CaptionSource, load_source, table_identity


def key(content: bytes) -> list[int]:
    return np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), "<i8").tolist()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_keys_are_hashes_of_the_bytes(tmp_path: Path) -> None:
    rows = {"image": [b"one", b"two", b"one"], "caption": ["a", "b", "c"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    table = load_source(CaptionSource(str(tmp_path / "rows.parquet"), caption_columns=["caption"]))
    keys = table_identity.image_keys(table, "image")
    assert keys.tolist() == [key(b"one"), key(b"two"), key(b"one")]


def test_keys_of_files_follow_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [str(tmp_path / name) for name in ("a.png", "b.png", "missing.png")]
    Path(names[0]).write_bytes(b"one")
    Path(names[1]).write_bytes(b"two")
    datasets.Dataset.from_dict({"image": names, "caption": ["a", "b", "c"]}).to_parquet(tmp_path / "rows.parquet")
    table = load_source(CaptionSource(str(tmp_path / "rows.parquet"), caption_columns=["caption"]))
    first = table_identity.image_keys(table, "image").tolist()
    assert first[:2] == [key(b"one"), key(b"two")]
    read = table_identity._content
    monkeypatch.setattr(table_identity, "_content", None)
    assert table_identity.image_keys(table, "image").tolist() == first
    monkeypatch.setattr(table_identity, "_content", read)
    Path(names[1]).write_bytes(b"TWO")
    os.utime(names[1], ns=(1, 1))
    Path(names[2]).write_bytes(b"three")
    assert table_identity.image_keys(table, "image").tolist() == [key(b"one"), key(b"TWO"), key(b"three")]
