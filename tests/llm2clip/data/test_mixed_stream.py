"""Two streams and a table as one stream: mixed in one of three ways, once each in an epoch, resumed anywhere."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from torch.utils.data import DataLoader

from llm2clip.data import CaptionImageDataset, CaptionSource, StreamingCaptionImageDataset
from llm2clip.data.mixed_stream import MixedStream, TableLane
from llm2clip.data.mixing import Mixing
from llm2clip.data.opened_table import SourceError
from llm2clip.data.stream_place import Layout, Place
from tests.llm2clip.data.test_streams import PER_TAR, write_tars

TARS, BATCH = (9, 17), 2
ROWS = 22
TOTAL = PER_TAR * sum(TARS) + ROWS
WAYS: list[Mixing] = ["proportional", "weights", "one_source_per_step"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sources")
    for number, tars in enumerate(TARS):
        write_tars(folder / str(number), tars)
    table = datasets.Dataset.from_dict({"caption": [f"row {row}" for row in range(ROWS)]})
    table.to_parquet(folder / "table.parquet")
    return folder


def opened(folder: Path, mixing: Mixing, rank: int = 0, world: int = 1, **options: Any) -> MixedStream:
    place = {"rank": rank, "world_size": world}
    lanes: list[Any] = []
    for number, tars in enumerate(TARS):
        source = CaptionSource(str(folder / str(number)), caption_columns=["txt"], streaming=True)
        counts = options.pop("row_counts", [PER_TAR] * tars)
        more: dict[str, Any] = {"row_counts": counts, "shuffle_buffer": 4, "repeat": True, **place}
        lanes.append(StreamingCaptionImageDataset(source, None, **more))
    table = CaptionImageDataset(CaptionSource(str(folder / "table.parquet")), None)
    lanes.append(TableLane(table, 0))
    weights = {"weights": (2, 1, 1)} if mixing == "weights" else {}
    return MixedStream(lanes, mixing, buffers=(4, 4, 0), **{**weights, **place, **options})


def batches(stream: MixedStream, workers: int, place: Place) -> Iterator[list[tuple[int, str]]]:
    """Source and caption of each sample, by batch."""
    layout = Layout(stream.world_size, max(1, workers), BATCH, buffers=tuple(stream.buffers))
    stream.place = place.with_layout(layout)
    names = [lane.name for lane in stream.lanes]
    for batch in DataLoader(stream, batch_size=BATCH, num_workers=workers, collate_fn=list):
        yield [(names.index(sample["source"]), sample["caption"]) for sample in batch]


@pytest.fixture(autouse=True)
def _named(monkeypatch: pytest.MonkeyPatch) -> None:
    def finished(self: MixedStream, source: int, sample: Any) -> Any:
        return {**sample, "source": self.lanes[source].name}

    monkeypatch.setattr(MixedStream, "finished", finished)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_sample_of_all_sources_comes_once_in_an_epoch(world: int, workers: int, folder: Path) -> None:
    found: list[tuple[int, str]] = []
    for rank in range(world):
        stream = opened(folder, "proportional", rank, world, repeat=False)
        found += itertools.chain(*batches(stream, workers, Place()))
    assert len(found) == len(set(found)) == TOTAL


def test_proportional_sources_are_spread_over_the_epoch(folder: Path) -> None:
    read = itertools.islice(batches(opened(folder, "proportional"), 0, Place()), TOTAL // BATCH)
    sources = [source for batch in read for source, _ in batch]
    assert Counter(sources) == {0: PER_TAR * TARS[0], 1: PER_TAR * TARS[1], 2: ROWS}
    assert all(Counter(sources[start : start + 50])[2] >= 4 for start in (0, 50))


def test_weights_draw_sources_that_start_over_alone(folder: Path) -> None:
    """Each has its own epochs: of none, a row comes twice before another came once."""
    stream = opened(folder, "weights")
    found = list(itertools.chain(*itertools.islice(batches(stream, 1, Place()), 300)))
    shares = Counter(source for source, _ in found)
    assert 0.43 < shares[0] / len(found) < 0.57
    assert 0.18 < shares[2] / len(found) < 0.32
    for source in range(3):
        times = Counter(caption for number, caption in found if number == source)
        assert max(times.values()) - min(times.values()) <= 1


@pytest.mark.parametrize("weights", [(), (1, 1, 8)])
def test_all_ranks_have_the_same_source_in_a_step(weights: tuple[int, ...], folder: Path) -> None:
    steps = 100
    streams = [opened(folder, "one_source_per_step", rank, 2, weights=weights) for rank in range(2)]
    ranks = [list(itertools.islice(batches(stream, 2, Place()), steps)) for stream in streams]
    sources = []
    for batch in zip(*ranks, strict=True):
        (source,) = {source for rows in batch for source, _ in rows}
        sources.append(source)
    shares = Counter(sources)
    expected = [PER_TAR * TARS[0] / TOTAL, PER_TAR * TARS[1] / TOTAL, ROWS / TOTAL] if not weights else [0.1, 0.1, 0.8]
    assert all(abs(shares[source] / steps - share) < 0.1 for source, share in enumerate(expected))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mixing", WAYS)
def test_a_resumed_mixture_goes_on_where_it_was(mixing: Mixing, workers: int, folder: Path) -> None:
    """In the first epoch of 25 steps, and in the third."""
    stream = opened(folder, mixing, 1, 2)
    unbroken = list(itertools.islice(batches(stream, workers, Place()), 60))
    assert stream.place is not None
    for step in (7, 25, 26, 55):
        assert list(itertools.islice(batches(stream, workers, stream.place.at(step)), 60 - step)) == unbroken[step:]


def test_other_numbers_of_processes_read_what_is_left_of_a_mixture(folder: Path) -> None:
    found: Counter[tuple[int, str]] = Counter()
    place = Place()
    for world, workers, steps in ((2, 2, 9), (4, 0, 3), (1, 1, 20)):
        streams = [opened(folder, "proportional", rank, world) for rank in range(world)]
        for stream in streams:
            for batch in itertools.islice(batches(stream, workers, place), steps):
                found.update(batch)
        assert streams[0].place is not None
        place = streams[0].place.at(place.step + steps)
    assert sum(found.values()) == TOTAL == 100
    assert set(found.values()) == {1}


@pytest.mark.parametrize(
    ("mixing", "options", "message"),
    [
        ("weights", {"weights": ()}, "needs a weight for every source"),
        ("weights", {"weights": (1, None, 2)}, "1 has no weight, but others have"),
        ("proportional", {"weights": (1, 1, 2)}, "mixing: proportional has no weights"),
        ("proportional", {"row_counts": None}, "needs the number of rows of every source, but that of .*0 is unknown"),
        ("one_source_per_step", {"row_counts": None}, "needs the number of rows of every source"),
    ],
)
def test_impossible_mixtures_are_refused(mixing: Mixing, options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises((ValueError, SourceError), match=message):
        opened(folder, mixing, **options)


def test_a_source_with_fewer_rows_than_readers_is_refused(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"table\.parquet has 22 rows, fewer than 24 readers"):
        opened(folder, "proportional", 0, 8).require_files(3)
