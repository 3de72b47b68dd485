"""ShareGPT4V-1k: the first 1,000 rows of the captions that ShareGPT4V's captioner wrote of SA-1B images."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from llm2clip.evaluation.benchmarks.base import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.data import RetrievalData
from llm2clip.evaluation.benchmarks.files import captions_data, read_json_rows, stream_json_objects, text_field
from llm2clip.evaluation.protocols.retrieval import RetrievalProtocol

TITLE = "ShareGPT4V-1k"
WHOLE = "share-captioner_coco_lcs_sam_1246k_1107.json"
DERIVED = "validation_1k.json"
ROWS = 1000
# `sam/images/sa_1.jpg` in the file; the archives of SA-1B have no folder of their own.
PLACES = ("sam", "sam/images", "images", ".")


def read(folder: Path) -> RetrievalData:
    """Read the rows in the order of the file, which is that of the test set; of the whole file only the first 1,000.

    Images may lie at their paths, without the folders `images` or `sam`, or anywhere below the folder.

    Raises:
        BenchmarkError: A row is broken, or images are missing.
    """
    if (folder / WHOLE).is_file():
        rows = list(islice(stream_json_objects(folder / WHOLE), ROWS))
        captions = [_answer(row, number) for number, row in enumerate(rows, 1)]
    else:
        rows = read_json_rows(folder / DERIVED)
        captions = [text_field(row, "caption", f"row {number} of {DERIVED}") for number, row in enumerate(rows, 1)]
    names = [text_field(row, "image", f"row {number} of {TITLE}") for number, row in enumerate(rows, 1)]
    rows_of_captions = [(name, [caption]) for name, caption in zip(names, captions, strict=True)]
    return captions_data(TITLE, folder, rows_of_captions, PLACES)


def _answer(row: dict, number: int) -> str:
    turns = row.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        raise BenchmarkError(f"row {number} of {WHOLE} has no second turn in 'conversations'.")
    return text_field(turns[1], "value", f"the second turn of row {number} of {WHOLE}")


BENCHMARKS = [
    Benchmark(
        name="sharegpt4v-1k",
        title=TITLE,
        groups=("long", "paper"),
        folder="sharegpt4v",
        marker=WHOLE,
        other_markers=(DERIVED,),
        files=f"{WHOLE} or LLM2CLIP's {DERIVED}; images sam/images/sa_N.jpg, also without these folders",
        counts={"images": ROWS, "texts": ROWS},
        license="CC BY-NC 4.0 (captions), SA-1B research license (images)",
        source="The captions are in the Hub data set ShareGPT4V, the images in the first archives of SA-1B.",
        read=read,
        protocol=RetrievalProtocol(),
        note="Baselines differ between papers by up to 15 points, with truncation of long captions; nearly saturated.",
    )
]
