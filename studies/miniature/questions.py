"""Questions about the pictures of `scenes`: what is where, where it is, how many there are, how large it is.

`python -m studies.miniature.questions OUTPUT_DIR` writes a parquet file of image, question, answer and kind per split.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pyarrow.parquet as pq

from studies.miniature import scenes
from studies.miniature.scene_texts import IN_A, NUMBERS, plural

KINDS = ("what", "where", "how many", "how large")
A_SCENE = 3


def questions(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return three questions of different kinds about a scene, with their answers; the same each time."""
    random = Random(f"questions/{row['key']}")
    things = json.loads(row["objects"])
    # A third of the scenes has two of one thing and a third three, so that the numbers come equally often.
    several = [thing for thing in things if thing["count"] > 1]
    asked = []
    for kind in random.sample(KINDS, A_SCENE):
        thing = random.choice(several if several and kind == "how many" else things)
        name, is_single = thing["caption"], thing["count"] == 1
        names = plural(name)
        question, answer = {
            "what": (f"What is {IN_A[thing['place']]}?", name),
            "where": (f"Where is the {name}?" if is_single else f"Where are the {names}?", thing["place"]),
            "how many": (f"How many {names} are there?", NUMBERS[thing["count"]]),
            "how large": (f"How large is what is {IN_A[thing['place']]}?", thing["size"]),
        }[kind]
        asked.append({"question": question, "answer": answer, "kind": kind})
    return asked


def write(path: Path, pictures: Path) -> None:
    """Write the questions about a file of `scenes.write`, with their pictures."""
    rows = pq.read_table(pictures, columns=["key", "objects", "image"]).to_pylist()
    content = [{**asked, "image": row["image"]} for row in rows for asked in questions(row)]
    features = {column: datasets.Value("string") for column in content[0]} | {"image": datasets.Image()}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(content, features=datasets.Features(features)).to_parquet(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.miniature.questions", description="Ask about scenes.")
    parser.add_argument("output_dir", type=Path, help="folder for the files SPLIT.parquet, and scenes/SPLIT.parquet")
    options = parser.parse_args(arguments)
    for split in scenes.SPLITS:
        pictures = options.output_dir / "scenes" / f"{split}.parquet"
        scenes.write(pictures, split)
        write(options.output_dir / f"{split}.parquet", pictures)


if __name__ == "__main__":
    main()
