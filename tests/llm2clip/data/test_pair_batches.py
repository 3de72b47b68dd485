from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llm2clip.data import PairBatchSampler, PairDataset, SampleIndex, caption_id
from llm2clip.data.pairs import PairTable

from .pairs import concepts, glosses, plain_source


@pytest.fixture(scope="module")
def bundled() -> PairDataset:
    return PairDataset([glosses(), concepts()])


def _global_batches(sampler: PairBatchSampler, epoch: int = 0) -> list[list[SampleIndex]]:
    """The batches of all ranks together, of which every epoch has the same number."""
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    step = sampler.num_replicas
    return [[index for batch in batches[i : i + step] for index in batch] for i in range(0, len(batches), step)]


def _texts(dataset: PairDataset, index: SampleIndex) -> tuple[str, set[int], set[int]]:
    """The label, the ids of anchors, positives and group, and those of negatives of a row, read from its table."""
    number = sum(index.index >= start for start in dataset.starts[1:])
    table: PairTable = dataset.tables[number]
    row = table.table[int(table.rows[index.index - int(dataset.starts[number])])]
    source = table.source

    def ids(*columns: str | None) -> set[int]:
        values = [row[column] for column in columns if column]
        texts = itertools.chain(*([value] if isinstance(value, str) else value or [] for value in values))
        return {caption_id(text) for text in texts if text}

    own = ids(source.anchor_column, source.positive_column, *(source.caption_columns or []))
    negative = ids(source.negative_column) - own
    if source.group_column and row[source.group_column] is not None:
        own.add(-1 - caption_id(str(row[source.group_column])))
    return table.label, own, negative


def _assert_no_false_negatives(dataset: PairDataset, batch: list[SampleIndex]) -> None:
    rows = [_texts(dataset, index) for index in batch]
    assert len({label for label, _, _ in rows}) == 1
    for (_, own, negative), (_, other_own, other_negative) in itertools.combinations(rows, 2):
        assert own.isdisjoint(other_own | other_negative)
        assert negative.isdisjoint(other_own)


def _random_source(folder: Path, seed: int) -> PairDataset:
    """Make pairs from a small vocabulary, in which almost every row conflicts with many others."""
    generator, rows = random.Random(seed), range(300)
    columns: dict[str, list[Any]] = {
        "q": [f"q{generator.randrange(150)}" for _ in rows],
        "p": [[f"p{generator.randrange(150)}" for _ in range(generator.randrange(1, 4))] for _ in rows],
        "n": [[f"{generator.choice('qpx')}{generator.randrange(150)}" for _ in range(2)] for _ in rows],
        "g": [generator.choice([None, generator.randrange(100)]) for _ in rows],
    }
    return PairDataset(plain_source(folder, columns, negative_column="n", group_column="g" if seed % 2 else None))


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_batches_have_no_false_negatives_and_each_row_at_most_once(seed: int | None, tmp_path: Path) -> None:
    """Rows with few conflicts, and with many and hard negatives."""
    few = seed is None
    grouped = [glosses(group_column="synset"), concepts(group_column="caption")]
    dataset = PairDataset(grouped) if seed is None else _random_source(tmp_path, seed)
    for batch_size in (16, 128) if few else (2, 7, 20):
        sampler = PairBatchSampler(dataset, batch_size, seed=1)
        for epoch in range(3):
            batches = _global_batches(sampler, epoch)
            for batch in batches:
                assert len(batch) == batch_size
                assert {index.epoch for index in batch} == {epoch}
                _assert_no_false_negatives(dataset, batch)
            seen = [index.index for batch in batches for index in batch]
            assert len(set(seen)) == len(seen) > (0.95 if few else 0.7) * len(dataset)


def test_one_and_two_ranks_have_the_same_global_batches(bundled: PairDataset) -> None:
    for epoch in (0, 1):
        one = _global_batches(PairBatchSampler(bundled, 48), epoch)
        assert _global_batches(PairBatchSampler(bundled, 24, num_replicas=2), epoch) == one
        assert _global_batches(PairBatchSampler(bundled, 12, num_replicas=4), epoch) == one


def test_epochs_differ_in_batches_and_order_but_not_in_length(bundled: PairDataset) -> None:
    sampler = PairBatchSampler(bundled, 64)
    first, second, again = (_global_batches(sampler, epoch) for epoch in (0, 1, 0))
    assert first == again != _global_batches(PairBatchSampler(bundled, 64, seed=5))
    assert len(first) == len(second)
    sets = [{frozenset(index.index for index in batch) for batch in epoch} for epoch in (first, second)]
    assert not sets[0] & sets[1]


def test_batches_of_all_sources_are_shuffled_together(bundled: PairDataset) -> None:
    labels = [bundled[batch[0]]["source"] for batch in _global_batches(PairBatchSampler(bundled, 64))]
    halves = [Counter(labels[: len(labels) // 2]), Counter(labels[len(labels) // 2 :])]
    assert all(half["glosses"] > 20 and half["concepts"] > 20 for half in halves)


def test_weights_determine_the_share_of_batches() -> None:
    dataset, seen = PairDataset([glosses(weight=3.0), concepts(weight=1.0)]), set()
    sampler = PairBatchSampler(dataset, 64)
    for epoch in range(2):
        batches = _global_batches(sampler, epoch)
        counts = Counter(dataset[batch[0]]["source"] for batch in batches)
        assert counts == {"glosses": 5414 // 64, "concepts": 5414 // 64 // 3}
        seen |= {index.index for batch in batches for index in batch if index.index >= dataset.starts[1]}
    assert len(seen) > 1.5 * counts["concepts"] * 64  # epochs use different rows
    with pytest.raises(ValueError, match="concepts have none"):
        PairBatchSampler(PairDataset([glosses(weight=3.0), concepts()]), 64)


def _grouped(groups: list[int]) -> dict[str, list[Any]]:
    rows = range(len(groups))
    return {"q": [f"q{row}" for row in rows], "p": [f"p{row}" for row in rows], "g": groups}


def test_conflicting_rows_are_moved_to_later_batches(tmp_path: Path) -> None:
    # Ten groups of ten rows in batches of ten: every batch must have one row of each group.
    source = plain_source(tmp_path, _grouped([row // 10 for row in range(100)]), group_column="g")
    sampler = PairBatchSampler(PairDataset(source), 10)
    placed = [len({index.index for batch in _global_batches(sampler, epoch) for index in batch}) for epoch in range(5)]
    assert placed == [100] * 5


def test_drop_last_false_keeps_the_short_last_batch(tmp_path: Path) -> None:
    dataset = PairDataset(plain_source(tmp_path, _grouped([*range(10)])))
    assert [len(batch) for batch in _global_batches(PairBatchSampler(dataset, 4))] == [4, 4]
    kept = _global_batches(PairBatchSampler(dataset, 4, drop_last=False))
    assert sorted(len(batch) for batch in kept) == [2, 4, 4]
    assert {index.index for batch in kept for index in batch} == set(range(10))
    with pytest.raises(ValueError, match="single rank"):
        PairBatchSampler(dataset, 2, num_replicas=2, drop_last=False)


def test_batches_do_not_depend_on_the_version(bundled: PairDataset) -> None:
    """So that a run resumes where it was interrupted."""
    sampler = PairBatchSampler(bundled, 16, num_replicas=2, seed=3)
    seen = [tuple(index) for epoch in (0, 2) for batch in _global_batches(sampler, epoch) for index in batch]
    assert hashlib.sha256(repr(seen).encode()).hexdigest()[:16] == "f39a685cddf569e0"


def test_source_that_fills_no_batch_raises(tmp_path: Path) -> None:
    dataset = PairDataset(plain_source(tmp_path, {"q": [f"q{i}" for i in range(30)], "p": ["same"] * 30}))
    with pytest.raises(ValueError, match="30 usable rows of pairs fill no batch of 4"):
        PairBatchSampler(dataset, 2, num_replicas=2)
