"""Checks of published sets: what would stop an evaluation, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from llm2clip.checks.row_checks import (
    BATCH,
    BROKEN,
    CaptionCheck,
    Check,
    Finding,
    ImageCheck,
    ImageFacts,
    RowFacts,
    TextFaultCheck,
    inspect_image,
    report_of,
)
from llm2clip.checks.tables import print_tables
from llm2clip.checks.token_check import CountingTokenizer, TokenCheck
from llm2clip.command_line.processes import worker_count
from llm2clip.command_line.progress import ProgressBar
from llm2clip.command_line.tables import print_table
from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.hub_files import obtain, require_files
from llm2clip.evaluation.data import BenchmarkData, DataPart
from modeling_llm2clip.image_decoding_llm2clip import DEFAULT_MAX_PIXELS, DamagedImageError


def check_benchmark(
    benchmark: Benchmark,
    data: Path,
    tokenizers: Sequence[CountingTokenizer] = (),
    with_images: bool = True,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    num_workers: int | None = None,
    download: bool = False,
) -> dict[str, Any]:
    """Find out whether the files of a published set are whole, and what is in them.

    Args:
        data: The folder below which they lie.
        with_images: Decode all images.
        max_pixels: Largest image that can be used, width x height.
        num_workers: Processes that decode images, 0 for none; by default one per core, at most 8.
        download: Fetch a set of more than 2 GB too, if it is not there.

    Returns:
        As JSON values: `title`; `stops`, what would stop an evaluation, in sentences; `published` counts; and if the
        files could be read, `counts` and the parts of `check_data`, whose rows are the images.
    """
    report: dict[str, Any] = {"title": benchmark.title, "published": dict(benchmark.counts), "stops": []}
    try:
        require_files([benchmark], data, download)
        folder = obtain(benchmark, data)
        content = benchmark.load(folder)
    except (OSError, ValueError) as error:
        return report | {"stops": [str(error)]}
    report |= {"folder": str(folder), "counts": content.counts()}
    differences = benchmark.differences(content.counts())
    if differences:
        report["stops"] = [f"there are {', '.join(differences)}."]
    report |= _contents(content, tokenizers, with_images, max_pixels, worker_count(num_workers))
    unusable = report["rows"] - report["usable_rows"]
    if unusable:
        report["stops"].append(f"{unusable:,} of {report['rows']:,} images cannot be used.")
    return report


class InspectedImages(Dataset):
    """What is known about each image of a part of some data, with its key; label maps are read too."""

    def __init__(self, part: DataPart, max_pixels: int) -> None:
        assert part.images is not None
        self.images, self.label_map, self.max_pixels = part.images, part.label_map, max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[str, ImageFacts]:
        key = self.images.key(row)
        facts: ImageFacts = self.images.decode(row, lambda value, key, _: inspect_image(value, key, self.max_pixels))
        if self.label_map is not None and facts.fault is None:
            try:
                self.label_map(row)
            except (BenchmarkError, DamagedImageError) as error:
                return key, ImageFacts(fault=BROKEN, reason=f"label map: {error}")
        return key, facts


def _contents(
    content: BenchmarkData,
    tokenizers: Sequence[CountingTokenizer],
    with_images: bool,
    max_pixels: int,
    num_workers: int,
) -> dict[str, Any]:
    parts = content.parts()
    columns = list(dict.fromkeys(column for part in parts for column in part.columns))
    captions = CaptionCheck(columns)
    # Published sets contain empty captions, which stay queries.
    captions.findings["empty captions"] = empty = Finding()
    of_texts: list[Check] = [captions, TextFaultCheck(), TokenCheck(tokenizers)]
    for part in parts:
        for number, (key, *texts) in enumerate(part.rows):
            row = RowFacts(key or str(number), {name: [text] for name, text in zip(part.columns, texts, strict=True)})
            for check in of_texts:
                check.add(row)
            for column, text in zip(part.columns, texts, strict=True):
                if not text.strip():
                    empty.add(row.key, column)
    # Parts may share their images.
    with_images_of = {id(part.images): part for part in parts if part.images is not None}.values()
    sets, image_check = [InspectedImages(part, max_pixels) for part in with_images_of], ImageCheck()
    for images in sets if with_images else ():
        with ProgressBar("Checking images", len(images), "image") as bar:
            for batch in DataLoader(images, BATCH, num_workers=num_workers, collate_fn=list):
                for key, facts in batch:
                    image_check.add(RowFacts(key, {}, image=facts))
                bar.update(len(batch))
    rows_found = sum(map(len, sets))
    usable = image_check.widths.total() if with_images else rows_found
    report = report_of([*of_texts, *([image_check] if with_images else [])])
    return report | {"rows": rows_found, "usable_rows": usable}


def print_report(report: dict[str, Any]) -> None:
    """Print a report of [`check_benchmark`] as tables."""
    console = Console(markup=False, emoji=False, highlight=False)
    if "counts" in report:
        names = dict.fromkeys([*report["published"], *report["counts"]])
        both = (report["counts"], report["published"])
        rows = [[name, *(f"{side[name]:,}" if name in side else "" for side in both)] for name in names]
        print_table(console, f"{report['title']}, counts", ("", "found", "published"), rows)
        print_tables(report, f"{report['title']} in {report['folder']}")
    for sentence in report["stops"]:
        console.print(f"{report['title']}: {sentence}", soft_wrap=True)
