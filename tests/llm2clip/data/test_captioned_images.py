from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil

from llm2clip.data import (
    CaptionImageDataset,
    CaptionSource,
    DamagedImageError,
    EvalTransform,
    SampleIndex,
    Stage2Collator,
    StreamingCaptionImageDataset,
    caption_batches,
    caption_id,
    distinct_captions,
)
from llm2clip.data.rows import CaptionError
from llm2clip.store import EmbeddingCache
from tests.builders.tables import write_table
from tests.llm2clip.store.encoder import build
from tests.processes import run_ranks

from .conftest import CONCEPTS, ROWS, png
from .conftest import captions as made_captions
from .streams import every_caption, write_tars


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingCache:
    """The captions of the rows that the tests read."""
    folder = tmp_path_factory.mktemp("cache")
    build(folder, [*distinct_captions(_concepts(), False), *"abde"])
    return EmbeddingCache.open(folder)


@pytest.fixture
def collator(image_processor: CLIPImageProcessorPil, cache: EmbeddingCache) -> Stage2Collator:
    return Stage2Collator(cache, image_processor, crop_scale=[0.3, 1.0])


def _concepts(split: str = "validation", **fields: Any) -> CaptionSource:
    return CaptionSource(CONCEPTS, split=split, **{"caption_columns": ["caption", "keywords"], **fields})


def test_a_row_has_what_is_stored_and_its_batch_caption_image_and_ids(collator: Stage2Collator) -> None:
    dataset = CaptionImageDataset(_concepts())
    stored = datasets.load_dataset(CONCEPTS, split="validation")[5]
    row = dataset[5]
    assert (row["key"], row["seed_parts"], row["caption_weights"]) == (stored["key"], None, None)
    assert row["caption"] == {name: stored[name] for name in ("caption", "keywords")}
    batch = collator([row])
    ids = [caption_id(stored["caption"]), caption_id(stored["keywords"])]
    assert (batch["keys"], batch["caption_ids"].tolist()) == ([stored["key"]], ids[:1])
    assert batch["image_caption_ids"].tolist() == [ids]
    image = EvalTransform(collator.image_processor)(stored["image"].convert("RGB"))
    torch.testing.assert_close(batch["pixel_values"][0], image)
    assert len(dataset) == 369
    for outside in (369, -1):
        with pytest.raises(IndexError):
            dataset[outside]


def test_caption_and_crop_depend_only_on_seed_epoch_and_index(collator: Stage2Collator) -> None:
    dataset, other = (CaptionImageDataset(_concepts(), seed) for seed in (1, 2))

    def made(dataset: CaptionImageDataset, epoch: int) -> dict[str, Any]:
        return collator([dataset[SampleIndex(epoch, 3)]])

    first, second = made(dataset, 0), made(dataset, 1)
    torch.manual_seed(99)
    again = made(dataset, 0)
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert first["caption_ids"].equal(again["caption_ids"])
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert not torch.equal(first["pixel_values"], made(other, 0)["pixel_values"])
    assert len({int(made(dataset, epoch)["caption_ids"]) for epoch in range(12)}) == 2
    whole = collator.for_evaluation()([dataset[SampleIndex(0, 3)]])
    assert torch.equal(whole["pixel_values"], collator([dataset[3]])["pixel_values"])


def test_several_sources_are_concatenated(made: Path) -> None:
    first = CaptionSource(str(made / "bytes.parquet"))
    second = CaptionSource(str(made / "csv" / "data.csv"), key_column="id")
    dataset = CaptionImageDataset([first, second], with_images=False)
    assert len(dataset) == 2 * ROWS
    assert [dataset[i]["key"] for i in (0, 5, 6, 11)] == [f"{first.path}:0", f"{first.path}:5", "100", "105"]
    assert dataset[ROWS + 2]["caption"] == {"caption": made_captions(2)[0]}
    assert CaptionImageDataset(first, with_images=False)[3]["key"] == "3"


DAMAGED = ["fine", "no image", "no text", "torn", "strip"]
REASONS = {
    "no image": (DamagedImageError, "missing"),
    "no text": (CaptionError, "no text in caption"),
    "torn": (DamagedImageError, "does not recognize its format"),
    "strip": (DamagedImageError, "would be 16 x 2240000"),
}


def _damaged_source(tmp_path: Path) -> CaptionSource:
    images = [png(1), None, png(2), png(3)[:40], png(1, (1, 140_000))]
    columns = {"key": DAMAGED, "image": images, "caption": ["a", "b", "  ", "d", "e"]}
    return CaptionSource(write_table(tmp_path / "damaged.parquet", columns))


@pytest.mark.parametrize("streaming", [False, True])
def test_unusable_rows_raise_with_their_key_or_are_skipped(
    streaming: bool, tmp_path: Path, image_processor: CLIPImageProcessorPil, cache: EmbeddingCache
) -> None:
    source = dataclasses.replace(_damaged_source(tmp_path), streaming=streaming)
    dataset: Any = StreamingCaptionImageDataset(source, training=False) if streaming else CaptionImageDataset(source)
    rows = [*dataset] if streaming else [dataset[row] for row in range(len(DAMAGED))]
    strict = Stage2Collator(cache, image_processor)
    assert len(strict(rows[:1])["pixel_values"]) == 1
    for row in rows[1:]:
        with pytest.raises(REASONS[row["key"]][0], match=f"'{row['key']}' cannot be used"):
            strict([row])
    batch = Stage2Collator(cache, image_processor, "skip")(rows)
    assert batch["keys"] == DAMAGED[:1]
    assert [key for key, _ in batch["skipped"]] == DAMAGED[1:]
    assert all(REASONS[key][1] in reason for key, reason in batch["skipped"])


def test_streaming_and_map_style_evaluation_rows_are_equal() -> None:
    stream = StreamingCaptionImageDataset(_concepts(streaming=True, max_samples=20), training=False)
    table = CaptionImageDataset(_concepts(max_samples=20))
    rows = list(stream)
    assert len(rows) == 20
    for position, row in enumerate(rows):
        expected = table[position]
        assert row.pop("image")["bytes"] == expected.pop("image")["bytes"]
        assert row == expected


def test_stream_order_and_draws_depend_only_on_seed_and_epoch(collator: Stage2Collator) -> None:
    source = _concepts(streaming=True, max_samples=60)

    def run(seed: int, epoch: int) -> tuple[list[str], dict[str, float]]:
        stream = StreamingCaptionImageDataset(source, seed=seed, shuffle_block=30)
        stream.set_epoch(epoch)
        torch.manual_seed(seed + 10 * epoch)
        batch = collator(list(stream))
        sums = batch["pixel_values"].double().sum(dim=(1, 2, 3)).tolist()
        return batch["keys"], dict(zip(batch["keys"], sums, strict=True))

    base, other = run(0, 0), run(0, 1)
    assert base == run(0, 0)
    assert sorted(base[0]) == sorted(other[0])
    assert base[0] not in (other[0], run(1, 0)[0])
    assert base[1] != other[1]


def test_persistent_workers_read_the_new_epoch(made: Path) -> None:
    source = CaptionSource(str(made / "webdataset"), caption_columns=["json.caption"], streaming=True)
    stream = StreamingCaptionImageDataset(source, False, shuffle_block=8)
    loader = DataLoader(stream, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 2, 0):
        stream.set_epoch(epoch)
        orders.append([sample["key"] for sample in loader])
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) > 1


def test_streaming_sources_and_ranks_are_validated(made: Path) -> None:
    plain, streaming = (CaptionSource(str(made / "bytes.parquet"), streaming=on) for on in (False, True))
    with pytest.raises(ValueError, match="use StreamingCaptionImageDataset"):
        CaptionImageDataset(streaming)
    with pytest.raises(ValueError, match="set streaming: true"):
        StreamingCaptionImageDataset(plain)
    with pytest.raises(ValueError, match="2 of 2"):
        StreamingCaptionImageDataset(streaming, rank=2, world_size=2)


@pytest.mark.parametrize("streaming", [False, True])
def test_distinct_captions_are_in_order_of_first_appearance(made: Path, streaming: bool) -> None:
    concepts = CaptionSource(CONCEPTS, split="test", caption_columns=["caption", "caption_de"], streaming=streaming)
    table = datasets.load_dataset(CONCEPTS, split="test").select_columns(["caption", "caption_de"])
    expected = list(dict.fromkeys(text for row in table for text in row.values() if text))
    listed = CaptionSource(str(made / "webdataset"), caption_columns=["json.caption", "json.nested.long"])
    both = distinct_captions([listed, concepts, listed])
    assert both == [text for row in range(ROWS) for text in made_captions(row)] + expected


def test_ranks_read_disjoint_parts_of_the_captions() -> None:
    source = CaptionSource(CONCEPTS, split="test", caption_columns=["caption"])

    def read(rank: int, world: int) -> list[str]:
        return [text for texts in caption_batches(source, rank, world) for text in texts]

    parts = read(0, 2), read(1, 2)
    assert parts[0] + parts[1] == read(0, 1)
    assert abs(len(parts[0]) - len(parts[1])) <= 1
    source.max_samples = 2
    assert [len(read(rank, 4)) for rank in range(4)] == [1, 1, 0, 0]


@pytest.mark.parametrize(("world", "limit"), [(2, None), (8, None), (2, 7)])
def test_ranks_read_files_of_their_own_in_a_stream(world: int, limit: int | None, tmp_path: Path) -> None:
    source = dataclasses.replace(write_tars(tmp_path, 5), max_samples=limit)
    parts = [list(itertools.chain(*caption_batches(source, rank, world))) for rank in range(world)]
    assert sorted(itertools.chain(*parts)) == every_caption(5)[:limit]
    files = [{caption.split()[1] for caption in part} for part in parts]
    assert files[0].isdisjoint(files[1]) == (limit is None)


SHARE_FILES = """
import sys
from pathlib import Path
from llm2clip.data import CaptionSource, captions, distinct_captions, shards
from llm2clip.command_line.processes import leave_process_group, process_state

folder, read, tar_rows, captions.FILES_AT_ONCE = sys.argv[1], [], shards.tar_rows, 1
shards.tar_rows = lambda path, *part: (read.append(Path(path).stem[-1]), tar_rows(path, *part))[1]
state = process_state()
texts = distinct_captions(CaptionSource(folder, caption_columns=["txt"], streaming=True), False, in_all_processes=True)
Path(folder, f"seen-{state.process_index}").write_text("\\n".join(["".join(read), *texts]))
leave_process_group()
"""


def test_processes_share_the_files_of_a_stream_and_know_all_captions(tmp_path: Path) -> None:
    expected = distinct_captions(write_tars(tmp_path / "tars", 5), False)
    (tmp_path / "script.py").write_text(SHARE_FILES)
    run_ranks([str(tmp_path / "script.py"), str(tmp_path / "tars")], 2)
    for rank, files in enumerate(("024", "13")):
        assert (tmp_path / "tars" / f"seen-{rank}").read_text().splitlines() == [files, *expected]


def test_rows_without_a_caption_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    columns = {"caption": ["a", None, " ", "b"], "long": ["c", None, "d", None]}
    source = CaptionSource(write_table(tmp_path / "rows.parquet", columns), caption_columns=[*columns])
    assert distinct_captions(source) == ["a", "c", "d", "b"]
    assert f"1 rows of {source.path} have no caption" in caplog.text


def test_distinct_captions_contain_the_captions_of_every_row() -> None:
    source = _concepts(max_samples=100)
    dataset = CaptionImageDataset(source, with_images=False)
    found = {text for row in dataset.captions("raise") for text in row.texts}
    assert found == set(distinct_captions(source))
