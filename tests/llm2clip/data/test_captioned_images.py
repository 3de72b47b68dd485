from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil

from llm2clip.data import (
    CaptionImageDataset,
    CaptionSource,
    DamagedImageError,
    EvalTransform,
    SampleIndex,
    SampleIndexBatchSampler,
    SkippedSample,
    StreamingCaptionImageDataset,
    TrainTransform,
    caption_batches,
    caption_id,
    distinct_captions,
)
from llm2clip.data.captioned_images import CaptionError

from .conftest import CONCEPTS, ROWS, png
from .conftest import captions as made_captions


@pytest.fixture(scope="module")
def transforms(image_processor: CLIPImageProcessorPil) -> tuple[EvalTransform, TrainTransform]:
    return EvalTransform(image_processor), TrainTransform(image_processor, scale=(0.3, 1.0))


def _concepts(split: str = "validation", **fields: Any) -> CaptionSource:
    return CaptionSource(CONCEPTS, split=split, **{"caption_columns": ["caption", "keywords"], **fields})


def _batches(loader: DataLoader) -> list[list[tuple[str, str, float]]]:
    return [[(s["key"], s["caption"], float(s["pixel_values"].double().sum())) for s in batch] for batch in loader]


def test_sample_has_image_caption_and_ids_of_its_row(transforms: tuple[EvalTransform, TrainTransform]) -> None:
    dataset = CaptionImageDataset(_concepts(), *transforms)
    row = datasets.load_dataset(CONCEPTS, split="validation")[5]
    sample = dataset[5]
    assert isinstance(sample, dict)
    assert (sample["key"], sample["caption"]) == (row["key"], row["caption"])
    assert sample["caption_id"] == caption_id(row["caption"])
    assert sample["image_caption_ids"] == [caption_id(row["caption"]), caption_id(row["keywords"])]
    torch.testing.assert_close(sample["pixel_values"], transforms[0](row["image"].convert("RGB")))
    assert len(dataset) == 369
    for outside in (369, -1):
        with pytest.raises(IndexError):
            dataset[outside]


def test_caption_and_crop_depend_only_on_seed_epoch_and_index(
    transforms: tuple[EvalTransform, TrainTransform],
) -> None:
    dataset = CaptionImageDataset(_concepts(), *transforms, seed=1)
    other = CaptionImageDataset(_concepts(), *transforms, seed=2)
    where = [SampleIndex(0, 3), SampleIndex(1, 3)]
    first, second, reseeded = dataset[where[0]], dataset[where[1]], other[where[0]]
    torch.manual_seed(99)
    again = dataset[where[0]]
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert first["caption"] == again["caption"]
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert not torch.equal(first["pixel_values"], reseeded["pixel_values"])
    assert len({dataset[SampleIndex(epoch, 3)]["caption"] for epoch in range(12)}) == 2


def test_batches_do_not_depend_on_the_number_of_workers(transforms: tuple[EvalTransform, TrainTransform]) -> None:
    source = _concepts(max_samples=24)
    runs = []
    for workers in (0, 2):
        dataset = CaptionImageDataset(source, *transforms, seed=4)
        loader = DataLoader(
            dataset,
            batch_sampler=SampleIndexBatchSampler(dataset, 4, seed=4),
            collate_fn=list,
            num_workers=workers,
        )
        run = []
        for epoch in range(2):
            dataset.set_epoch(epoch)
            run.append(_batches(loader))
        runs.append(run)
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_several_sources_are_concatenated(made: Path) -> None:
    first = CaptionSource(str(made / "bytes.parquet"))
    second = CaptionSource(str(made / "csv" / "data.csv"), key_column="id")
    dataset = CaptionImageDataset([first, second], None)
    assert len(dataset) == 2 * ROWS
    assert [dataset[i]["key"] for i in (0, 5, 6, 11)] == [f"{first.path}:0", f"{first.path}:5", "100", "105"]
    assert dataset[ROWS + 2]["caption"] == made_captions(2)[0]
    assert CaptionImageDataset(first, None)[3]["key"] == "3"


DAMAGED = ["fine", "no image", "no text", "torn", "strip"]


def _damaged_source(tmp_path: Path) -> CaptionSource:
    table = datasets.Dataset.from_dict(
        {
            "key": DAMAGED,
            "image": [png(1), None, png(2), png(3)[:40], png(1, (1, 140_000))],
            "caption": ["a", "b", "  ", "d", "e"],
        }
    )
    table.to_parquet(str(tmp_path / "damaged.parquet"))
    return CaptionSource(str(tmp_path / "damaged.parquet"))


def test_unusable_rows_raise_with_their_key_or_are_skipped(
    tmp_path: Path, transforms: tuple[EvalTransform, TrainTransform]
) -> None:
    source = _damaged_source(tmp_path)
    strict = CaptionImageDataset(source, *transforms)
    lenient = CaptionImageDataset(source, *transforms, on_error="skip")
    assert isinstance(strict[0], dict)
    for index, error, reason in (
        (1, DamagedImageError, "missing"),
        (2, CaptionError, "no text in caption"),
        (3, DamagedImageError, "does not recognize its format"),
        (4, DamagedImageError, "would be 16 x 2240000"),
    ):
        key = DAMAGED[index]
        with pytest.raises(error, match=f"'{key}' cannot be used"):
            strict[index]
        skipped = lenient[index]
        assert isinstance(skipped, SkippedSample)
        assert skipped.key == key
        assert reason in skipped.reason
    with pytest.raises(ValueError, match="on_error is 'ignore', but it has to be one of raise, skip"):
        CaptionImageDataset(source, *transforms, on_error="ignore")  # type: ignore[arg-type]


def test_error_in_a_worker_keeps_its_type_and_key(
    tmp_path: Path, transforms: tuple[EvalTransform, TrainTransform]
) -> None:
    dataset = CaptionImageDataset(_damaged_source(tmp_path), *transforms)
    try:
        dataset[1]
    except DamagedImageError:
        sent = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(DamagedImageError, match="'no image' cannot be used"):
        sent.reraise()


def _stream(transforms: tuple[Any, Any], source: CaptionSource, **options: Any) -> StreamingCaptionImageDataset:
    return StreamingCaptionImageDataset(source, *transforms, **options)


def test_streaming_and_map_style_evaluation_samples_are_equal(
    transforms: tuple[EvalTransform, TrainTransform],
) -> None:
    stream = _stream(transforms, _concepts(streaming=True, max_samples=20), training=False)
    table = CaptionImageDataset(_concepts(max_samples=20), *transforms)
    for position, sample in enumerate(stream):
        expected = table[position]
        assert isinstance(sample, dict)
        assert torch.equal(sample.pop("pixel_values"), expected.pop("pixel_values"))
        assert sample == expected
    assert position == 19


def test_stream_order_and_samples_depend_only_on_seed_and_epoch(
    transforms: tuple[EvalTransform, TrainTransform],
) -> None:
    source = _concepts(streaming=True, max_samples=60)

    def run(seed: int, epoch: int) -> list[tuple[str, str, float]]:
        stream = _stream(transforms, source, seed=seed, shuffle_block=30)
        stream.set_epoch(epoch)
        assert stream.epoch == epoch
        torch.manual_seed(seed + 10 * epoch)
        return [batch[0] for batch in _batches(DataLoader(stream, batch_size=1, collate_fn=list))]

    base = run(0, 0)
    assert base == run(0, 0)
    assert sorted(key for key, _, _ in base) == sorted(key for key, _, _ in run(0, 1))
    assert [key for key, _, _ in base] != [key for key, _, _ in run(0, 1)]
    assert [key for key, _, _ in base] != [key for key, _, _ in run(1, 0)]
    assert {key: pixels for key, _, pixels in base} != {key: pixels for key, _, pixels in run(0, 1)}


@pytest.mark.parametrize(
    ("form", "world", "workers"),
    [("webdataset", 2, 0), ("bytes.parquet", 1, 1), ("saved", 2, 2)],
)
def test_ranks_and_workers_read_disjoint_parts_of_a_stream(made: Path, form: str, world: int, workers: int) -> None:
    columns = ["json.caption"] if form == "webdataset" else ["caption"]
    source = CaptionSource(str(made / form), caption_columns=columns, streaming=True)
    captions, keys = [], []
    for rank in range(world):
        stream = StreamingCaptionImageDataset(source, None, rank=rank, world_size=world, shuffle_block=2)
        for batch in DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=list):
            captions += [sample["caption"].split()[-1] for sample in batch]
            keys += [sample["key"] for sample in batch]
    assert sorted(captions) == [str(row) for row in range(ROWS)]
    assert len(set(keys)) == ROWS


def test_persistent_workers_read_the_new_epoch(made: Path) -> None:
    source = CaptionSource(str(made / "webdataset"), caption_columns=["json.caption"], streaming=True)
    stream = StreamingCaptionImageDataset(source, None, shuffle_block=8)
    loader = DataLoader(stream, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 2, 0):
        stream.set_epoch(epoch)
        orders.append([sample["key"] for sample in loader])
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) > 1


def test_repeating_stream_continues_in_the_order_of_the_next_epoch(made: Path) -> None:
    source = CaptionSource(str(made / "webdataset"), caption_columns=["json.caption"], streaming=True)
    endless = iter(StreamingCaptionImageDataset(source, None, repeat=True))
    got = [next(endless)["key"] for _ in range(3 * ROWS)]
    second = StreamingCaptionImageDataset(source, None)
    second.set_epoch(1)
    assert got[ROWS : 2 * ROWS] == [sample["key"] for sample in second]
    assert Counter(got) == {f"sample{row}": 3 for row in range(ROWS)}


def test_streaming_unusable_rows_raise_or_are_skipped(
    tmp_path: Path, transforms: tuple[EvalTransform, TrainTransform]
) -> None:
    source = _damaged_source(tmp_path)
    source.streaming = True
    samples = list(_stream(transforms, source, on_error="skip"))
    assert {sample.key for sample in samples if isinstance(sample, SkippedSample)} == set(DAMAGED[1:4])
    with pytest.raises((DamagedImageError, CaptionError)):
        list(_stream(transforms, source))


def test_streaming_sources_and_ranks_are_validated(made: Path) -> None:
    path = str(made / "bytes.parquet")
    with pytest.raises(ValueError, match="use StreamingCaptionImageDataset"):
        CaptionImageDataset(CaptionSource(path, streaming=True), None)
    with pytest.raises(ValueError, match="use CaptionImageDataset"):
        StreamingCaptionImageDataset(CaptionSource(path), None)
    with pytest.raises(ValueError, match="2 of 2"):
        StreamingCaptionImageDataset(CaptionSource(path, streaming=True), None, rank=2, world_size=2)


@pytest.mark.parametrize("streaming", [False, True])
def test_distinct_captions_are_in_order_of_first_appearance(made: Path, streaming: bool) -> None:
    concepts = CaptionSource(CONCEPTS, split="test", caption_columns=["caption", "caption_de"], streaming=streaming)
    table = datasets.load_dataset(CONCEPTS, split="test").select_columns(["caption", "caption_de"])
    expected = list(dict.fromkeys(text for row in table for text in row.values() if text))
    assert distinct_captions(concepts) == expected
    assert len(expected) == 488
    listed = CaptionSource(str(made / "webdataset"), caption_columns=["json.caption", "json.nested.long"])
    both = distinct_captions([listed, concepts, listed])
    assert both == [text for row in range(ROWS) for text in made_captions(row)] + expected


def test_ranks_read_disjoint_parts_of_the_captions() -> None:
    source = CaptionSource(CONCEPTS, split="test", caption_columns=["caption"])
    whole, *parts = (
        [text for texts in caption_batches(source, rank, world) for text in texts]
        for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    assert parts[0] + parts[1] == whole
    assert abs(len(parts[0]) - len(parts[1])) <= 1
    source.max_samples = 2
    assert [len([*caption_batches(source, rank, 4)]) for rank in range(4)] == [1, 1, 0, 0]


def test_rows_without_a_caption_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = datasets.Dataset.from_dict({"caption": ["a", None, " ", "b"], "long": ["c", None, "d", None]})
    rows.to_parquet(tmp_path / "rows.parquet")
    source = CaptionSource(str(tmp_path / "rows.parquet"), caption_columns=["caption", "long"])
    assert distinct_captions(source) == ["a", "c", "d", "b"]
    assert f"1 rows of {source.path} have no caption" in caplog.text


def test_distinct_captions_contain_the_caption_of_every_sample() -> None:
    source = _concepts(max_samples=100)
    known = set(distinct_captions(source))
    dataset = CaptionImageDataset(source, None)
    assert {dataset[SampleIndex(epoch, index)]["caption"] for epoch in range(20) for index in range(100)} == known
