"""Questions about scenes: each is true of its picture, and no kind of question answers itself."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from studies.miniature import page, questions, scenes
from studies.miniature.scene_texts import IN_A, NUMBERS, plural

PLACES = {words: place for place, words in IN_A.items()}


@pytest.fixture(scope="module")
def asked() -> dict[str, list[tuple[list[dict[str, Any]], dict[str, str]]]]:
    """The things of a scene and a question about it, by split."""
    found = {}
    for split in scenes.SPLITS:
        rows = pq.read_table(scenes.COMMITTED / f"{split}.parquet", columns=["key", "objects"]).to_pylist()
        found[split] = [(json.loads(row["objects"]), one) for row in rows for one in questions.questions(row)]
    assert all(found.values())
    return found


def answers(things: list[dict[str, Any]], question: str) -> list[str]:
    """Answer a question from the facts alone; several answers if it does not say which thing it means."""

    def names(thing: dict[str, Any]) -> str:
        return thing["caption"] if thing["count"] == 1 else plural(thing["caption"])

    if question.startswith("How many "):
        name = question.removeprefix("How many ").removesuffix(" are there?")
        return [NUMBERS[thing["count"]] for thing in things if plural(thing["caption"]) == name]
    if question.startswith("Where "):
        _, verb, _, name = question.removesuffix("?").split(" ", 3)
        there = [thing for thing in things if names(thing) == name]
        assert all((thing["count"] == 1) == (verb == "is") for thing in there)
        return [thing["place"] for thing in there]
    field = "size" if question.startswith("How large") else "caption"
    place = question.removeprefix("How large is what is ").removeprefix("What is ").removesuffix("?")
    return [thing[field] for thing in things if thing["place"] == PLACES[place]]


def test_every_answer_is_the_only_true_one(asked: dict[str, list[Any]]) -> None:
    for things, one in (pair for pairs in asked.values() for pair in pairs):
        assert answers(things, one["question"]) == [one["answer"]], one


def test_the_report_says_the_most_frequent_answers(asked: dict[str, list[Any]]) -> None:
    """What can be known without question and picture."""
    of_kind = {kind: [one["answer"] for _, one in asked["test"] if one["kind"] == kind] for kind in questions.KINDS}
    shares = {kind: max(Counter(given).values()) / len(given) for kind, given in of_kind.items()}
    told = ", ".join(f"{kind} {100 * share:.1f}" for kind, share in shares.items())
    assert told in " ".join((page.HERE / "README.md").read_text().split())


def test_the_files_have_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few(path: Path, split: str) -> None:
        rows = pq.read_table(scenes.COMMITTED / f"{split}.parquet").slice(0, 2).to_pylist()
        content = [{**row, "image": scenes.compose(split, row)} for row in rows]
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_list(content).to_parquet(path)

    monkeypatch.setattr(scenes, "write", few)
    questions.main([str(tmp_path)])
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "test.parquet"), split="train")
    assert rows.column_names == ["question", "answer", "kind", "image"]
    assert {row["image"].size for row in rows} == {(scenes.PAGE, scenes.PAGE)}
    assert len(rows) == 2 * questions.A_SCENE
