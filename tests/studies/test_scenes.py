"""The data set `scenes`: every text of every scene says what the picture shows, and every negative does not."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from studies.miniature import scene_texts, scenes

Facts = set[tuple[str, int, str, str]]

NUMBERS = {"a single": 1, "just one": 1, "one": 1, "a pair of": 2, "two": 2, "a trio of": 3, "three": 3}
SIZES = {"large": "large", "big": "large", "small": "small", "little": "small"}
WORDINGS = {text: place for wording in (scene_texts.IN_A, scene_texts.IN_B) for place, text in wording.items()}
NAME = f"({'|'.join(NUMBERS)}) ({'|'.join(SIZES)}) ([a-zA-Z ]+?)"
WHERE = f"({'|'.join(sorted(WORDINGS, key=len, reverse=True))})"
# A place comes after a name, and before it only at the beginning of a sentence.
MENTION = re.compile(
    rf"(?:{WHERE} there (?:is|are) {NAME}\.)|(?:{NAME} (?:is |are |can be seen |){WHERE})", re.IGNORECASE
)
RELATION = re.compile(
    r"The ([a-zA-Z ]+) (?:is|are) (to the left of|above) the ([a-zA-Z ]+?)( and above (?:it|them))?\."
)
REVERSE = re.compile(
    r"The ([a-zA-Z ]+) (?:is|are) (further to the right|lower down)( and lower down)? than the ([^.]+)\."
)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    found = {split: pq.read_table(scenes.COMMITTED / f"{split}.parquet").to_pylist() for split in scenes.SPLITS}
    assert found
    assert all(found.values())
    return found


@pytest.fixture(scope="module")
def every(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for split in rows.values() for row in split]


def facts(row: dict[str, Any]) -> Facts:
    return {(told["caption"], told["count"], told["size"], told["place"]) for told in json.loads(row["objects"])}


def said(text: str, names: dict[str, str]) -> Facts:
    """Read back what a text says; `names` are the captions by every form in which they can appear."""
    found = set()
    for match in MENTION.finditer(text):
        before, *first, number, size, name, after = match.groups()
        if before:
            number, size, name = first
        found.add((names[name], NUMBERS[number.lower()], SIZES[size], WORDINGS[(before or after).lower()]))
    return found


def forms(row: dict[str, Any]) -> dict[str, str]:
    captions = [told["caption"] for told in json.loads(row["objects"])]
    return {form: caption for caption in captions for form in (caption, scene_texts.plural(caption))}


def test_the_committed_scenes_are_what_the_generator_gives(rows: dict[str, list[dict[str, Any]]]) -> None:
    for split, count in scenes.SPLITS.items():
        assert len(rows[split]) == count
        for number in range(0, count, count // 10):
            assert rows[split][number] == scenes.scene(split, number)


def test_no_name_and_no_drawing_is_in_two_splits(rows: dict[str, list[dict[str, Any]]]) -> None:
    seen: Counter[str] = Counter()
    for split in rows:
        things = [told for row in rows[split] for told in json.loads(row["objects"])]
        drawn = [told["drawing"] for row in rows[split] for told in json.loads(row["layout"])]
        # Without spaces: "lightbulb" would be "light bulb" once more.
        seen.update({told["caption"].lower().replace(" ", "") for told in things} | set(drawn))
        assert set(drawn) <= set(scenes.drawings(split))
    assert max(seen.values()) == 1


def test_descriptions_say_the_facts(every: list[dict[str, Any]]) -> None:
    for row in every:
        for column in ("long_a", "long_b", "full"):
            assert said(row[column], forms(row)) == facts(row), row[column]


def test_relations_are_those_of_the_picture(every: list[dict[str, Any]]) -> None:
    def middle(name: str, row: dict[str, Any]) -> Any:
        number = [told["caption"] for told in json.loads(row["objects"])].index(forms(row)[name])
        drawn = json.loads(row["layout"])[number]
        return (np.min(drawn["corners"], axis=0) + np.max(drawn["corners"], axis=0) + drawn["pixels"]) / 2

    checked = 0
    for row in every:
        for column in ("long_a", "long_b", "full"):
            relations = [(one, way, also, other) for one, way, other, also in RELATION.findall(row[column])]
            relations += [(other, way, also, one) for one, way, also, other in REVERSE.findall(row[column])]
            for one, way, also, other in relations:
                apart = middle(other, row) - middle(one, row)
                assert apart[int(way in ("above", "lower down"))] > scenes.DOUBT, row[column]
                assert not also or apart[1] > scenes.DOUBT
            checked += len(relations)
    assert checked > 4 * len(every) * 0.9


def test_negatives_have_one_change_and_are_false(every: list[dict[str, Any]]) -> None:
    for row in every:
        true, names = facts(row), forms(row)
        places = said(row["swapped_places"], names)
        count = said(row["changed_count"], names)
        # Nothing that is said of the two is true of them where they are, and all that is said of the others is.
        assert len(places - true) == 2
        assert {fact[:3] for fact in places} == {fact[:3] for fact in true}
        assert {fact[3] for fact in places} == {fact[3] for fact in true}
        assert len(count - true) == 1
        assert {fact[:1] + fact[2:] for fact in count} == {fact[:1] + fact[2:] for fact in true}
        if row["swapped_sizes"] is None:
            assert len({fact[2] for fact in true}) == 1
            continue
        sizes = said(row["swapped_sizes"], names)
        assert len(sizes - true) == 2
        assert {fact[:2] + fact[3:] for fact in sizes} == {fact[:2] + fact[3:] for fact in true}
        assert sorted(fact[2] for fact in sizes) == sorted(fact[2] for fact in true)


def test_things_are_where_the_facts_say(rows: dict[str, list[dict[str, Any]]]) -> None:
    third = scenes.PAGE / 3
    for split in rows:
        for row in rows[split][::25]:
            picture = np.asarray(scenes.compose(split, row)).min(axis=-1) < 240
            for told, drawn in zip(json.loads(row["objects"]), json.loads(row["layout"]), strict=True):
                assert len(drawn["corners"]) == told["count"]
                for x, y in drawn["corners"]:
                    across, down = np.nonzero(picture[y : y + drawn["pixels"], x : x + drawn["pixels"]])
                    # The longer side of what is drawn is the size.
                    assert max(np.ptp(across), np.ptp(down)) > 0.75 * drawn["pixels"], row["key"]
                    picture[y : y + drawn["pixels"], x : x + drawn["pixels"]] = False
                ends = np.min(drawn["corners"], axis=0), np.max(drawn["corners"], axis=0) + drawn["pixels"]
                column, line = ((ends[0] + ends[1]) / 2 // third).astype(int)
                assert scene_texts.PLACES[3 * line + column] == told["place"]
            # No copy of one thing covers another's, and there is nothing else.
            assert not picture.any()


def test_the_same_files_are_written_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pq.read_table(scenes.COMMITTED / "test.parquet").slice(0, 5), tmp_path / "test.parquet")
    monkeypatch.setattr(scenes, "COMMITTED", tmp_path)
    for folder in ("one", "two"):
        scenes.write(tmp_path / folder / "test.parquet", "test")
    files = [(tmp_path / folder / "test.parquet").read_bytes() for folder in ("one", "two")]
    assert files[0] == files[1]
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "one" / "test.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [image.size for image in table["image"]] == [(scenes.PAGE, scenes.PAGE)] * 5
    assert table["key"] == [f"test-{number:04d}" for number in range(5)]
