"""What the quickstart says about its tables, and beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from llm2clip.quickstart.data import QuickstartData
from llm2clip.quickstart.results import ONE_RUN, protocol, reading

RECALL = "text_to_image_recall@10"


def rows(raw: tuple[float, float], tuned: tuple[float, float], several: bool) -> dict[str, Any]:
    spread = {"std": {RECALL: 0.01}} if several else {}
    parts = ("in_domain", "transfer")
    return {
        name: {part: {RECALL: value, **spread} for part, value in zip(parts, values, strict=True)}
        for name, values in (("raw", raw), ("tuned", tuned))
    }


@pytest.mark.parametrize(
    ("tuned", "conclusion"),
    [
        ((0.40, 0.20), "both a better fit of the trained domains and transfer"),
        ((0.40, 0.11), "a better fit of the trained domains, and no transfer"),
        ((0.31, 0.20), "transfer to another domain, and no better fit"),
        ((0.20, 0.05), "neither a better fit"),
    ],
)
def test_several_runs_allow_a_conclusion(tuned: tuple[float, float], conclusion: str) -> None:
    (sentence,) = reading(rows((0.30, 0.10), tuned, several=True), "raw", "tuned")
    assert conclusion in sentence
    assert f"{100 * tuned[0]:.1f} after 30.0 on the trained domains (" in sentence


def test_one_run_allows_none() -> None:
    (sentence,) = reading(rows((0.30, 0.10), (0.40, 0.20), several=False), "raw", "tuned")
    assert sentence == (
        "Stage 1 changes R@10, text \u2192 image, compared with raw: 40.0 after 30.0 on the trained domains and 20.0 "
        f"after 10.0 on the domain it was trained without. {ONE_RUN}"
    )


COLUMNS = ["caption", "keywords"]


def test_test_captions_that_training_knows_are_counted(tmp_path: Path) -> None:
    texts = {
        "train": (["a dog", "a cat"], ["pet", "A  Bus"]),
        "validation": (["a tram"], ["x"]),
        "test": (["a bus", "a bus", "A dog", "a tram", "a bird"], ["pet", "pet", "pet", "pet", "pet"]),
    }
    for split, (captions, keywords) in texts.items():
        rows = {"image": [b""] * len(captions), "caption": captions, "keywords": keywords}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}.parquet")
    data = QuickstartData.find(str(tmp_path), COLUMNS)
    assert data.seen_captions() == (2, 4)
    said = protocol(data, {"seeds": 1, "unfrozen_seeds": 0}, transfer=False)
    assert said["seen"] == "Of 4 test captions, 2 are also captions of training images."
    assert said["queries"].startswith("distinct: ")


@pytest.mark.parametrize(("columns", "seen"), [(COLUMNS, 1), (COLUMNS[:1], 0)])
def test_of_the_bundled_data_one_test_caption_is_among_the_keywords_of_training(columns: list[str], seen: int) -> None:
    assert QuickstartData.find(None, columns).seen_captions()[0] == seen
