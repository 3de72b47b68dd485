"""The data set `scenes`: drawings of `examples/data/concepts` on a white page, with long and short descriptions.

`python -m studies.miniature.scenes OUTPUT_DIR` draws the pictures of the committed `scenes/*.parquet`. With
`--generate` the command first writes these files anew. The card of the data set is `scenes/README.md`.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, floor
from pathlib import Path
from random import Random
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from studies.miniature.scene_texts import GAP, PLACES, SIZES, Thing, full, long_a, long_b, negatives, related, short

CONCEPTS = Path(__file__).resolve().parents[2] / "examples" / "data" / "concepts"
COMMITTED = Path(__file__).resolve().parent / "scenes"
SPLITS = {"train": 1800, "validation": 300, "test": 400}
PAGE = 224
# Nobody would agree on the region of a thing whose middle lies closer to the border of two.
DOUBT = 5
# Two stand side by side or one above the other, three in a triangle: a row of three would be in no one region.
SHAPES = [[(0, 0), (1, 0), (0, 1)], [(0, 0), (0, 1), (1, 1)], [(0, 0), (1, 0), (1, 1)], [(0, 0), (0, 1), (1, 0)]]


@dataclass(frozen=True)
class Noun:
    """A name, the keys of its drawings, and the words under which the drawings are known."""

    name: str
    drawings: tuple[str, ...]
    keywords: frozenset[str]

    def confusable(self, other: Noun) -> bool:
        """Return whether the names share a word, or one may be said of the other's drawing: "bird" of a duck."""
        words, others = self.name.lower().split(), other.name.lower().split()
        return not set(words).isdisjoint(others) or words[-1] in other.keywords or others[-1] in self.keywords


def clear_of_edges(picture: Image.Image) -> bool:
    """Return whether a drawing has the page as its background: most of its border is white."""
    grey = np.asarray(picture.convert("RGB")).min(axis=-1)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return bool((border < 240).mean() < 0.3)


@cache
def nouns(split: str) -> list[Noun]:
    """List the names of a split that a scene can hold.

    `nouns.txt` has been picked by hand from the captions of one to three words: concrete things that can be counted
    and have one obvious name. Left out are flags, countries, buttons, letters and signs of the zodiac, pairs and
    masses ("glasses", "rice"), actions ("man biking"), words for people in general, names that state a size or are
    not English, and names whose plural is doubtful ("moose"). Where emojis have the name, cliparts are not taken:
    there a turkey is a flag and a mouse belongs to a computer.
    """
    rows = pq.read_table(CONCEPTS / f"{split}.parquet", columns=["key", "source", "caption", "keywords", "image"])
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows.to_pylist():
        by_name.setdefault(row["caption"].lower(), []).append(row)
    chosen = []
    for name in (COMMITTED / "nouns.txt").read_text().splitlines():
        named = by_name.get(name.lower(), [])
        named = [row for row in named if row["source"] != "openclipart"] or named
        kept = [row for row in named if clear_of_edges(Image.open(io.BytesIO(row["image"]["bytes"])))]
        if kept:
            keywords = frozenset(re.findall("[a-z]+", " ".join(row["keywords"] or "" for row in kept).lower()))
            chosen.append(Noun(name, tuple(sorted(row["key"] for row in kept)), keywords))
    return chosen


def put(random: Random, thing: Thing) -> Thing | None:
    """Put the copies of a thing into its region, or return None where they do not fit."""
    row, column = divmod(PLACES.index(thing.place), 3)
    step = SIZES[thing.size] + GAP
    cells = [(x * step, y * step) for x, y in random.choice(SHAPES)[: thing.count]]
    start = []
    for axis, region in enumerate((column, row)):
        length = max(cell[axis] for cell in cells) + SIZES[thing.size]
        low = max(0, ceil(PAGE * region / 3 + DOUBT * (region > 0) - length / 2))
        high = min(PAGE - length, floor(PAGE * (region + 1) / 3 - DOUBT * (region < 2) - length / 2))
        if low > high:
            return None
        start.append(random.randint(low, high))
    return replace(thing, corners=tuple((start[0] + x, start[1] + y) for x, y in cells))


def layout(split: str, number: int) -> list[Thing]:
    """Lay out a scene; the same for a split and number, however many scenes there are."""
    random = Random(f"layout/{split}/{number}")
    kinds = random.choice((2, 3, 4))
    # A third of the scenes has one of each thing, a third two of one, a third three: see `changed_count`.
    counts = [random.choice((1, 2, 3))] + [1] * (kinds - 1)
    chosen: list[Noun] = []
    while len(chosen) < kinds:
        noun = random.choice(nouns(split))
        if not any(noun.confusable(other) for other in chosen):
            chosen.append(noun)
    drawings = [random.choice(noun.drawings) for noun in chosen]
    sizes = [random.choice(list(SIZES)) for _ in chosen]
    homeless = [
        Thing(noun.name, count, size, "", drawing)
        for noun, count, size, drawing in zip(chosen, counts, sizes, drawings, strict=True)
    ]
    # Places alone are drawn again until all fit: no count or size is rarer for want of room.
    while True:
        places = random.sample(PLACES, kinds)
        tried = [put(random, replace(thing, place=place)) for thing, place in zip(homeless, places, strict=True)]
        things = [thing for thing in tried if thing]
        if len(things) == kinds and len(related(things)) == kinds * (kinds - 1) // 2:
            return random.sample(things, kinds)


def scene(split: str, number: int) -> dict[str, str | None]:
    """Generate a row of the committed files."""
    things = layout(split, number)

    def random(column: str) -> Random:
        return Random(f"{column}/{split}/{number}")

    facts = [{field: getattr(thing, field) for field in ("caption", "count", "size", "place")} for thing in things]
    drawn = [{"drawing": thing.drawing, "pixels": SIZES[thing.size], "corners": thing.corners} for thing in things]
    row: dict[str, str | None] = {"key": f"{split}-{number:04d}", "objects": json.dumps(facts)}
    texts: dict[str, Callable[[Sequence[Thing], Random], str]]
    texts = {"short": short, "long_a": long_a, "long_b": long_b, "full": full}
    row |= {column: describe(things, random(column)) for column, describe in texts.items()}
    for column, told in negatives(things, random("negatives")).items():
        row[column] = long_a(things, random("long_a"), told) if told else None
    return row | {"layout": json.dumps(drawn)}


def generate(split: str) -> None:
    """Write the committed file of a split anew."""
    rows = [scene(split, number) for number in range(SPLITS[split])]
    pq.write_table(
        pa.Table.from_pylist(rows), COMMITTED / f"{split}.parquet", compression="zstd", compression_level=19
    )


@cache
def drawings(split: str) -> dict[str, bytes]:
    rows = pq.read_table(CONCEPTS / f"{split}.parquet", columns=["key", "image"]).to_pylist()
    return {row["key"]: row["image"]["bytes"] for row in rows}


def compose(split: str, row: dict[str, Any]) -> Image.Image:
    """Draw the picture of a row, RGB with `PAGE` pixels a side."""
    page = Image.new("RGB", (PAGE, PAGE), "white")
    for thing in json.loads(row["layout"]):
        drawing = Image.open(io.BytesIO(drawings(split)[thing["drawing"]])).convert("RGB")
        # Some drawings fill a tenth of their square, and would be small at any size.
        box = ImageOps.invert(drawing.convert("L")).point(lambda value: 255 * (value > 8)).getbbox()
        fitted = ImageOps.contain(drawing.crop(box), (thing["pixels"],) * 2, Image.Resampling.LANCZOS)
        for x, y in thing["corners"]:
            page.paste(fitted, (x + (thing["pixels"] - fitted.width) // 2, y + (thing["pixels"] - fitted.height) // 2))
    return page


def write(path: Path, split: str) -> None:
    """Write the rows of a split with their pictures, as a parquet file."""
    rows = pq.read_table(COMMITTED / f"{split}.parquet").to_pylist()
    for row in rows:
        file = io.BytesIO()
        compose(split, row).save(file, "WEBP", quality=90)
        row["image"] = {"bytes": file.getvalue(), "path": f"{row['key']}.webp"}
    features = {column: datasets.Value("string") for column in rows[0]} | {"image": datasets.Image()}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.miniature.scenes", description="Draw the data set scenes."
    )
    parser.add_argument("output_dir", type=Path, help="folder for the files scenes/SPLIT.parquet")
    parser.add_argument("--generate", action="store_true", help="first write the committed layouts and texts anew")
    options = parser.parse_args(arguments)
    for split in SPLITS:
        if options.generate:
            generate(split)
        write(options.output_dir / "scenes" / f"{split}.parquet", split)


if __name__ == "__main__":
    main()
