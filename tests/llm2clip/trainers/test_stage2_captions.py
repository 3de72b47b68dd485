"""Stage 2 on streams whose embeddings lie in sidecars: trained as from a cache, resumed without reading rows again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor

from llm2clip.command_line.processes import leave_process_group
from llm2clip.command_line.settings import build_config
from llm2clip.data import CaptionSource, Stage2Collator, StreamingCaptionImageDataset
from llm2clip.data import tars as tar_reader
from llm2clip.data.shards import ShardedSource
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.data.stream_order import BLOCK
from llm2clip.files.atomic import read_json
from llm2clip.files.manifests import FOLDER_MANIFEST, MANIFEST_CHECKSUM, with_checksum
from llm2clip.store import EmbeddingCache, MissingCaptionError, StoreManifest, StoreMismatchError
from llm2clip.store.manifest import manifest_path
from llm2clip.store.shards import ComputedRows, write_shard
from llm2clip.trainers import run_stage2
from llm2clip.trainers.stage2_config import Stage2Recipe
from tests.builders import small_runs
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import (
    PER_TAR,
    TARS,
    assert_equal,
    broken_after,
    embedded,
    fields_of,
    history,
    losses,
    on_stream,
    source,
    write_tars,
)
from tests.processes import run_ranks

STEPS, BATCH = 7, 16
SAVED = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def tars(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards with their sidecars beside them; 72 rows, four and a half batches."""
    folder = write_tars(tmp_path_factory.mktemp("stream") / "tars")
    embedded(inputs, Path(), source(folder), output_dir="")
    return folder


def test_sidecars_train_as_the_cache_does(inputs: Inputs, tars: str, tmp_path: Path) -> None:
    # They lie in the folder of the source, which contains other files now.
    assert embedded(inputs, Path(), source(tars), output_dir="")["num_shards_done_before"] == TARS
    found = embedded(inputs, tmp_path / "sidecars", source(tars))
    assert (found["num_shards"], found["num_shards_done_before"]) == (TARS, 0)
    embedded(inputs, tmp_path / "cache", source(tars), store="cache")
    runs = {"beside": Path(tars), "sidecars": tmp_path / "sidecars", "cache": tmp_path / "cache"}
    for name, cache in runs.items():
        on_stream(tmp_path / "run" / name, inputs, cache, tars, max_steps=3)
        assert losses(tmp_path / "run" / name) == losses(tmp_path / "run" / "beside")
        assert_equal(tmp_path / "run" / "beside", tmp_path / "run" / name, atol=1e-6)


def test_retrieval_sets_are_measured_from_a_cache(inputs: Inputs, tars: str, tmp_path: Path) -> None:
    sets = {
        "eval_sources": {"validation": small_runs.concepts("validation", caption_columns=["caption"], max_samples=40)}
    }
    with pytest.raises(ValueError, match="set eval_embedding_cache to it"):
        on_stream(tmp_path, inputs, Path(tars), tars, **sets)
    on_stream(tmp_path, inputs, Path(tars), tars, **sets, eval_embedding_cache=inputs.cache, max_steps=1)
    assert any("eval_validation_text_to_image_mean_rank" in entry for entry in history(tmp_path))


# Also more readers than files.
@pytest.mark.parametrize(("world", "workers"), [(2, 0), (8, 0), (2, 2)])
def test_every_sample_has_the_embedding_of_its_caption_and_comes_once(
    world: int, workers: int, inputs: Inputs, tars: str, tmp_path: Path
) -> None:
    embedded(inputs, tmp_path / "cache", source(tars), store="cache")
    cache = EmbeddingCache.open(tmp_path / "cache")
    stream = CaptionSource.from_dict(source(tars))
    options: Any = {"embeddings": SourceSidecars(tars, ShardedSource(stream).shards), "shuffle_block": 8}
    processor = AutoImageProcessor.from_pretrained(inputs.vision)
    keys: list[str] = []
    for rank in range(world):
        options |= {"rank": rank, "world_size": world, "row_counts": [PER_TAR] * TARS}
        rows = StreamingCaptionImageDataset(stream, **options)
        rows.set_epoch(3)
        rows.batch_size = 4

        def collated(samples: list[dict[str, Any]]) -> tuple[Any, Any]:
            """The batch from the sidecars, and from the cache."""
            plain = [{name: x for name, x in row.items() if name != "embedding_cache"} for row in samples]
            beside = Stage2Collator(processor=processor)(samples)
            return beside, Stage2Collator(cache, processor)(plain)

        for beside, expected in DataLoader(rows, 4, num_workers=workers, collate_fn=collated):
            keys += beside["keys"]
            assert beside["llm_embeds"].equal(expected["llm_embeds"])
            assert beside["caption_ids"].equal(expected["caption_ids"])
    assert len(keys) == len(set(keys)) == TARS * PER_TAR


def test_a_caption_without_embedding_is_an_error_or_skipped(inputs: Inputs, tars: str, tmp_path: Path) -> None:
    embedded(inputs, tmp_path, source(tars))
    path = tmp_path / "1.emb.safetensors"
    rows = load_file(path)
    rows["keys"][0] += 1
    write_shard(path, rows["keys"].numpy(), [ComputedRows(rows["rows"])], StoreManifest.read(manifest_path(path)))
    stream = CaptionSource.from_dict(source(tars))
    opened = ShardedSource(stream)
    lost = opened.read(opened.shards[1])[0][0]
    sidecars = SourceSidecars(tmp_path, opened.shards)
    rows = list(StreamingCaptionImageDataset(stream, training=False, embeddings=sidecars))
    processor = AutoImageProcessor.from_pretrained(inputs.vision)
    with pytest.raises(MissingCaptionError, match=r"1\.emb.* lacks .* captions.* Run `llm2clip embed`"):
        Stage2Collator(processor=processor)(rows)
    first = [(row["key"], row["caption"]["json.caption"]) for row in rows[PER_TAR : 2 * PER_TAR]]
    skipped = Stage2Collator(processor=processor, on_error="skip")(rows)["skipped"]
    assert {key for key, _ in skipped} == {key for key, text in first if text == lost} != set()


def test_sidecars_that_do_not_fit_are_refused_before_training(inputs: Inputs, tars: str, tmp_path: Path) -> None:
    part, one = tmp_path / "part", tmp_path / "one"
    embedded(inputs, part, source(tars), shard_slice="0/2")
    embedded(inputs, one, source(tars, caption_columns=["json.caption"]))
    drawn = {"sources": [source(tars, caption_weights=[1, 0])]}
    on_stream(tmp_path / "drawn", inputs, one, tars, max_steps=1, **drawn)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (part, {}, r"do not fit 1 of 3 shards: 1\.tar has none"),
        (one, {}, r"that of 0\.tar lacks the column json\.keywords"),
        (
            one,
            {"sources": [small_runs.concepts()], "shuffle_block": BLOCK},
            "which only a source with streaming: true reads",
        ),
    ]
    for cache, changes, message in cases:
        with pytest.raises((MissingCaptionError, ValueError), match=message):
            on_stream(tmp_path / "run", inputs, cache, tars, **changes)
    for path in sorted(one.glob("*.manifest")):
        fields = json.loads(path.read_text())
        fields["identity"]["fingerprint"] = "2-" + 64 * "0"
        del fields[MANIFEST_CHECKSUM]
        path.write_text(json.dumps(with_checksum(fields)))
    with pytest.raises(StoreMismatchError, match="but the text encoder in use has fingerprint"):
        on_stream(tmp_path / "run", inputs, one, tars, **drawn)
    uncounted = {"max_steps": -1, "num_train_epochs": 3, "verify_cache": False}
    with pytest.raises(ValueError, match=r"max_steps is -1: 3 epochs of 72 rows are max_steps: 14"):
        on_stream(tmp_path / "run", inputs, Path(inputs.cache), tars, **uncounted)


def test_remote_shards_and_sidecars_train_and_resume_as_local_ones(
    inputs: Inputs, tars: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = fsspec.filesystem("memory")
    files.put(tars, "/remote/tars", recursive=True)
    try:
        changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        on_stream(tmp_path / "local", inputs, Path(tars), tars, **changes)
        changes |= {"sources": [source("memory://remote/tars/*.tar")], "embedding_cache": "memory://remote/tars"}
        on_stream(tmp_path / "remote", inputs, Path(tars), tars, **changes)
        assert losses(tmp_path / "remote") == losses(tmp_path / "local")
        builders: list[str] = []
        load = datasets.load_dataset_builder
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda **a: (builders.append(a["path"]), load(**a))[1])
        shutil.rmtree(tmp_path / "remote" / "checkpoint-4")
        on_stream(tmp_path / "remote", inputs, Path(tars), tars, resume=True, **changes)
        assert losses(tmp_path / "remote") == losses(tmp_path / "local")
        assert builders == ["webdataset"], "the stream is opened once"
    finally:
        files.rm("/remote", recursive=True)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_unbroken_one_and_decodes_nothing_again(
    workers: int, inputs: Inputs, tars: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first epoch and in the second, which begins within the fifth step."""
    # Random numbers of the model too.
    changes = {"dataloader_num_workers": workers, "patch_dropout": 0.3, "max_steps": STEPS, **SAVED, "save_steps": 3}
    on_stream(tmp_path / "unbroken", inputs, Path(tars), tars, **changes)
    made: list[str] = []
    read: list[str] = []
    make, decoded = Stage2Collator._prepared, tar_reader._decoded
    monkeypatch.setattr(Stage2Collator, "_prepared", lambda self, *a: (made.append(a[0]["key"]), make(self, *a))[1])
    monkeypatch.setattr(tar_reader, "_decoded", lambda path, key, *a: (read.append(key), decoded(path, key, *a))[1])
    for step, again in [(3, False), (6, False), (3, True)]:
        folder = tmp_path / str(step) if again else broken_after(tmp_path / "unbroken", tmp_path / str(step), step)
        made.clear()
        read.clear()
        on_stream(folder, inputs, Path(tars), tars, resume=True, **changes)
        assert_equal(tmp_path / "unbroken", folder, atol=1e-6)
        assert losses(folder) == losses(tmp_path / "unbroken")
        if workers == 0:
            assert len(made) == (0 if again else (STEPS - step) * BATCH)
            state = read_json(folder / "checkpoint-7" / "run_state.json")["stream"]
            assert state["rows"] == STEPS * BATCH
            # Lanes of one or two rows here: of each at most what is trained on, and the rest of its block.
            assert len(read) <= len(made) + state["lanes"]["number"]
    epoch = read_json(tmp_path / "6" / "trainer_state.json")["epoch"]
    assert epoch == pytest.approx(STEPS * BATCH / (TARS * PER_TAR))


@pytest.fixture(scope="module")
def mixture(inputs: Inputs, tars: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two streams with sidecars beside their shards, and a table with a cache."""
    other = write_tars(tmp_path_factory.mktemp("other") / "tars", 2)
    embedded(inputs, Path(), source(other), output_dir="")
    streams = [source(folder, embedding_cache=folder) for folder in (other, tars)]
    return [*streams, small_runs.concepts("validation", max_samples=40)]


@pytest.mark.parametrize(
    ("mixing", "workers"),
    [
        ("proportional", 0),
        ("weights", 0),
        ("one_source_per_step", 0),
        pytest.param("proportional", 2, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_on_streams_and_a_table_equals_an_unbroken_one(
    mixing: str, workers: int, mixture: list[dict[str, Any]], inputs: Inputs, tmp_path: Path
) -> None:
    sources = [{**fields, "weight": weight} for fields, weight in zip(mixture, (2, 1, 1), strict=True)]
    changes: dict[str, Any] = {
        "mixing": mixing,
        "dataloader_num_workers": workers,
        "max_steps": 13,
        **SAVED,
        "save_steps": 4,
    }
    changes["sources"] = mixture if mixing == "proportional" else sources
    on_stream(tmp_path / "unbroken", inputs, Path(inputs.cache), "", **changes)
    for step in (4, 12):  # in the first epoch of 160 rows, and in the second
        folder = broken_after(tmp_path / "unbroken", tmp_path / str(step), step)
        on_stream(folder, inputs, Path(inputs.cache), "", resume=True, **changes)
        assert_equal(tmp_path / "unbroken", folder, atol=1e-6)
        assert losses(folder) == losses(tmp_path / "unbroken")


def test_weights_mix_tables_but_not_stored_features(inputs: Inputs, tmp_path: Path) -> None:
    sources = [
        small_runs.concepts(max_samples=48, weight=3),
        small_runs.concepts("validation", max_samples=40, weight=1),
    ]
    changes: dict[str, Any] = {"sources": sources, "mixing": "weights", "max_steps": 2, "shuffle_block": BLOCK}
    on_stream(tmp_path / "run", inputs, Path(inputs.cache), "", **changes)
    with pytest.raises(ValueError, match="no source can be a stream or have a weight"):
        on_stream(tmp_path / "no", inputs, Path(inputs.cache), "", **changes, freeze_vision="all")


def test_steps_of_several_batches_are_resumed(inputs: Inputs, tars: str, tmp_path: Path) -> None:
    changes = {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "max_steps": 4, **SAVED}
    on_stream(tmp_path / "unbroken", inputs, Path(tars), tars, **changes)
    folder = broken_after(tmp_path / "unbroken", tmp_path / "broken", 2)
    on_stream(folder, inputs, Path(tars), tars, resume=True, **changes)
    assert_equal(tmp_path / "unbroken", folder, atol=1e-6)


def test_changed_shards_and_another_order_are_refused_and_the_stream_starts_over_if_asked(
    inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tars = write_tars(tmp_path / "tars")
    embedded(inputs, Path(), source(tars), output_dir="")
    unbroken, changes = tmp_path / "unbroken", {"max_steps": 3, **SAVED}
    on_stream(unbroken, inputs, Path(tars), tars, **changes)

    def go_on(name: str, step: int = 2, **more: Any) -> None:
        folder = tmp_path / name
        if not folder.exists():
            broken_after(unbroken, folder, step)
        on_stream(folder, inputs, Path(tars), tars, resume=True, **changes, **more)

    over = {"ignore_data_skip": True, "resume_anyway": True}
    with pytest.raises(ValueError, match=r"a stream with shuffle_blocks \[\d+\], now it is \[7\]"):
        go_on("order", shuffle_block=7, resume_anyway=True)
    go_on("order", shuffle_block=7, **over)
    # A checkpoint that does not say which rows were read.
    folder = broken_after(unbroken, tmp_path / "unknown", 2)
    for name in (FOLDER_MANIFEST, "run_state.json"):
        (folder / "checkpoint-2" / name).unlink()
    go_on("unknown", resume_from_checkpoint=str(folder / "checkpoint-2"), resume_anyway=True)
    assert "has no position in a stream: training continues from its first row" in caplog.text
    (tmp_path / "tars" / "2.tar").unlink()
    with pytest.raises(ValueError, match=r"the files of .*tars, or their numbers of rows, are not those of the run"):
        go_on("changed")
    go_on("changed", **over)


def train_noting_keys(path: Path) -> None:
    """Train, and add the keys of every batch of this process to a file."""
    fields = json.loads(path.read_text())
    config = build_config(Stage2Recipe, fields)
    trainer = run_stage2.build_trainer(config)
    collate = trainer.data_collator

    def noting(samples: list[dict[str, Any]]) -> dict[str, Any]:
        with path.with_name(f"keys-{config.process_index}").open("a") as file:
            file.writelines(f"{sample['key']}\n" for sample in samples)
        return collate(samples)

    trainer.data_collator = noting
    trainer.train(resume_from_checkpoint=fields.get("resume_from_checkpoint"))


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [True, False])
def test_one_process_goes_on_where_two_were(streaming: bool, inputs: Inputs, tars: str, tmp_path: Path) -> None:
    """With the batches of the two, of a stream and of a table."""
    data: dict[str, Any] = {"sources": [source(tars)] if streaming else [small_runs.concepts(max_samples=64)]}
    data |= {
        "embedding_cache": tars if streaming else inputs.cache,
        "eval_sources": {},
        "shuffle_block": 8 if streaming else BLOCK,
    }
    steps = {"per_device_train_batch_size": 8, "max_steps": 4, "save_steps": 2}
    fields = fields_of("stage2", tmp_path / "run", inputs, **data, **steps)
    recipe = tmp_path / "fields.json"
    recipe.write_text(json.dumps(fields))
    run_ranks(["-m", "tests.llm2clip.trainers.test_stage2_captions", str(recipe)], 2)
    alone = broken_after(tmp_path / "run", tmp_path / "alone", 2)
    keys = [tmp_path / f"keys-{rank}" for rank in range(2)]
    first = [key for path in keys for key in path.read_text().split()[:16]]
    for path in keys:
        path.unlink()
    changes = {"output_dir": str(alone), "resume_from_checkpoint": str(alone / "checkpoint-2")}
    recipe.write_text(json.dumps(fields | changes))
    train_noting_keys(recipe)
    rest = keys[0].read_text().split()
    assert len(rest) == 32, "two steps with the batch of two processes"
    assert len({*first, *rest}) == 64
    epoch = read_json(alone / "checkpoint-4" / "trainer_state.json")["epoch"]
    assert epoch == pytest.approx(64 / (TARS * PER_TAR if streaming else 64))
    assert losses(alone / "checkpoint-4") == pytest.approx(losses(tmp_path / "run" / "checkpoint-4"), abs=1e-4)


if __name__ == "__main__":
    train_noting_keys(Path(sys.argv[1]))
    leave_process_group()
