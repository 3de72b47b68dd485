from __future__ import annotations

import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from llm2clip.data import PairDataset, PairSource, SampleIndex, caption_id
from llm2clip.data.formats import SourceError
from llm2clip.data.rows import column_texts, column_value, stable_seed

from .conftest import CONCEPTS, GLOSSES
from .pairs import concepts, glosses, plain_source, table_source


def test_pair_is_drawn_from_anchor_and_positive_column() -> None:
    dataset = PairDataset(glosses(instruction="Describe: "))
    row = datasets.load_dataset(GLOSSES, split="train")[7]
    expected = {"anchor": row["lemmas"], "positive": row["gloss"], "negative": None, "source": "glosses"}
    expected |= {"instruction": "Describe: ", "positive_instruction": None, "key": "glosses:7"}
    assert dataset[7] == dataset[SampleIndex(3, 7)] == expected
    assert len(dataset) + dataset.tables[0].num_dropped == 5414


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
    assert (len(dataset), dataset.tables[0].num_dropped) == (2, 4)
    assert {dataset[1]["anchor"], dataset[1]["positive"]} == {"d", "e"}
    dataset = PairDataset(plain_source(tmp_path, {"q": ["a", "b", "", "d"], "p": ["x", "B", "y", None]}, name="two"))
    assert (len(dataset), dataset.tables[0].num_dropped) == (1, 3)
    with pytest.raises(ValueError, match=r"None of the 1 rows of .* two different texts in caption"):
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
    columns = {"q": ["a", "b", "c", "d"], "p": [["a1", "a2"], ["b1"], ["c1"], ["d1"]]}
    columns["n"] = [["A2", "far"], ["near", "nearer"], ["C1"], None]
    dataset = PairDataset(plain_source(tmp_path, columns, negative_column="n"))
    assert (len(dataset), dataset.tables[0].num_dropped) == (2, 2)
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
    with pytest.raises(SourceError, match=r"no column 'lemma'; .* Did you mean 'lemmas'"):
        PairDataset(PairSource(GLOSSES, anchor_column="lemma", positive_column="gloss"))
    with pytest.raises(SourceError, match=r"Row 0 of .*column 'p': a caption must be text, not int"):
        PairDataset(plain_source(tmp_path, {"q": ["a", "b"], "p": [1, 2]}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
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
    columns = {side: [f"{side} {row}" for row in range(20)] for side in "qp"} | {"image": [n // 2 for n in range(20)]}
    fields = {"group_column": "image", "symmetric": True, "random_negative": True}
    dataset, seen = PairDataset(plain_source(tmp_path, columns, **fields)), set()
    for epoch in range(60):
        pair = dataset[SampleIndex(epoch, 6)]
        side, row = pair["negative"].split()
        assert side == pair["positive"].split()[0]
        seen.add(int(row))
    assert seen == set(range(20)) - {6, 7}
    assert dataset[SampleIndex(2, 6)] == dataset[SampleIndex(2, 6)]
    alone = PairDataset(plain_source(tmp_path, columns | {"image": [0] * 20}, name="group", **fields))
    with pytest.raises(ValueError, match="turn random_negative off"):
        alone[3]
    with pytest.raises(ValueError, match="remove it or random_negative"):
        PairSource("a.jsonl", anchor_column="q", positive_column="p", negative_column="n", random_negative=True)


def test_instructions_are_looked_up_by_the_name_of_the_data_set(tmp_path: Path) -> None:
    fields = {"instruction_table": "e5"}
    expected = "Given a question, retrieve Wikipedia passages that answer the question; "
    for name, label in (("nq", None), ("other", "miracl")):
        pair = PairDataset(plain_source(tmp_path, {"q": ["a"], "p": ["c"]}, name=name, label=label, **fields))[0]
        assert (pair["instruction"], pair["positive_instruction"]) == (expected, None)
    for wrong, message in (
        ({}, "no data set 'pairs'; set `label` to one of allnli_split1"),
        ({"instruction_table": "e6"}, "one of e5, not 'e6'"),
        ({"instruction": "Find: "}, "either instruction or instruction_table"),
    ):
        with pytest.raises(ValueError, match=message):
            PairSource("pairs.jsonl", anchor_column="q", positive_column="p", **{**fields, **wrong})


AWKWARD = [
    "a dog", "A  Dog", " a\tdog\n", "a\u3000dog", "straße", "STRASSE", "caf\u00e9", "cafe\u0301", "", " ", None, "nan",
]  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"anchor_column": "one", "positive_column": "few"},
        {"caption_columns": ["one", "few"], "group_column": "number"},
        {
            "anchor_column": "few",
            "positive_column": "one",
            "negative_column": "dotted.name",
            "group_column": "record.n",
        },
        {"anchor_column": "record.text", "positive_column": "dotted.name", "negative_column": "few"},
    ],
)
def test_rows_with_the_keys_of_their_texts_and_group_are_used(tmp_path: Path, fields: dict[str, Any]) -> None:
    generator, rows = random.Random(0), range(1300)
    columns: dict[str, list[Any]] = {
        "one": [generator.choice(AWKWARD) for _ in rows],
        "few": [generator.choice([None, generator.choices(AWKWARD, k=generator.randrange(4))]) for _ in rows],
        "dotted.name": [generator.choice(AWKWARD) for _ in rows],
        "number": [generator.choice([None, 0.5, 7.0]) for _ in rows],
        "record": [generator.choice([None, {"text": generator.choice(AWKWARD), "n": row // 3}]) for row in rows],
    }
    (table,) = PairDataset(table_source(tmp_path, columns, **fields)).tables
    found = 0
    for position, row in enumerate(table.table):
        source = table.source
        texts = [
            column_texts(row, name)
            for name in source.columns
            if name not in (source.negative_column, source.group_column)
        ]
        own = {caption_id(text) for some in texts for text in some}
        negative = {caption_id(text) for text in column_texts(row, source.negative_column or "")} - own
        if len(own) < 2 or (source.anchor_column and not all(texts)) or (source.negative_column and not negative):
            assert position not in table.rows
            continue
        group = column_value(row, source.group_column) if source.group_column else None
        own |= set() if group is None else {stable_seed("group", str(group))}
        assert table.rows[found] == position
        for kind, expected in (("own", own), ("negative", negative)):
            starts = getattr(table, f"{kind}_starts")
            assert getattr(table, f"{kind}_keys")[starts[found] : starts[found + 1]].tolist() == sorted(expected)
        found += 1
    assert found == len(table) > 30
