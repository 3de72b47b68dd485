"""What the quickstart says about its tables, and beside them."""

from __future__ import annotations

from pathlib import Path

import datasets

from llm2clip.quickstart.data import QuickstartData
from llm2clip.quickstart.results import protocol

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
    said = protocol(data)
    assert said["seen"] == "Of 4 test captions, 2 are also captions of training images."


def test_of_the_bundled_data_one_test_caption_is_among_the_keywords_of_training() -> None:
    assert [QuickstartData.find(None, columns).seen_captions()[0] for columns in (COLUMNS, COLUMNS[:1])] == [1, 0]
