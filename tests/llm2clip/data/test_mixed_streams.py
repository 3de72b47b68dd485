"""Several sources as one stream: mixed in one of three ways, in one order for any number of readers."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llm2clip.data import CaptionImageDataset, CaptionSource
from llm2clip.data.formats import SourceError
from llm2clip.data.stream_order import Lanes, Mixing
from llm2clip.data.streams import SampleStream, TableSource
from tests.builders.tables import write_table
from tests.llm2clip.data.streams import BATCH, PER_TAR, batches, opened, steps_of, write_tars

MIXED_TARS, TABLE_ROWS = (9, 17), 22
TOTAL = PER_TAR * sum(MIXED_TARS) + TABLE_ROWS
WAYS: list[Mixing] = ["proportional", "weights", "one_source_per_step"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sources")
    for number, tars in enumerate(MIXED_TARS):
        write_tars(folder / str(number), tars, name=f"{number} caption")
    write_table(folder / "table.parquet", {"caption": [f"2 row {row}" for row in range(TABLE_ROWS)]})
    return folder


def mixed(folder: Path, mixing: Mixing, rank: int = 0, world: int = 1, **options: Any) -> SampleStream:
    place = {"rank": rank, "world_size": world}
    sources: list[Any] = []
    for number, tars in enumerate(MIXED_TARS):
        source = CaptionSource(str(folder / str(number)), caption_columns=["txt"], streaming=True)
        sources.append(opened(source, rank, world, row_counts=[PER_TAR] * tars))
    table = CaptionImageDataset(CaptionSource(str(folder / "table.parquet")), 0, False)
    sources.append(TableSource(table, 0))
    weights = {"weights": (2, 1, 1)} if mixing == "weights" else {}
    return SampleStream(sources, mixing=mixing, **{**weights, **place, **options})


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 2)])
@pytest.mark.parametrize("mixing", WAYS)
def test_a_mixture_has_one_order_for_any_number_of_readers(
    mixing: Mixing, world: int, workers: int, folder: Path
) -> None:
    lanes = Lanes.choose(4, 4)
    expected = list(itertools.islice(steps_of([mixed(folder, mixing)], 0, lanes, size=4), 60))
    streams = [mixed(folder, mixing, rank, world) for rank in range(world)]
    for step in (0, 55):
        resumed = steps_of(streams, workers, lanes, step * 4, 4 // world)
        assert list(itertools.islice(resumed, 60 - step)) == expected[step:]


def test_every_row_of_all_sources_comes_once_in_an_epoch(folder: Path) -> None:
    read = list(itertools.chain(*itertools.islice(batches(mixed(folder, "proportional"), 0, Lanes.choose(2)), TOTAL)))
    assert len(read) == 2 * TOTAL
    for epoch in range(2):
        assert len(set(read[epoch * TOTAL : (epoch + 1) * TOTAL])) == TOTAL
    for start in range(0, TOTAL, 25):
        rows = Counter(caption.split()[0] for caption in read[start : start + 25])
        assert 5 <= rows["2"] <= 6, "spread over the epoch"


def test_weighted_sources_start_over_alone(folder: Path) -> None:
    """Each has its own epochs: of none, a row comes twice before another came once."""
    read = list(itertools.chain(*itertools.islice(batches(mixed(folder, "weights"), 1, Lanes.choose(2)), 300)))
    shares = Counter(caption.split()[0] for caption in read)
    assert [shares[str(source)] / len(read) for source in range(3)] == pytest.approx([0.5, 0.25, 0.25], abs=0.01)
    for source in range(3):
        times = Counter(caption for caption in read if caption.startswith(str(source)))
        assert max(times.values()) - min(times.values()) <= 1


@pytest.mark.parametrize("weights", [(), (1, 1, 8)])
def test_all_ranks_have_the_same_source_in_a_step(weights: tuple[int, ...], folder: Path) -> None:
    streams = [mixed(folder, "one_source_per_step", rank, 2, weights=weights) for rank in range(2)]
    shares: Counter[str] = Counter()
    for step in itertools.islice(steps_of(streams, 2, Lanes.choose(2 * BATCH)), 100):
        (source,) = {caption.split()[0] for caption in step}
        shares[source] += 1
    expected = [PER_TAR * tars / TOTAL for tars in MIXED_TARS] if not weights else [0.1, 0.1]
    assert [shares[source] / 100 for source in "01"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("mixing", "options", "message"),
    [
        ("weights", {"weights": ()}, "needs a weight for every source"),
        ("weights", {"weights": (1, None, 2)}, "1 has no weight, but others have"),
        ("proportional", {"weights": (1, 1, 2)}, "mixing: proportional has no weights"),
    ],
)
def test_impossible_mixtures_are_refused(mixing: Mixing, options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises((ValueError, SourceError), match=message):
        mixed(folder, mixing, **options)
