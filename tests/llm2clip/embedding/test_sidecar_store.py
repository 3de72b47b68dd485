"""A folder of sidecars as a store of embeddings: every caption is found, with no list of keys in memory."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest
import torch

from llm2clip.data import CaptionSource
from llm2clip.data.records import caption_keys
from llm2clip.data.shards import ShardedSource
from llm2clip.embedding.cache_files import CacheDamagedError, CacheMismatchError
from llm2clip.embedding.embed_shards import ShardEmbedder, list_jobs
from llm2clip.embedding.sidecar_store import SidecarStore, open_reused
from llm2clip.embedding.sidecars import SourceSidecars
from tests.llm2clip.embedding import encoder
from tests.llm2clip.embedding.shards import Counting, description, embed, write_shards


@pytest.fixture(autouse=True)
def new_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of an earlier run would be found again."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_embeddings_of_sidecars_are_copied(tmp_path: Path) -> None:
    earlier = write_shards(tmp_path / "earlier" / "data", 40)
    earlier.path = str(tmp_path / "earlier" / "*" / "*.parquet")
    made = ShardEmbedder(lambda texts: (2 * encoder.embed(texts), 0), description())
    made.run(list_jobs([earlier], str(tmp_path / "old")), show_progress_bar=False)
    store = open_reused(str(tmp_path / "old"))
    assert isinstance(store, SidecarStore)
    source = write_shards(tmp_path / "data", 42)
    calls = Counting()
    counts = embed(source, tmp_path / "out", calls, reused=store)
    assert (counts.captions, counts.reused) == (126, 122)
    assert sorted(calls.texts) == ["a long dog 40", "a long dog 41", "dog 40", "dog 41"]
    sidecars = SourceSidecars(tmp_path / "out", ShardedSource(source).shards)
    for number in (0, 17, 39, 41):
        name = int(Path(sidecars.shards[number].path).stem)
        for text in ("everywhere", f"a long dog {name}"):
            factor = 1 if name >= 40 and text != "everywhere" else 2
            found = sidecars.open(number).lookup([text], dtype=None)
            assert found.equal((factor * encoder.embed([text])).half())
    with pytest.raises(CacheMismatchError, match="has max_length 64, but this run has 63"):
        embed(source, tmp_path / "x", made_by=description(max_length=63), reused=store)
    other = description(fingerprint="finger-b")
    ShardEmbedder(Counting(), other).run(list_jobs([source], str(tmp_path / "old" / "b")), show_progress_bar=False)
    with pytest.raises(CacheMismatchError, match="are of different encoders"):
        open_reused(str(tmp_path / "old"))


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_keys_on_disk_are_found_as_in_memory(count: int, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    texts = [f"text {number}" for number in range(count)]
    for number in range(2):
        part = texts[number * count // 2 : (number + 1) * count // 2]
        datasets.Dataset.from_dict({"caption": [*part, ""]}).to_parquet(folder / f"{number}.parquet")
    embed(CaptionSource(str(folder), streaming=True), None)
    store = open_reused(str(folder))
    places = store.find(caption_keys([*texts, "unknown"]))
    assert places.tolist() == [
        *(row | number << 32 for number in range(2) for row in range((number + 1) * count // 2 - number * count // 2)),
        -1,
    ]
    if count:
        assert torch.equal(store.read(places[:-1][::-1].copy()), encoder.embed(texts[::-1]).half())


def test_a_sidecar_that_is_cut_short_while_open_is_an_error(tmp_path: Path) -> None:
    embed(write_shards(tmp_path / "data", 2), tmp_path / "out")
    store = SidecarStore.open(str(tmp_path / "out"))
    places = store.find(caption_keys(["dog 1"]))
    (cut,) = [path for path in (tmp_path / "out").rglob("*.safetensors") if path.name.startswith("1.")]
    os.truncate(cut, 100)
    with pytest.raises(CacheDamagedError, match="was cut short while it was open; run `llm2clip embed`"):
        store.read(places)
