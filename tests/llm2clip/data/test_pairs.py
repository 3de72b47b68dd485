from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from llm2clip.data import PairDataset, PairSource, SampleIndex
from llm2clip.data.opened_table import SourceError

from .conftest import CONCEPTS, GLOSSES


def glosses(**fields: Any) -> PairSource:
    return PairSource(GLOSSES, anchor_column="lemmas", positive_column="gloss", **fields)


def concepts(**fields: Any) -> PairSource:
    return PairSource(CONCEPTS, caption_columns=["caption", "keywords", "caption_de"], **fields)


def table_source(folder: Path, columns: dict[str, list[Any]], name: str = "pairs", **fields: Any) -> PairSource:
    path = folder / f"{name}.parquet"
    datasets.Dataset.from_dict(columns).to_parquet(str(path))
    return PairSource(str(path), **fields)


def test_pair_is_drawn_from_anchor_and_positive_column() -> None:
    dataset = PairDataset(glosses(instruction="Describe: "))
    row = datasets.load_dataset(GLOSSES, split="train")[7]
    expected = {
        "anchor": row["lemmas"],
        "positive": row["gloss"],
        "negative": None,
        "instruction": "Describe: ",
        "positive_instruction": None,
        "source": "glosses",
        "key": "glosses:7",
    }
    assert dataset[7] == dataset[SampleIndex(3, 7)] == expected
    assert len(dataset) + dataset.num_dropped == 5414


def test_captions_of_a_row_are_paired_at_random_in_both_orders() -> None:
    dataset = PairDataset(concepts())
    row = datasets.load_dataset(CONCEPTS, split="train")[0]
    texts = [row["caption"], row["keywords"], row["caption_de"]]
    draws = 1200
    counts = Counter((pair["anchor"], pair["positive"]) for pair in (dataset[SampleIndex(e, 0)] for e in range(draws)))
    assert set(counts) == {(a, b) for a in texts for b in texts if a != b}
    assert all(abs(count / draws - 1 / 6) < 4 * (1 / 6 * 5 / 6 / draws) ** 0.5 for count in counts.values())
    first = dataset[0]
    assert (first["anchor"], first["positive"]) == (texts[0], texts[1])


def test_drawn_texts_depend_only_on_seed_epoch_and_index() -> None:
    one, other = PairDataset(concepts(), seed=1), PairDataset(concepts(), seed=2)
    indices = [SampleIndex(epoch, index) for epoch in range(3) for index in range(40)]
    assert [one[index] for index in indices] == [one[index] for index in reversed(indices)][::-1]
    assert [one[index] for index in indices] != [other[index] for index in indices]
    assert pickle.loads(pickle.dumps(one))[indices[50]] == one[indices[50]]


def test_rows_without_two_different_captions_are_dropped_and_counted(tmp_path: Path) -> None:
    captions = [["a", "b"], ["a", " A "], ["c"], [], None, ["d", "", "e"]]
    dataset = PairDataset(table_source(tmp_path, {"captions": captions}, caption_columns=["captions"]))
    assert (len(dataset), dataset.num_dropped) == (2, 4)
    assert {dataset[1]["anchor"], dataset[1]["positive"]} == {"d", "e"}
    pairs = {"anchor": ["a", "b", "", "d"], "positive": ["x", "B", "y", None]}
    source = table_source(tmp_path, pairs, "two", anchor_column="anchor", positive_column="positive")
    dataset = PairDataset(source)
    assert (len(dataset), dataset.num_dropped) == (1, 3)
    with pytest.raises(ValueError, match=r"None of the 1 rows of .* has a pair of two different texts in caption"):
        PairDataset(table_source(tmp_path, {"caption": ["a"]}, "none", caption_columns=["caption"]))


def test_symmetric_source_swaps_half_of_the_pairs() -> None:
    dataset = PairDataset(glosses(symmetric=True))
    plain = PairDataset(glosses())
    swapped = sum(dataset[SampleIndex(0, i)]["anchor"] == plain[i]["positive"] for i in range(2000))
    assert abs(swapped / 2000 - 0.5) < 4 * (0.25 / 2000) ** 0.5
    for index in range(50):
        pair = dataset[SampleIndex(0, index)]
        assert {pair["anchor"], pair["positive"]} == {plain[index]["anchor"], plain[index]["positive"]}


def test_hard_negatives_differ_from_anchor_and_positive(tmp_path: Path) -> None:
    columns = {
        "q": ["a", "b", "c", "d"],
        "p": [["a1", "a2"], ["b1"], ["c1"], ["d1"]],
        "n": [["A2", "far"], ["near", "nearer"], ["C1"], None],
    }
    source = table_source(tmp_path, columns, anchor_column="q", positive_column="p", negative_column="n")
    dataset = PairDataset(source)
    assert (len(dataset), dataset.num_dropped) == (2, 2)
    drawn = [dataset[SampleIndex(epoch, index)] for epoch in range(40) for index in range(2)]
    assert {(pair["anchor"], pair["negative"]) for pair in drawn} == {("a", "far"), ("b", "near"), ("b", "nearer")}
    assert {pair["positive"] for pair in drawn} == {"a1", "a2", "b1"}


def test_sources_are_concatenated_with_unique_labels(tmp_path: Path) -> None:
    dataset = PairDataset([glosses(max_samples=10), glosses(split="test", max_samples=5), concepts(label="names")])
    assert [dataset[index]["source"] for index in (0, 9, 10, 14, 15)] == [
        "glosses", "glosses", "glosses-2", "glosses-2", "names"
    ]  # fmt: skip
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_missing_column_and_wrong_type_raise_source_error(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"no column 'lemma'; it has synset, domain, lemmas, gloss\. Did you mean 'lemmas'"
    ):
        PairDataset(PairSource(GLOSSES, anchor_column="lemma", positive_column="gloss"))
    source = table_source(tmp_path, {"q": ["a", "b"], "p": [1, 2]}, anchor_column="q", positive_column="p")
    with pytest.raises(SourceError, match=r"Row 0 of .*column 'p': a caption must be text, not int"):
        PairDataset(source)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either anchor_column and positive_column, or caption_columns"),
        ({"anchor_column": "a"}, "either anchor_column and positive_column"),
        ({"anchor_column": "a", "positive_column": "b", "caption_columns": ["c"]}, "either anchor_column"),
        ({"caption_columns": ["c"], "negative_column": "n"}, "cannot have a negative_column"),
        ({"caption_columns": ["c"], "weight": 0}, "must be positive"),
        ({"caption_columns": ["c"], "max_samples": 0}, "at least 1"),
    ],
)
def test_invalid_sources_are_rejected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairSource("somewhere", **fields)


def test_random_negatives_are_texts_of_other_rows_and_groups(tmp_path: Path) -> None:
    """As the original's third text: on the side of the positive, drawn anew in each epoch."""
    columns = {
        "short": [f"short {row}" for row in range(20)], "long": [f"long {row}" for row in range(20)],
        "image": [row // 2 for row in range(20)],
    }  # fmt: skip
    fields = {"anchor_column": "short", "positive_column": "long", "group_column": "image", "symmetric": True}
    dataset = PairDataset(table_source(tmp_path, columns, random_negative=True, **fields))
    seen = set()
    for epoch in range(60):
        pair = dataset[SampleIndex(epoch, 6)]
        side, row = pair["negative"].split()
        assert side == pair["positive"].split()[0]
        seen.add(int(row))
    assert seen == set(range(20)) - {6, 7}
    assert dataset[SampleIndex(2, 6)] == dataset[SampleIndex(2, 6)]
    assert dataset[6]["negative"] == dataset[6]["negative"] is not None
    one_group = columns | {"image": [0] * 20}
    alone = PairDataset(table_source(tmp_path, one_group, "group", random_negative=True, **fields))
    with pytest.raises(ValueError, match="hardly any row without a text or group of row 3; turn random_negative off"):
        alone[3]
    with pytest.raises(ValueError, match="has a negative_column; remove it or random_negative"):
        PairSource("a.jsonl", anchor_column="q", positive_column="p", negative_column="n", random_negative=True)


def test_instructions_are_looked_up_by_the_name_of_the_data_set(tmp_path: Path) -> None:
    columns = {"query": ["a", "b"], "positive": ["c", "d"]}
    fields = {"anchor_column": "query", "positive_column": "positive", "instruction_table": "e5"}
    expected = "Given a question, retrieve Wikipedia passages that answer the question; "
    for name, label in (("nq", None), ("other", "miracl")):
        pair = PairDataset(table_source(tmp_path, columns, name, label=label, **fields))[0]
        assert (pair["instruction"], pair["positive_instruction"]) == (expected, None)
    with pytest.raises(ValueError, match="has no data set 'pairs'; set `label` to one of allnli_split1"):
        PairSource("pairs.jsonl", **fields)
    with pytest.raises(ValueError, match="must be one of e5, not 'e6'"):
        PairSource("nq.jsonl", **{**fields, "instruction_table": "e6"})
    with pytest.raises(ValueError, match="either instruction or instruction_table"):
        PairSource("nq.jsonl", instruction="Find: ", **fields)
