"""Stage 2 on a stream whose embeddings lie in sidecars: the same training as from a cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
import torch
from safetensors.torch import load_file

from llm2clip.data import CaptionSource, SkippedSample, StreamingCaptionImageDataset
from llm2clip.data.shards import ShardedSource
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.encoders import embed
from llm2clip.store import EmbeddingCache, MissingCaptionError, StoreManifest, StoreMismatchError
from llm2clip.store.manifest import manifest_path
from llm2clip.store.shards import write_shard
from llm2clip.trainers import run_stage2
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.manifests import MANIFEST_CHECKSUM, with_checksum
from llm2clip.utils.settings import build_config
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.test_stage2 import losses, weights
from tests.tars import write_tar

TARS, PER_TAR = 3, 24


def write_tars(folder: Path, tars: int = TARS) -> str:
    """The first rows of the bundled images as webdataset shards."""
    folder.mkdir()
    table = datasets.load_dataset("parquet", data_files=f"{tiny.CONCEPTS}/train.parquet", split="train")
    table = table.cast_column("image", datasets.Image(decode=False))
    for shard in range(tars):
        files = []
        for row in table.select(range(shard * PER_TAR, (shard + 1) * PER_TAR)):
            texts = {name: row[name] for name in ("caption", "keywords")}
            files += [
                (f"{row['key']}.webp", row["image"]["bytes"]),
                (f"{row['key']}.json", json.dumps(texts).encode()),
            ]
        write_tar(folder / f"{shard}.tar", files)
    return str(folder)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tars(tmp_path_factory.mktemp("stream") / "tars")


def source(tars: str, **fields: Any) -> dict[str, Any]:
    return {"path": tars, "streaming": True, "caption_columns": ["json.caption", "json.keywords"], **fields}


def embedded(inputs: Inputs, folder: Path, *sources: dict[str, Any], **fields: Any) -> dict[str, Any]:
    settings = {"text_model_name_or_path": inputs.text, "output_dir": str(folder), "sources": list(sources), **fields}
    return embed.run(build_config(embed.EmbedConfig, settings))


def train(folder: Path, inputs: Inputs, cache: Path, tars: str, resume: bool = False, **changes: Any) -> None:
    fields = tiny.stage2_fields(folder, inputs.vision, inputs.text, str(cache)) | {"eval_sources": {}}
    fields |= {"sources": [source(tars)], "shuffle_block": 8, "save_strategy": "no"}
    run_stage2.run(build_config(Stage2Recipe, fields | changes), resume)


def test_sidecars_train_as_the_cache_does(inputs: Inputs, tars: str, tmp_path: Path) -> None:
    found = embedded(inputs, tmp_path / "sidecars", source(tars))
    assert (found["num_shards"], found["num_shards_done_before"]) == (TARS, 0)
    assert embedded(inputs, tmp_path / "cache", source(tars), store="cache")["num_captions"] <= found["num_captions"]
    for name in ("cache", "sidecars"):
        train(tmp_path / name / "run", inputs, tmp_path / name, tars)
    assert losses(tmp_path / "sidecars" / "run") == losses(tmp_path / "cache" / "run")
    expected = weights(tmp_path / "cache" / "run")
    for name, value in weights(tmp_path / "sidecars" / "run").items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


def test_sidecars_beside_the_shards_are_found_there(inputs: Inputs, tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars")
    assert embedded(inputs, Path(), source(tars), output_dir="")["num_shards"] == TARS
    assert len(list((tmp_path / "tars").iterdir())) == 3 * TARS
    # The folder of the source now contains other files too.
    assert embedded(inputs, Path(), source(tars), output_dir="")["num_shards_done_before"] == TARS
    train(tmp_path / "run", inputs, tmp_path / "tars", tars, max_steps=1)


def test_retrieval_sets_are_measured_from_a_cache(inputs: Inputs, tars: str, tmp_path: Path) -> None:
    embedded(inputs, tmp_path / "sidecars", source(tars))
    sets = {"eval_sources": {"validation": tiny.concepts("validation", caption_columns=["caption"], max_samples=40)}}
    with pytest.raises(ValueError, match="set eval_embedding_cache to it"):
        train(tmp_path / "run", inputs, tmp_path / "sidecars", tars, **sets)
    changes = {**sets, "eval_embedding_cache": inputs.cache, "max_steps": 1}
    train(tmp_path / "run", inputs, tmp_path / "sidecars", tars, **changes)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_validation_text_to_image_mean_rank" in entry for entry in history)


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (8, 0), (2, 2)])
def test_every_sample_has_the_embedding_of_its_caption_and_comes_once(
    world: int, workers: int, inputs: Inputs, tars: str, tmp_path: Path
) -> None:
    """Also with more readers than files."""
    embedded(inputs, tmp_path / "sidecars", source(tars))
    embedded(inputs, tmp_path / "cache", source(tars), store="cache")
    cache = EmbeddingCache.open(tmp_path / "cache")
    stream = CaptionSource.from_dict(source(tars))
    beside = SourceSidecars(tmp_path / "sidecars", ShardedSource(stream).shards).open
    keys: list[str] = []
    for rank in range(world):
        rows = StreamingCaptionImageDataset(
            stream, None, rank=rank, world_size=world, shuffle_block=8, embeddings=beside, row_counts=[PER_TAR] * TARS
        )
        rows.set_epoch(3)
        for sample in torch.utils.data.DataLoader(rows, batch_size=None, num_workers=workers):
            keys.append(sample["key"])
            assert sample["llm_embeds"].equal(cache.lookup([sample["caption"]], dtype=None)[0])
    assert len(keys) == len(set(keys)) == TARS * PER_TAR


def test_a_caption_without_embedding_is_an_error_or_skipped(inputs: Inputs, tars: str, tmp_path: Path) -> None:
    embedded(inputs, tmp_path / "sidecars", source(tars))
    path = tmp_path / "sidecars" / "1.emb.safetensors"
    rows = load_file(path)
    rows["keys"][0] += 1
    write_shard(path, rows, StoreManifest.read(manifest_path(path)))
    stream = CaptionSource.from_dict(source(tars))
    opened = ShardedSource(stream)
    lost = next(iter(opened.read(opened.shards[1]).captions))
    beside = SourceSidecars(tmp_path / "sidecars", opened.shards).open
    options: dict[str, Any] = {"training": False, "embeddings": beside}
    with pytest.raises(MissingCaptionError, match=r"its caption has no stored embedding\. .* Run `llm2clip embed`"):
        list(StreamingCaptionImageDataset(stream, None, **options))
    samples = list(StreamingCaptionImageDataset(stream, None, on_error="skip", **options))
    plain = list(StreamingCaptionImageDataset(stream, None, training=False))
    skipped = {sample.key: sample.reason for sample in samples if isinstance(sample, SkippedSample)}
    assert skipped == {
        sample["key"]: "its caption has no stored embedding"
        for number, sample in enumerate(plain)
        if sample["caption"] == lost and number // PER_TAR == 1
    }
    assert skipped


def test_sidecars_that_do_not_fit_are_refused_before_training(inputs: Inputs, tars: str, tmp_path: Path) -> None:
    embedded(inputs, tmp_path / "part", source(tars), shard_slice="0/2")
    with pytest.raises(MissingCaptionError, match=r"do not fit 1 of 3 shards: 1\.tar has none"):
        train(tmp_path / "run", inputs, tmp_path / "part", tars)
    embedded(inputs, tmp_path / "one", source(tars, caption_columns=["json.caption"]))
    with pytest.raises(MissingCaptionError, match=r"that of 0\.tar lacks the column json\.keywords"):
        train(tmp_path / "run", inputs, tmp_path / "one", tars)
    drawn = {"sources": [source(tars, caption_weights=[1, 0])]}
    train(tmp_path / "drawn", inputs, tmp_path / "one", tars, max_steps=1, **drawn)
    with pytest.raises(ValueError, match="which only a source with streaming: true reads"):
        train(tmp_path / "run", inputs, tmp_path / "one", tars, sources=[tiny.concepts()])
    for path in sorted((tmp_path / "one").glob("*.manifest")):
        fields = json.loads(path.read_text())
        fields["identity"]["fingerprint"] = "2-" + 64 * "0"
        del fields[MANIFEST_CHECKSUM]
        path.write_text(json.dumps(with_checksum(fields)))
    with pytest.raises(StoreMismatchError, match="but the text encoder in use has fingerprint"):
        train(tmp_path / "run", inputs, tmp_path / "one", tars, **drawn)


def test_remote_shards_and_sidecars_train_as_local_ones(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also resumed, where rows are entered within a file."""
    tars = write_tars(tmp_path / "tars")
    embedded(inputs, Path(), source(tars), output_dir="")
    files = fsspec.filesystem("memory")
    files.put(tars, "/remote/tars", recursive=True)
    try:
        changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        train(tmp_path / "local", inputs, Path(tars), tars, **changes)
        remote = {"sources": [source("memory://remote/tars/*.tar")], "embedding_cache": "memory://remote/tars"}
        train(tmp_path / "remote", inputs, Path(tars), tars, **remote, **changes)
        assert losses(tmp_path / "remote") == losses(tmp_path / "local")
        builders: list[str] = []
        load = datasets.load_dataset_builder
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda **a: (builders.append(a["path"]), load(**a))[1])
        shutil.rmtree(tmp_path / "remote" / "checkpoint-4")
        train(tmp_path / "remote", inputs, Path(tars), tars, resume=True, **remote, **changes)
        assert losses(tmp_path / "remote") == losses(tmp_path / "local")
        assert builders == ["webdataset"], "the stream is opened once"
    finally:
        files.rm("/remote", recursive=True)


def test_the_steps_of_a_stream_are_computed_where_they_are_missing(inputs: Inputs, tars: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_steps is -1: 3 epochs of 72 rows are max_steps: 14"):
        train(tmp_path / "run", inputs, Path(inputs.cache), tars, max_steps=-1, num_train_epochs=3, verify_cache=False)
