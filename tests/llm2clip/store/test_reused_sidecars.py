"""A folder of sidecars opened as a cache: every caption is found."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch

from llm2clip.data import CaptionSource, distinct_captions
from llm2clip.data.shards import ShardedSource
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.store.manifest import StoreMismatchError
from llm2clip.store.store import EmbeddingCache, caption_keys
from tests.builders.tables import write_table
from tests.llm2clip.encoders.shards import Counting, description, embed, write_shards
from tests.llm2clip.store import encoder


@pytest.fixture(autouse=True)
def new_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of an earlier run would be found again."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["sidecars", "cache"])
def test_stored_embeddings_are_copied(kind: str, tmp_path: Path) -> None:
    earlier, old = write_shards(tmp_path / "earlier" / "data", 20), tmp_path / "old"
    earlier.path = str(tmp_path / "earlier" / "*" / "*.parquet")
    if kind == "cache":
        encoder.build(old, distinct_captions(earlier), doubled, text_model="tiny")
    else:
        embed(earlier, old, lambda texts: (doubled(texts), 0))
    store, calls = EmbeddingCache.open(old), Counting()
    source = write_shards(tmp_path / "data", 22)
    counts = embed(source, tmp_path / "out", calls, reused=store)
    assert (counts.captions, counts.reused) == (66, 62)
    assert sorted(calls.texts) == ["a long dog 20", "a long dog 21", "dog 20", "dog 21"]
    sidecars = SourceSidecars(tmp_path / "out", ShardedSource(source).shards)
    for number in (0, 17, 19, 21):
        name = int(Path(sidecars.shards[number].path).stem)
        for text in ("everywhere", f"a long dog {name}"):
            expected = encoder.embed([text]) if name >= 20 and text != "everywhere" else doubled([text])
            assert sidecars.open(number).lookup([text], dtype=None).equal(expected.half())
    with pytest.raises(StoreMismatchError, match="with max_length 64, but this run has max_length 63"):
        embed(source, tmp_path / "x", made_by=description(max_length=63), reused=store)


def doubled(texts: list[str]) -> torch.Tensor:
    return 2 * encoder.embed(texts)


def test_sidecars_of_two_encoders_are_no_cache(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "data", 1)
    embed(source, tmp_path / "old" / "a")
    embed(source, tmp_path / "old" / "b", made_by=description(fingerprint="finger-b"))
    with pytest.raises(StoreMismatchError, match="are of different encoders"):
        EmbeddingCache.open(tmp_path / "old")


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_keys_on_disk_are_found_as_in_memory(count: int, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    texts = [f"text {number}" for number in range(count)]
    for number in range(2):
        part = texts[number * count // 2 : (number + 1) * count // 2]
        write_table(folder / f"{number}.parquet", {"caption": [*part, ""]})
    embed(CaptionSource(str(folder), streaming=True), None)
    store = EmbeddingCache.open(folder)
    assert store.find(caption_keys([*texts, "unknown"])).tolist() == [*range(count), -1]
    if count:
        assert torch.equal(store.lookup(texts[::-1], dtype=None), encoder.embed(texts[::-1]).half())
